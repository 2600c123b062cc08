//! kube-proxy's objects in `nf_tables`: chains in the tables of iptables-nft, and the tables of its nftables mode.
//!
//! iptables-nft keeps its tables as tables of `nf_tables` with the same names, in families `ip` and `ip6`; a rule that
//! leads to a chain has an `immediate` expression with the verdict. Constants are those of
//! `linux/netfilter/nf_tables.h`.

use std::collections::{BTreeMap, BTreeSet};

use netlink_batch::{Error as NetlinkError, Refusal, Request, Socket};
use netlink_packet_core::{DecodeError, NetlinkDeserializable, NetlinkHeader, parse_string, parse_u64_be};

use crate::Action;
use crate::errno::{EBUSY, ENOENT, ERESTART};
use crate::kube_proxy_names::{self, NFT_TABLE, TABLES};
use crate::nfnetlink::{self, ANY_FAMILY, Attributes, Message};
use crate::report::{Backend, Error, Family, Iptables, Object, RETRY_ADVICE, Report};
use crate::rules::{Jump, Plan, Table};

/// `NFNL_SUBSYS_NFTABLES`.
const SUBSYSTEM: u8 = 10;

const NFT_MSG_GETTABLE: u8 = 1;
const NFT_MSG_DELTABLE: u8 = 2;
const NFT_MSG_GETCHAIN: u8 = 4;
const NFT_MSG_DELCHAIN: u8 = 5;
const NFT_MSG_GETRULE: u8 = 7;
const NFT_MSG_DELRULE: u8 = 8;
const NFT_MSG_GETGEN: u8 = 16;

const NFNL_BATCH_GENID: u16 = 1;
const NFTA_GEN_ID: u16 = 1;
const NFTA_TABLE_NAME: u16 = 1;
const NFTA_CHAIN_TABLE: u16 = 1;
const NFTA_CHAIN_NAME: u16 = 3;
const NFTA_RULE_TABLE: u16 = 1;
const NFTA_RULE_CHAIN: u16 = 2;
const NFTA_RULE_HANDLE: u16 = 3;
const NFTA_RULE_EXPRESSIONS: u16 = 4;
const NFTA_LIST_ELEM: u16 = 1;
const NFTA_EXPR_NAME: u16 = 1;
const NFTA_EXPR_DATA: u16 = 2;
const NFTA_IMMEDIATE_DATA: u16 = 2;
const NFTA_DATA_VERDICT: u16 = 2;
const NFTA_VERDICT_CHAIN: u16 = 2;

/// How often a table is attempted when other processes change `nf_tables` meanwhile.
const ATTEMPTS: u32 = 16;

pub(crate) fn clean_up(action: Action, report: &mut Report) {
    let cannot_inspect = |error: &NetlinkError| Error::CannotInspect {
        location: "the tables of nf_tables".into(),
        reason: error.to_string(),
        advice: RETRY_ADVICE.into(),
    };
    let mut socket = match nfnetlink::open() {
        Ok(Some(socket)) => socket,
        Ok(None) => return,
        Err(error) => return report.problems.push(cannot_inspect(&error)),
    };
    match generation(&mut socket) {
        Err(error) if nfnetlink::is_missing(&error) => return,
        Err(error) => return report.problems.push(cannot_inspect(&error)),
        Ok(_) => {}
    }
    for family in Family::BOTH {
        clean_up_nftables_mode(&mut socket, family, action, report);
    }
    for family in Family::BOTH {
        let iptables = Iptables { backend: Backend::Nft, family };
        for name in TABLES {
            if let Err(problem) = clean_up_table(&mut socket, iptables, name, action, report) {
                report.problems.push(problem);
            }
        }
    }
}

