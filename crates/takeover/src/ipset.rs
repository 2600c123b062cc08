//! kube-proxy's ipsets, over netlink. Constants are those of `linux/netfilter/ipset/ip_set.h`.

use std::thread;
use std::time::{Duration, Instant};

use netlink_batch::{Error as NetlinkError, Refusal, Request, Socket};

use crate::Mode;
use crate::names;
use crate::nfnetlink::{self, ANY_FAMILY, Attributes, EBUSY, ENOENT, Message};
use crate::report::{AGAIN, Error, Left, Object, Report};

/// `NFNL_SUBSYS_IPSET`.
const SUBSYSTEM: u8 = 6;

/// The oldest version of the protocol that kernels speak (`IPSET_PROTOCOL_MIN`): they all know it.
const PROTOCOL: u8 = 6;

const IPSET_CMD_DESTROY: u8 = 3;
const IPSET_CMD_LIST: u8 = 7;
const IPSET_ATTR_PROTOCOL: u16 = 1;
const IPSET_ATTR_SETNAME: u16 = 2;
const IPSET_ATTR_FLAGS: u16 = 6;
const IPSET_FLAG_LIST_SETNAME: u32 = 1 << 1;

/// Marks a number as one in network byte order (`linux/netlink.h`).
const NLA_F_NET_BYTEORDER: u16 = 1 << 14;

// enum ipset_errno
const IPSET_ERR_PROTOCOL: i32 = 4097;
const IPSET_ERR_BUSY: i32 = 4100;
const IPSET_ERR_REFERENCED: i32 = 4108;

/// `nf_tables` lets go of a deleted rule's sets a moment after it is gone (`nf_tables_trans_destroy_work`).
const PATIENCE: Duration = Duration::from_secs(2);
const PAUSE: Duration = Duration::from_millis(20);

pub(crate) fn clear(mode: Mode, report: &mut Report) {
    let unread = |error: &NetlinkError| Error::Unread {
        place: "the ipsets".into(),
        reason: error.refusal().map_or_else(|| error.to_string(), reason),
        advice: AGAIN.into(),
    };
    let mut socket = match nfnetlink::open() {
        Ok(Some(socket)) => socket,
        Ok(None) => return,
        Err(error) => return report.problems.push(unread(&error)),
    };
    let sets = match list(&mut socket) {
        Ok(sets) => sets,
        Err(error) if nfnetlink::is_missing(&error) => return,
        Err(error) => return report.problems.push(unread(&error)),
    };
    match mode {
        Mode::Find => report.objects.extend(sets.into_iter().map(|name| Object::Set { name })),
        Mode::Remove => destroy_all(&mut socket, sets, report),
    }
}

/// The names of kube-proxy's sets, sorted.
fn list(socket: &mut Socket) -> Result<Vec<String>, NetlinkError> {
    let mut sets = Vec::new();
    socket.dump(&list_request(), |set: Attributes| {
        sets.extend(set.text(IPSET_ATTR_SETNAME).filter(|name| names::is_set(name)));
    })?;
    sets.sort();
    Ok(sets)
}

fn destroy_all(socket: &mut Socket, mut sets: Vec<String>, report: &mut Report) {
    let deadline = Instant::now() + PATIENCE;
    while !sets.is_empty() {
        let is_last = Instant::now() >= deadline;
        let results = match socket.batch(sets.iter().map(|name| Request::from(destroy_request(name)))) {
            Ok(results) => results,
            Err(error) => {
                let remains = |name| remains(name, error.to_string(), AGAIN);
                return report.problems.extend(sets.into_iter().map(remains));
            }
        };
        let mut busy = Vec::new();
        for (name, result) in sets.into_iter().zip(results) {
            match result {
                Ok(()) => report.objects.push(Object::Set { name }),
                // Somebody was faster.
                Err(refusal) if refusal.errno == ENOENT => {}
                Err(refusal) if is_busy(&refusal) && !is_last => busy.push(name),
                // By rules that stay, or by some that cannot be seen: the same answer is to be expected the next time.
                Err(refusal) if is_busy(&refusal) && (!report.unseen.is_empty() || has_kept_rules(report)) => {
                    let reason = "a rule that stays uses it, or one that cannot be seen from here".to_owned();
                    report.left.push(Left { object: Object::Set { name }, reason });
                }
                Err(refusal) if is_busy(&refusal) => {
                    let advice = format!(
                        "find what uses it with `nft list ruleset`, `iptables-save`, `ip6tables-save` or `ipset list`, \
                         remove that, and run it again, or `ipset destroy {name}`"
                    );
                    report.problems.push(remains(name, reason(&refusal), &advice));
                }
                Err(refusal) => report.problems.push(remains(name, reason(&refusal), AGAIN)),
            }
        }
        sets = busy;
        if !sets.is_empty() {
            thread::sleep(PAUSE);
        }
    }
}

/// Whether a chain of kube-proxy's stays, which may look something up in a set.
fn has_kept_rules(report: &Report) -> bool {
    report.left.iter().any(|left| matches!(&left.object, Object::Chain { chain, .. } if names::is_chain(chain)))
}

fn remains(name: String, reason: String, advice: &str) -> Error {
    Error::Remains { object: Object::Set { name }.into(), reason, advice: advice.to_owned() }
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

/// ipset has errors of its own, which the system has no words for.
fn reason(refusal: &Refusal) -> String {
    match refusal.errno {
        IPSET_ERR_PROTOCOL => "the kernel's ipset speaks another version of the protocol".into(),
        IPSET_ERR_BUSY => "a rule or another set uses it".into(),
        IPSET_ERR_REFERENCED => "another set has it as a member".into(),
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
    fn a_list_of_names_alone_is_asked_for() {
        let message = list_request();
        assert_eq!(message.message_type(), 6 << 8 | 7);
        let expected = [vec![0; 4], attribute(1, &[6], 3), attribute(0x4006, &[0, 0, 0, 2], 0)].concat();
        assert_eq!(bytes(&message), expected);
    }

    #[test]
    fn a_set_is_destroyed_by_name_and_never_all_sets() {
        let message = destroy_request("KUBE-LOOP-BACK");
        assert_eq!(message.message_type(), 6 << 8 | 3);
        let expected = [vec![0; 4], attribute(1, &[6], 3), attribute(2, b"KUBE-LOOP-BACK\0", 1)].concat();
        assert_eq!(bytes(&message), expected);
    }

    #[test]
    fn the_name_in_an_answer_is_understood() {
        let answer = [vec![2, 0, 0, 0], attribute(1, &[7], 3), attribute(2, b"KUBE-6-CLUSTER-IP\0", 2)].concat();
        let set = Attributes::deserialize(&NetlinkHeader::default(), &answer).unwrap();
        assert_eq!(set.text(IPSET_ATTR_SETNAME).as_deref(), Some("KUBE-6-CLUSTER-IP"));
    }

    #[test]
    fn errors_of_ipset_have_words() {
        assert_eq!(reason(&Refusal::new(IPSET_ERR_BUSY)), "a rule or another set uses it");
        assert_eq!(reason(&Refusal::new(4099)), "error 4099 of ipset");
        assert_eq!(reason(&Refusal::new(1)), "Operation not permitted (os error 1)");
        assert!(is_busy(&Refusal::new(IPSET_ERR_BUSY)) && is_busy(&Refusal::new(EBUSY)) && !is_busy(&Refusal::new(1)));
    }
}
