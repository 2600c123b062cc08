//! From one configuration to another.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use ipvs_netlink::{
    Change, Family, Forwarding, Message, Persistence, Protocol, RealServer, Scheduler, SchedulerFlags, Table, Tunnel,
    VirtualServer, VirtualServerId,
};
use proptest::collection::{btree_map, vec};
use proptest::option;
use proptest::prelude::*;
use proptest::sample::select;

/// Few of each, so that configurations have some in common.
fn any_real() -> impl Strategy<Value = RealServer> {
    (1_u8..6, select(vec![80, 81]), 1_u32..3).prop_map(|(host, port, weight)| RealServer {
        weight,
        ..RealServer::new(SocketAddr::from(([10, 1, 0, host], port)))
    })
}

fn any_table() -> impl Strategy<Value = Table> {
    let scheduler = select(vec![Scheduler::RoundRobin, Scheduler::SourceHashing]);
    let flags = select(vec![SchedulerFlags::NONE, SchedulerFlags::SH_PORT]);
    let others = (option::of(1_u32..3), any::<bool>(), any::<bool>());
    btree_map(1_u8..6, (scheduler, flags, others, vec(any_real(), 0..6)), 0..5).prop_map(|servers| {
        servers
            .into_iter()
            .map(|(host, (scheduler, scheduler_flags, (timeout, has_engine, one_packet), real))| {
                let id = VirtualServerId::address(Protocol::Tcp, SocketAddr::from(([10, 96, 0, host], 80)));
                let server = VirtualServer {
                    scheduler_flags,
                    persistence: timeout.map(|timeout| Persistence::new(timeout, Family::Ipv4)),
                    engine: if has_engine { "sip".parse().ok() } else { None },
                    one_packet,
                    ..VirtualServer::new(id, scheduler)
                };
                (server, real)
            })
            .collect()
    })
}

type Plain = BTreeMap<VirtualServerId, (VirtualServer, BTreeMap<SocketAddr, RealServer>)>;

fn plain(table: &Table) -> Plain {
    table
        .iter()
        .map(|(server, real)| (server.id, (*server, real.map(|real| (real.socket_address(), *real)).collect())))
        .collect()
}

/// Carries out a message as a kernel would; `None` where it would refuse.
fn apply(state: &mut Plain, message: Message) -> Option<()> {
    match message {
        Message::AddVirtualServer(server) => state.insert(server.id, (server, BTreeMap::new())).is_none().then_some(()),
        Message::SetVirtualServer(server) => state.get_mut(&server.id).map(|held| held.0 = server),
        Message::DeleteVirtualServer(id) => state.remove(&id).map(drop),
        Message::AddRealServer(id, real) => {
            state.get_mut(&id)?.1.insert(real.socket_address(), real).is_none().then_some(())
        }
        Message::SetRealServer(id, real) => state.get_mut(&id)?.1.insert(real.socket_address(), real).map(drop),
        Message::DeleteRealServer(id, address) => state.get_mut(&id)?.1.remove(&address).map(drop),
        _ => None,
    }
}

fn object(message: &Message) -> String {
    match message {
        Message::AddVirtualServer(server) | Message::SetVirtualServer(server) => server.id.to_string(),
        Message::DeleteVirtualServer(id) => id.to_string(),
        Message::AddRealServer(id, real) | Message::SetRealServer(id, real) => {
            format!("{id} {}", real.socket_address())
        }
        Message::DeleteRealServer(id, address) => format!("{id} {address}"),
        other => format!("{other:?}"),
    }
}

proptest! {
    #[test]
    fn changes_lead_to_what_is_wanted_and_touch_each_object_once(held in any_table(), wanted in any_table()) {
        let mut state = plain(&held);
        let changes = held.changes_to(&wanted);
        for message in &changes {
            prop_assert!(apply(&mut state, *message).is_some(), "refused: {message:?}");
        }
        prop_assert_eq!(&state, &plain(&wanted));
        let objects: BTreeSet<String> = changes.iter().map(object).collect();
        prop_assert_eq!(objects.len(), changes.len());
    }

    #[test]
    fn what_is_as_wanted_needs_no_changes(table in any_table()) {
        prop_assert_eq!(table.changes_to(&table), []);
        let everything = table.iter().map(|(_, real)| 1 + real.count()).sum::<usize>();
        prop_assert_eq!(Table::default().changes_to(&table).len(), everything);
    }

    #[test]
    fn no_virtual_server_loses_all_real_servers_on_the_way(held in any_table(), wanted in any_table()) {
        let mut state = plain(&held);
        let (before, after) = (plain(&held), plain(&wanted));
        for message in held.changes_to(&wanted) {
            apply(&mut state, message);
            for (id, (_, real)) in &state {
                let had = before.get(id).is_some_and(|(_, real)| !real.is_empty());
                let will = after.get(id).is_some_and(|(_, real)| !real.is_empty());
                prop_assert!(!(had && will && real.is_empty()), "{id} has none after {message:?}");
            }
        }
    }
}

proptest! {
    #[test]
    fn surplus_virtual_servers_go_last(held in any_table(), wanted in any_table()) {
        let changes = held.changes_to(&wanted);
        let is_deletion = |message: &Message| matches!(message, Message::DeleteVirtualServer(_));
        prop_assert!(changes.is_sorted_by_key(is_deletion), "{changes:?}");
    }
}

/// What is written alike is the same to the kernel, which lists it in one form.
#[test]
fn what_is_written_alike_needs_no_change() {
    let id = |protocol| VirtualServerId::address(protocol, SocketAddr::from(([10, 96, 0, 1], 80)));
    let real = |forwarding| RealServer { forwarding, ..RealServer::new(SocketAddr::from(([10, 1, 0, 1], 80))) };
    let other = Tunnel::Other { kind: 0, port: 0, flags: 0 };
    let round_robin = VirtualServer::new(id(Protocol::Tcp), Scheduler::RoundRobin);
    let by_number = VirtualServer::new(id(Protocol::Other(6)), Scheduler::RoundRobin);
    for (held, wanted) in
        [(Forwarding::Masquerade, Forwarding::Other(8)), (Forwarding::Tunnel(Tunnel::IpIp), Forwarding::Tunnel(other))]
    {
        let held = Table::from_iter([(round_robin, vec![real(held)])]);
        let wanted = Table::from_iter([(by_number, vec![real(wanted)])]);
        assert_eq!(held.changes_to(&wanted), []);
    }
    assert_ne!(Protocol::Other(7), Protocol::Tcp);
    assert_ne!(Forwarding::Tunnel(Tunnel::IpIp), Forwarding::Tunnel(Tunnel::Gre { checksum: false }));
    assert_ne!(Forwarding::Other(5), Forwarding::Other(6));
}

#[test]
fn each_real_server_is_added_set_or_surplus() {
    let real = |host: u8, weight| RealServer { weight, ..RealServer::new(SocketAddr::from(([10, 1, 0, host], 80))) };
    let changes =
        Change::between([real(1, 1), real(2, 1), real(4, 1)], [real(2, 5), real(3, 1), real(4, 1), real(9, 1)]);
    assert_eq!(
        changes.collect::<Vec<_>>(),
        [Change::Surplus(real(1, 1)), Change::Set(real(2, 5)), Change::Add(real(3, 1)), Change::Add(real(9, 1))]
    );
}