/// The table of the nftables mode.
fn clean_up_nftables_mode(socket: &mut Socket, family: Family, action: Action, report: &mut Report) {
    let object = Object::Table { family };
    let mut exists = false;
    let read = socket.dump(&message(NFT_MSG_GETTABLE, family), |table: Attributes| {
        exists |= table.text(NFTA_TABLE_NAME).as_deref() == Some(NFT_TABLE);
    });
    if let Err(error) = read {
        let (reason, advice) = (error.to_string(), RETRY_ADVICE.to_owned());
        return report.problems.push(Error::CannotInspect { location: object.to_string(), reason, advice });
    }
    if !exists {
        return;
    }
    if action == Action::Remove {
        let request = message(NFT_MSG_DELTABLE, family).with_text(NFTA_TABLE_NAME, NFT_TABLE);
        let reason = match transaction(socket, None, vec![request]) {
            Ok(Ok(())) => None,
            // Another process has deleted it meanwhile.
            Ok(Err((_, refusal))) if refusal.errno == ENOENT => return,
            Ok(Err((_, refusal))) => Some(refusal.to_string()),
            Err(error) => Some(error.to_string()),
        };
        if let Some(reason) = reason {
            return report.problems.push(Error::CannotRemove {
                object: object.into(),
                reason,
                advice: RETRY_ADVICE.into(),
            });
        }
    }
    report.objects.push(object);
}

/// Removes kube-proxy's chains from a table of iptables-nft, in one transaction. A chain that something other than a
/// rule uses, such as a verdict map, is kept.
fn clean_up_table(
    socket: &mut Socket,
    iptables: Iptables,
    name: &str,
    action: Action,
    report: &mut Report,
) -> Result<(), Error> {
    let cannot_inspect = |error: &dyn std::fmt::Display| Error::CannotInspect {
        location: format!("table {name} of {iptables}"),
        reason: error.to_string(),
        advice: RETRY_ADVICE.into(),
    };
    let mut busy_chains: BTreeMap<String, Refusal> = BTreeMap::new();
    let mut attempts = 0;
    loop {
        // The kernel refuses the transaction if the generation has changed since the table was read.
        let generation = generation(socket).map_err(|error| cannot_inspect(&error))?;
        let table = read(socket, iptables, name).map_err(|error| cannot_inspect(&error))?;
        let plan = table.plan(&busy_chains.keys().cloned().collect::<BTreeSet<_>>());
        if action == Action::Find || plan.is_empty() {
            finish(&plan, &table, busy_chains, report);
            return Ok(());
        }
        let remain = |reason: String, advice: &str| Error::CannotRemoveChains {
            iptables,
            table: name.to_owned(),
            chains: plan.chains.iter().map(|&chain| chain.to_owned()).collect(),
            reason,
            advice: advice.to_owned(),
        };
        let (requests, deletions) = requests(&plan, iptables.family, name);
        let result = match transaction(socket, Some(generation), requests) {
            Ok(result) => result,
            Err(error) => return Err(remain(error.to_string(), RETRY_ADVICE)),
        };
        match result {
            Ok(()) => {
                finish(&plan, &table, busy_chains, report);
                return Ok(());
            }
            Err((_, refusal)) if refusal.errno == ERESTART => {
                attempts += 1;
                if attempts == ATTEMPTS {
                    let reason = "other processes keep changing nf_tables".to_owned();
                    return Err(remain(reason, "run it again when they are done"));
                }
            }
            Err((index, refusal)) => match deletions.get(&index) {
                Some(chain) if refusal.errno == EBUSY => {
                    busy_chains.insert((*chain).to_owned(), refusal);
                }
                _ => {
                    plan.report_kept(report);
                    return Err(remain(refusal.to_string(), RETRY_ADVICE));
                }
            },
        }
    }
}

fn finish(plan: &Plan<'_, u64>, table: &Table<u64>, busy_chains: BTreeMap<String, Refusal>, report: &mut Report) {
    plan.report(report);
    report.problems.extend(busy_chains.into_iter().map(|(chain, refusal)| Error::CannotRemove {
        advice: format!(
            "something other than a rule uses it: see `nft list table {} {}`",
            table.iptables.family, table.name
        ),
        object: table.chain(&chain).into(),
        reason: refusal.to_string(),
    }));
}

