//! Virtual and real servers for comparisons with ipvsadm: every value of every option, and every pair of most.

use ipvs_netlink::{
    Family, Forwarding, GueChecksum, Netmask, Persistence, Protocol, RealServer, Scheduler, SchedulerFlags as Flags,
    Tunnel, VirtualServer, VirtualServerId,
};

use super::real;

/// The greatest number that ipvsadm takes for weights and thresholds.
const GREATEST_INT: u32 = i32::MAX as u32;

/// Each virtual server with its real servers. What ipvsadm shows wrong is not among them: firewall marks from 2^31 on and
/// the third flag of `sh` and `mh`.
pub(crate) fn servers() -> Vec<(VirtualServer, Vec<RealServer>)> {
    let mut all: Vec<_> = virtual_servers().into_iter().map(|server| (server, Vec::new())).collect();
    for family in [Family::Ipv4, Family::Ipv6] {
        let of_mark = VirtualServerId::firewall_mark(GREATEST_INT, family).unwrap();
        for id in [address(Protocol::Tcp, family, 60_000, 80), of_mark] {
            all.push((VirtualServer::new(id, Scheduler::RoundRobin), real_servers(&id)));
        }
    }
    all
}

fn address(protocol: Protocol, family: Family, number: u16, port: u16) -> VirtualServerId {
    let [high, low] = number.to_be_bytes();
    let text = match family {
        Family::Ipv4 => format!("10.96.{high}.{low}:{port}"),
        Family::Ipv6 => format!("[fd00:96::{number:x}]:{port}"),
    };
    VirtualServerId::address(protocol, text.parse().unwrap())
}

/// The product of families, protocols, persistence and flags, with schedulers in turn; and everything by chance.
fn virtual_servers() -> Vec<VirtualServer> {
    let flags: Vec<Flags> = (0..8_u8)
        .map(|bits| {
            let of = |bit: u8, flag| if bits & bit == 0 { Flags::NONE } else { flag };
            of(1, Flags::FLAG_1).union(of(2, Flags::FLAG_2)).union(of(4, Flags::FLAG_3))
        })
        .collect();
    let mut choices = Vec::new();
    for family in 0..2 {
        for kind in 0..4 {
            for persistence in 0..6 {
                choices.extend((0..8).map(|flags| [family, kind, persistence, flags]));
            }
        }
    }
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    choices.extend((0..200).map(|_| [2, 4, 6, 8].map(|choices| random(&mut state) % choices)));
    let number_of = |index: usize| u16::try_from(index).unwrap() + 1;
    choices
        .into_iter()
        .enumerate()
        .map(|(index, [family, kind, persistence, flag])| {
            let family = [Family::Ipv4, Family::Ipv6][family];
            // In such steps every scheduler meets every family, protocol, persistence and flag.
            let scheduler = Scheduler::ALL[index * 17 / 3 % Scheduler::ALL.len()];
            let persistence = persistences(family)[persistence];
            let number = number_of(index);
            let port = if persistence.is_some() && index % 5 == 0 { 0 } else { 1 + number };
            let protocols = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp];
            let id = match protocols.get(kind) {
                Some(protocol) => address(*protocol, family, number, port),
                None => VirtualServerId::firewall_mark(number.into(), family).unwrap(),
            };
            let with_names = matches!(scheduler, Scheduler::SourceHashing | Scheduler::MaglevHashing);
            let flag = if with_names { flags[flag % 4] } else { flags[flag] };
            // ipvsadm has it for UDP and marks only.
            let one_packet = matches!(kind, 1 | 3) && index % 3 != 0;
            // With persistence and without.
            let engine = if index % 5 < 2 { "sip".parse().ok() } else { None };
            VirtualServer {
                scheduler_flags: flag,
                persistence,
                engine,
                one_packet,
                ..VirtualServer::new(id, scheduler)
            }
        })
        .collect()
}

fn persistences(family: Family) -> [Option<Persistence>; 6] {
    let masks = match family {
        Family::Ipv4 => [[255, 255, 255, 0], [128, 0, 0, 0], [0; 4]].map(|mask| Netmask::V4(mask.into())),
        Family::Ipv6 => [127, 64, 1].map(Netmask::V6),
    };
    let of = |timeout| Persistence::new(timeout, family);
    [
        None,
        Some(of(1)),
        Some(of(360)),
        Some(Persistence { netmask: masks[0], ..of(10_800) }),
        Some(Persistence { netmask: masks[1], ..of(2_678_400) }),
        Some(Persistence { netmask: masks[2], ..of(60) }),
    ]
}

/// The product of forwarding, families, weights and thresholds.
fn real_servers(id: &VirtualServerId) -> Vec<RealServer> {
    let gue = |port: u16, checksum| Forwarding::Tunnel(Tunnel::Gue { port: port.try_into().unwrap(), checksum });
    let gre = |checksum| Forwarding::Tunnel(Tunnel::Gre { checksum });
    let methods = [
        Forwarding::Masquerade,
        Forwarding::DirectRoute,
        Forwarding::Tunnel(Tunnel::IpIp),
        gue(1, GueChecksum::None),
        gue(6080, GueChecksum::Udp),
        gue(65_535, GueChecksum::Remote),
        gre(false),
        gre(true),
    ];
    let mut all = Vec::new();
    for forwarding in methods {
        for family in [Family::Ipv4, Family::Ipv6] {
            if family != id.family() && !matches!(forwarding, Forwarding::Tunnel(_)) {
                continue;
            }
            for weight in [0, 1, 65_535, GREATEST_INT] {
                for (upper_threshold, lower_threshold) in [(0, 0), (1, 0), (100, 50), (GREATEST_INT, GREATEST_INT)] {
                    let number = all.len() + 1;
                    let host = match family {
                        Family::Ipv4 => format!("10.1.{}.{}", number / 256, number % 256),
                        Family::Ipv6 => format!("[fd00:1::{number:x}]"),
                    };
                    // Masquerading leads to any port; by the others ipvsadm takes that of the virtual server.
                    let port = match id {
                        _ if forwarding == Forwarding::Masquerade => 8000 + number,
                        VirtualServerId::Address { port, .. } => usize::from(*port),
                        VirtualServerId::FirewallMark { .. } => number % 2,
                    };
                    let server = real(&format!("{host}:{port}"));
                    all.push(RealServer { forwarding, weight, upper_threshold, lower_threshold, ..server });
                }
            }
        }
    }
    all
}

/// Marsaglia's xorshift: the same every time.
pub(crate) fn random(state: &mut u64) -> usize {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    usize::try_from(*state >> 33).unwrap_or_default()
}
