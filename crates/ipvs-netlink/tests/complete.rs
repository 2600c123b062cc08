//! Lists that are read while other clients add and delete: none lacks what was there all the time.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use common::{client, round_robin, tcp};
use ipvs_netlink::{AsyncClient, Client, Message, Protocol, RealServer, VirtualServerId};

const STABLE: u32 = 500;
const WRITERS: u32 = 4;
const READINGS: usize = 10;

fn numbered(number: u32) -> VirtualServerId {
    VirtualServerId::address(Protocol::Tcp, SocketAddr::from((Ipv4Addr::from(0x0a60_0000 + number), 80)))
}

fn add(number: u32) -> Message {
    Message::AddVirtualServer(round_robin(numbered(number)))
}

fn real_address(number: u32) -> SocketAddr {
    SocketAddr::from((Ipv4Addr::from(0x0a01_0000 + number), 80))
}

fn all_succeed(client: &mut Client, messages: &[Message]) {
    assert!(client.apply(messages).unwrap().iter().all(Result::is_ok));
}

/// Ends the writers, also when the reader panics.
struct Done<'a>(&'a AtomicBool);

impl Drop for Done<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Reads while others carry out messages again and again, each client its own.
fn read_while_others_write(messages: impl Fn(u32) -> Vec<Vec<Message>>, read: impl FnOnce()) {
    let is_done = AtomicBool::new(false);
    thread::scope(|scope| {
        for writer in 0..WRITERS {
            let (messages, is_done) = (messages(writer), &is_done);
            scope.spawn(move || {
                let mut client = Client::connect().unwrap();
                while !is_done.load(Ordering::Relaxed) {
                    for messages in &messages {
                        all_succeed(&mut client, messages);
                    }
                }
            });
        }
        let _done = Done(&is_done);
        read();
    });
}

/// What writers add and delete: 100 virtual servers each, one by one.
fn come_and_go(writer: u32) -> Vec<Vec<Message>> {
    let numbers = || (0..100).map(move |number| 100_000 + writer * 1000 + number);
    let delete = |number| vec![Message::DeleteVirtualServer(numbered(number))];
    numbers().map(|number| vec![add(number)]).chain(numbers().map(delete)).collect()
}

fn assert_complete(listed: impl Iterator<Item = VirtualServerId>, what: &str) {
    let listed: Vec<_> = listed.collect();
    let unique: BTreeSet<_> = listed.iter().copied().collect();
    assert_eq!(unique.len(), listed.len(), "{what}: some twice");
    let missing = (0..STABLE).filter(|number| !unique.contains(&numbered(*number))).count();
    assert_eq!(missing, 0, "{what}: missing of {STABLE}");
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn lists_lack_no_stable_virtual_server_while_others_write() {
    let mut client = client();
    // Here the kernel may resize its table.
    let _ = std::fs::write("/proc/sys/net/ipv4/vs/svc_lfactor", "0");
    all_succeed(&mut client, &(0..STABLE).map(add).collect::<Vec<_>>());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let mut lacking = 0;
    read_while_others_write(come_and_go, || {
        let mut async_client = runtime.block_on(AsyncClient::connect()).unwrap();
        for reading in 0..READINGS {
            let listed = client.virtual_servers().unwrap();
            let listed: BTreeSet<_> = listed.iter().map(|entry| entry.server.id).collect();
            lacking += usize::from((0..STABLE).any(|number| !listed.contains(&numbered(number))));
            assert_complete(client.all_virtual_servers().unwrap().iter().map(|entry| entry.server.id), "list");
            let listed = runtime.block_on(async_client.all_virtual_servers()).unwrap();
            assert_complete(listed.iter().map(|entry| entry.server.id), "async list");
            if reading % 5 == 0 {
                assert_complete(client.table().unwrap().iter().map(|(server, _)| server.id), "table");
                let table = runtime.block_on(async_client.table()).unwrap();
                assert_complete(table.iter().map(|(server, _)| server.id), "async table");
            }
        }
    });
    println!("{lacking} of {READINGS} plain lists lacked some");
}

/// Each reading begins while the kernel resizes its table for what was just added.
#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn lists_lack_nothing_while_the_kernel_resizes_its_table() {
    let mut client = client();
    let _ = std::fs::write("/proc/sys/net/ipv4/vs/svc_lfactor", "0");
    for _ in 0..3 {
        all_succeed(&mut client, &(0..STABLE).map(add).collect::<Vec<_>>());
        for _ in 0..3 {
            assert_complete(client.all_virtual_servers().unwrap().iter().map(|entry| entry.server.id), "list");
        }
        assert_complete(client.table().unwrap().iter().map(|(server, _)| server.id), "table");
        client.flush().unwrap();
    }
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn lists_lack_no_stable_real_server_while_others_write() {
    let mut client = client();
    let web = tcp("10.96.0.1:80");
    let add = |number| Message::AddRealServer(web, RealServer::new(real_address(number)));
    client.add_virtual_server(&round_robin(web)).unwrap();
    all_succeed(&mut client, &(0..300).map(add).collect::<Vec<_>>());
    let come_and_go = |writer: u32| {
        let numbers = || (0..20).map(move |number| 10_000 + writer * 100 + number);
        let delete = |number| vec![Message::DeleteRealServer(web, real_address(number))];
        numbers().map(|number| vec![add(number)]).chain(numbers().map(delete)).collect()
    };
    read_while_others_write(come_and_go, || {
        for _ in 0..READINGS {
            let listed = client.all_real_servers(&web).unwrap();
            let unique: BTreeSet<_> = listed.iter().map(|entry| entry.server.socket_address()).collect();
            assert_eq!(unique.len(), listed.len());
            assert_eq!((0..300).filter(|number| !unique.contains(&real_address(*number))).count(), 0);
        }
    });
    let listed = client.all_real_servers(&web).unwrap();
    let unique: BTreeSet<_> = listed.iter().map(|entry| entry.server.socket_address()).collect();
    assert!((0..300).all(|number| unique.contains(&real_address(number))));
    assert_eq!(listed, client.real_servers(&web).unwrap());
    assert_eq!(client.all_real_servers(&tcp("10.96.0.2:80")).unwrap(), []);
}