/// The requests that carry out a plan, and the index at which each chain is deleted. Rules come first, since a chain in
/// use cannot be deleted.
fn requests<'a>(plan: &Plan<'a, u64>, family: Family, table: &str) -> (Vec<Message>, BTreeMap<usize, &'a str>) {
    let of_chain = |chain: &str| {
        message(NFT_MSG_DELRULE, family).with_text(NFTA_RULE_TABLE, table).with_text(NFTA_RULE_CHAIN, chain)
    };
    let jumps = plan.jumps.iter().map(|jump| of_chain(&jump.chain).with(NFTA_RULE_HANDLE, &jump.rule.to_be_bytes()));
    // Without a handle, all rules of the chain are deleted.
    let flushes = plan.chains.iter().map(|chain| of_chain(chain));
    let mut requests: Vec<Message> = jumps.chain(flushes).collect();
    let mut deletions = BTreeMap::new();
    for chain in &plan.chains {
        deletions.insert(requests.len(), *chain);
        let request = message(NFT_MSG_DELCHAIN, family);
        requests.push(request.with_text(NFTA_CHAIN_TABLE, table).with_text(NFTA_CHAIN_NAME, chain));
    }
    (requests, deletions)
}

fn message(command: u8, family: Family) -> Message {
    Message::new(SUBSYSTEM, command, family.number())
}

/// The ruleset's generation ID, which changes with each transaction, as raw bytes.
fn generation(socket: &mut Socket) -> Result<Vec<u8>, NetlinkError> {
    let mut generation = None;
    socket.request(&Message::new(SUBSYSTEM, NFT_MSG_GETGEN, ANY_FAMILY).into(), |answer: Attributes| {
        generation = answer.value(NFTA_GEN_ID).map(<[u8]>::to_vec);
    })?;
    generation.ok_or_else(|| DecodeError::from("nf_tables has no generation").into())
}

/// The inner error is the first refusal, with the index of its request.
fn transaction(
    socket: &mut Socket,
    generation: Option<Vec<u8>>,
    requests: Vec<Message>,
) -> Result<Result<(), (usize, Refusal)>, NetlinkError> {
    let (mut begin, end) = Message::batch_begin_and_end(SUBSYSTEM);
    if let Some(generation) = generation {
        begin = begin.with(NFNL_BATCH_GENID, &generation);
    }
    socket.transaction(&begin, requests.into_iter().map(Request::from), &end)
}

/// Reads a table; one that does not exist is empty.
fn read(socket: &mut Socket, iptables: Iptables, name: &str) -> Result<Table<u64>, NetlinkError> {
    let mut table = Table { iptables, name: name.to_owned(), chains: BTreeSet::new(), jumps: Vec::new() };
    socket.dump(&message(NFT_MSG_GETCHAIN, iptables.family), |chain: Attributes| {
        if chain.text(NFTA_CHAIN_TABLE).as_deref() == Some(name) {
            table.chains.extend(chain.text(NFTA_CHAIN_NAME));
        }
    })?;
    // A foreign table may have very many rules, so they are only read if needed.
    if table.has_kubernetes_chains() {
        let request = message(NFT_MSG_GETRULE, iptables.family).with_text(NFTA_RULE_TABLE, name);
        socket.dump(&request, |Rule(rule)| {
            if let Some((_, jump)) = rule.filter(|(table, _)| table == name) {
                table.jumps.push(jump);
            }
        })?;
    }
    Ok(table)
}

/// A rule with its table, if it jumps to a chain of kube-proxy.
pub(crate) struct Rule(Option<(String, Jump<u64>)>);

impl NetlinkDeserializable for Rule {
    type Error = DecodeError;

    fn deserialize(_: &NetlinkHeader, payload: &[u8]) -> Result<Self, DecodeError> {
        Ok(Self(jump(nfnetlink::after_header(payload)?)))
    }
}

fn jump(rule: &[u8]) -> Option<(String, Jump<u64>)> {
    let expressions = nfnetlink::attribute(rule, NFTA_RULE_EXPRESSIONS)?;
    let target = nfnetlink::iter_attributes(expressions)
        .filter(|(kind, _)| *kind == NFTA_LIST_ELEM)
        .find_map(|(_, expression)| verdict_chain(expression))
        .filter(|target| kube_proxy_names::is_chain(target))?;
    let chain = nfnetlink::text(rule, NFTA_RULE_CHAIN)?;
    let handle = parse_u64_be(nfnetlink::attribute(rule, NFTA_RULE_HANDLE)?).ok()?;
    Some((nfnetlink::text(rule, NFTA_RULE_TABLE)?, Jump { chain, target, rule: handle }))
}

