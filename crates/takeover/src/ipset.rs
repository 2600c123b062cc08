//! kube-proxy's ipsets, over netlink. Constants are those of `linux/netfilter/ipset/ip_set.h`.

use std::thread;
use std::time::{Duration, Instant};

use netlink_batch::{Error as NetlinkError, Refusal, Request, Socket};

use crate::Action;
use crate::errno::{EBUSY, ENOENT};
use crate::kube_proxy_names;
use crate::nfnetlink::{self, ANY_FAMILY, Attributes, Message};
use crate::report::{Error, Kept, Object, RETRY_ADVICE, Report};

/// `NFNL_SUBSYS_IPSET`.
const SUBSYSTEM: u8 = 6;

/// The oldest protocol version (`IPSET_PROTOCOL_MIN`), which every kernel supports.
const PROTOCOL: u8 = 6;

const IPSET_CMD_DESTROY: u8 = 3;
const IPSET_CMD_LIST: u8 = 7;
const IPSET_ATTR_PROTOCOL: u16 = 1;
const IPSET_ATTR_SETNAME: u16 = 2;
const IPSET_ATTR_FLAGS: u16 = 6;
const IPSET_FLAG_LIST_SETNAME: u32 = 1 << 1;

/// The flag for numbers in network byte order (`linux/netlink.h`).
const NLA_F_NET_BYTEORDER: u16 = 1 << 14;

// enum ipset_errno
const IPSET_ERR_PROTOCOL: i32 = 4097;
const IPSET_ERR_BUSY: i32 = 4100;
const IPSET_ERR_REFERENCED: i32 = 4108;

/// How long a busy set is retried: `nf_tables` releases the sets of a deleted rule asynchronously
/// (`nf_tables_trans_destroy_work`).
const BUSY_TIMEOUT: Duration = Duration::from_secs(2);
const RETRY_INTERVAL: Duration = Duration::from_millis(20);

pub(crate) fn clean_up(action: Action, report: &mut Report) {
    let cannot_inspect = |error: &NetlinkError| Error::CannotInspect {
        location: "the ipsets".into(),
        reason: error.refusal().map_or_else(|| error.to_string(), reason),
        advice: RETRY_ADVICE.into(),
    };
    let mut socket = match nfnetlink::open() {
        Ok(Some(socket)) => socket,
        Ok(None) => return,
        Err(error) => return report.problems.push(cannot_inspect(&error)),
    };
    let sets = match list(&mut socket) {
        Ok(sets) => sets,
        Err(error) if nfnetlink::is_missing(&error) => return,
        Err(error) => return report.problems.push(cannot_inspect(&error)),
    };
    match action {
        Action::Find => report.objects.extend(sets.into_iter().map(|name| Object::Set { name })),
        Action::Remove => destroy_all(&mut socket, sets, report),
    }
}

/// The names of kube-proxy's sets, sorted.
fn list(socket: &mut Socket) -> Result<Vec<String>, NetlinkError> {
    let mut sets = Vec::new();
    socket.dump(&list_request(), |set: Attributes| {
        sets.extend(set.text(IPSET_ATTR_SETNAME).filter(|name| kube_proxy_names::is_set(name)));
    })?;
    sets.sort();
    Ok(sets)
}

fn destroy_all(socket: &mut Socket, mut sets: Vec<String>, report: &mut Report) {
    let deadline = Instant::now() + BUSY_TIMEOUT;
    while !sets.is_empty() {
        let is_last = Instant::now() >= deadline;
        let results = match socket.batch(sets.iter().map(|name| Request::from(destroy_request(name)))) {
            Ok(results) => results,
            Err(error) => {
                let cannot_remove = |name| cannot_remove(name, error.to_string(), RETRY_ADVICE);
                return report.problems.extend(sets.into_iter().map(cannot_remove));
            }
        };
        let mut busy = Vec::new();
        for (name, result) in sets.into_iter().zip(results) {
            match result {
                Ok(()) => report.objects.push(Object::Set { name }),
                // Another process has destroyed it meanwhile.
                Err(refusal) if refusal.errno == ENOENT => {}
                Err(refusal) if is_busy(&refusal) && !is_last => busy.push(name),
                // Rules that are kept or cannot be inspected use it: a retry would not help.
                Err(refusal) if is_busy(&refusal) && (!report.unchecked.is_empty() || has_kept_rules(report)) => {
                    let reason = "a rule that is kept uses it, or one that cannot be inspected".to_owned();
                    report.kept.push(Kept { object: Object::Set { name }, reason });
                }
                Err(refusal) if is_busy(&refusal) => {
                    let advice = format!(
                        "find what uses it with `nft list ruleset`, `iptables-save`, `ip6tables-save` or `ipset list`, \
                         remove that, and run it again, or `ipset destroy {name}`"
                    );
                    report.problems.push(cannot_remove(name, reason(&refusal), &advice));
                }
                Err(refusal) => report.problems.push(cannot_remove(name, reason(&refusal), RETRY_ADVICE)),
            }
        }
        sets = busy;
        if !sets.is_empty() {
            thread::sleep(RETRY_INTERVAL);
        }
    }
}