/// The target chain of an `immediate` expression: only the verdicts `NFT_JUMP` and `NFT_GOTO` have one.
fn verdict_chain(expression: &[u8]) -> Option<String> {
    if nfnetlink::text(expression, NFTA_EXPR_NAME)? != "immediate" {
        return None;
    }
    let path = [NFTA_EXPR_DATA, NFTA_IMMEDIATE_DATA, NFTA_DATA_VERDICT, NFTA_VERDICT_CHAIN];
    let chain = path.iter().try_fold(expression, |attributes, kind| nfnetlink::attribute(attributes, *kind))?;
    parse_string(chain).ok()
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use netlink_packet_core::NetlinkSerializable as _;

    use super::*;

    /// The attributes of a message, as the kernel would send them.
    fn attributes(message: &Message) -> Vec<u8> {
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        bytes.split_off(4)
    }

    fn nested(kind: u16, message: &Message) -> Message {
        message_of(&[(kind, &attributes(message))])
    }

    fn message_of(all: &[(u16, &[u8])]) -> Message {
        all.iter().fold(Message::new(0, 0, 0), |message, (kind, value)| message.with(*kind, value))
    }

    /// A rule of chain `OUTPUT`, of one expression with a verdict that has a chain.
    fn rule(expression: &str, chain: &str) -> Vec<u8> {
        let verdict = nested(NFTA_DATA_VERDICT, &Message::new(0, 0, 0).with_text(NFTA_VERDICT_CHAIN, chain));
        let data = attributes(&nested(NFTA_IMMEDIATE_DATA, &verdict));
        let name = [expression.as_bytes(), &[0]].concat();
        let expression = attributes(&message_of(&[(NFTA_EXPR_NAME, &name), (NFTA_EXPR_DATA, &data)]));
        let counter = attributes(&message_of(&[(NFTA_EXPR_NAME, b"counter\0"), (NFTA_EXPR_DATA, &[])]));
        let expressions = attributes(&message_of(&[(NFTA_LIST_ELEM, &counter), (NFTA_LIST_ELEM, &expression)]));
        attributes(&message_of(&[
            (NFTA_RULE_TABLE, b"nat\0"),
            (NFTA_RULE_CHAIN, b"OUTPUT\0"),
            (NFTA_RULE_HANDLE, &7_u64.to_be_bytes()),
            (NFTA_RULE_EXPRESSIONS, &expressions),
        ]))
    }

    #[test]
    fn the_target_of_a_rule_is_the_chain_of_its_verdict() {
        let expected = Jump { chain: "OUTPUT".into(), target: "KUBE-SERVICES".into(), rule: 7 };
        assert_eq!(jump(&rule("immediate", "KUBE-SERVICES")), Some(("nat".into(), expected)));
        assert_eq!(jump(&rule("immediate", "DOCKER")), None);
        assert_eq!(jump(&rule("lookup", "KUBE-SERVICES")), None);
    }

    #[test]
    fn a_truncated_rule_has_the_same_target_or_none() {
        let rule = rule("immediate", "KUBE-SERVICES");
        for length in 0..rule.len() {
            assert!(jump(&rule[..length]).is_none_or(|(_, jump)| jump.target == "KUBE-SERVICES"), "{length}");
        }
    }

    #[test]
    #[ignore = "needs a kernel with IPVS: cargo xtask test"]
    fn a_transaction_with_an_old_generation_is_refused() {
        lab::netns::isolate().unwrap();
        let nft = |command: &str| assert!(Command::new("nft").arg(command).status().unwrap().success(), "{command}");
        nft("add table ip kube-proxy");
        let mut socket = nfnetlink::open().unwrap().unwrap();
        let mut delete = |generation| {
            let request = message(NFT_MSG_DELTABLE, Family::Ip).with_text(NFTA_TABLE_NAME, NFT_TABLE);
            transaction(&mut socket, Some(generation), vec![request]).unwrap().map_err(|(_, refusal)| refusal.errno)
        };
        let generation = || generation(&mut nfnetlink::open().unwrap().unwrap()).unwrap();
        let before = generation();
        nft("add table ip mine");
        assert_eq!(delete(before), Err(ERESTART));
        assert_eq!(delete(generation()), Ok(()));
    }
}