/// Whether a chain of kube-proxy is kept, whose rules may use a set.
fn has_kept_rules(report: &Report) -> bool {
    report
        .kept
        .iter()
        .any(|kept| matches!(&kept.object, Object::Chain { chain, .. } if kube_proxy_names::is_chain(chain)))
}

fn cannot_remove(name: String, reason: String, advice: &str) -> Error {
    Error::CannotRemove { object: Object::Set { name }.into(), reason, advice: advice.to_owned() }
}

fn request(command: u8) -> Message {
    Message::new(SUBSYSTEM, command, ANY_FAMILY).with(IPSET_ATTR_PROTOCOL, &[PROTOCOL])
}

fn list_request() -> Message {
    request(IPSET_CMD_LIST).with(IPSET_ATTR_FLAGS | NLA_F_NET_BYTEORDER, &IPSET_FLAG_LIST_SETNAME.to_be_bytes())
}

fn destroy_request(name: &str) -> Message {
    request(IPSET_CMD_DESTROY).with_text(IPSET_ATTR_SETNAME, name)
}

fn is_busy(refusal: &Refusal) -> bool {
    matches!(refusal.errno, EBUSY | IPSET_ERR_BUSY | IPSET_ERR_REFERENCED)
}

/// ipset has its own error numbers, which `strerror` does not know.
fn reason(refusal: &Refusal) -> String {
    match refusal.errno {
        IPSET_ERR_PROTOCOL => "the kernel's ipset has another protocol version".into(),
        IPSET_ERR_BUSY => "a rule or another set uses it".into(),
        IPSET_ERR_REFERENCED => "it is a member of another set".into(),
        4096.. => format!("error {} of ipset", refusal.errno),
        _ => refusal.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use netlink_packet_core::{NetlinkDeserializable as _, NetlinkHeader, NetlinkSerializable};

    use super::*;

    fn bytes(message: &Message) -> Vec<u8> {
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        bytes
    }

    fn attribute(kind: u16, value: &[u8], padding: usize) -> Vec<u8> {
        let length = u16::try_from(4 + value.len()).unwrap();
        [&length.to_ne_bytes()[..], &kind.to_ne_bytes(), value, &vec![0; padding]].concat()
    }

    #[test]
    fn the_list_request_asks_for_names_only() {
        let message = list_request();
        assert_eq!(message.message_type(), 6 << 8 | 7);
        let expected = [vec![0; 4], attribute(1, &[6], 3), attribute(0x4006, &[0, 0, 0, 2], 0)].concat();
        assert_eq!(bytes(&message), expected);
    }

    #[test]
    fn a_destroy_request_always_has_a_name() {
        let message = destroy_request("KUBE-LOOP-BACK");
        assert_eq!(message.message_type(), 6 << 8 | 3);
        let expected = [vec![0; 4], attribute(1, &[6], 3), attribute(2, b"KUBE-LOOP-BACK\0", 1)].concat();
        assert_eq!(bytes(&message), expected);
    }

    #[test]
    fn the_name_in_a_reply_is_parsed() {
        let answer = [vec![2, 0, 0, 0], attribute(1, &[7], 3), attribute(2, b"KUBE-6-CLUSTER-IP\0", 2)].concat();
        let set = Attributes::deserialize(&NetlinkHeader::default(), &answer).unwrap();
        assert_eq!(set.text(IPSET_ATTR_SETNAME).as_deref(), Some("KUBE-6-CLUSTER-IP"));
    }

    #[test]
    fn ipset_errors_have_messages() {
        assert_eq!(reason(&Refusal::new(IPSET_ERR_BUSY)), "a rule or another set uses it");
        assert_eq!(reason(&Refusal::new(4099)), "error 4099 of ipset");
        assert_eq!(reason(&Refusal::new(1)), "Operation not permitted (os error 1)");
        assert!(is_busy(&Refusal::new(IPSET_ERR_BUSY)) && is_busy(&Refusal::new(EBUSY)) && !is_busy(&Refusal::new(1)));
    }
}
