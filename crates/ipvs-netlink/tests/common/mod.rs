//! What the tests in the lab share.

#![allow(
    dead_code,
    clippy::allow_attributes,
    clippy::unwrap_used,
    reason = "helpers of tests, of which every test file uses a part"
)]

pub(crate) mod servers;

use std::io::Write;
use std::net::SocketAddr;
use std::ops::{Deref, DerefMut};
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};

use ipvs_netlink::{Client, Protocol, RealServer, Scheduler, VirtualServer, VirtualServerId};
use lab::link;

/// A client whose kernel nobody else in this process talks to: the kernel lists virtual servers from one table for all
/// network namespaces, and loses its place when those of another namespace come or go.
pub(crate) struct ExclusiveClient {
    client: Client,
    _lock: MutexGuard<'static, ()>,
}

impl Deref for ExclusiveClient {
    type Target = Client;

    fn deref(&self) -> &Client {
        &self.client
    }
}

impl DerefMut for ExclusiveClient {
    fn deref_mut(&mut self) -> &mut Client {
        &mut self.client
    }
}

impl Drop for ExclusiveClient {
    fn drop(&mut self) {
        // Or the kernel would do it at some later time, when it takes the namespace away.
        let _ = self.client.flush();
    }
}

/// A client in a network namespace of its own, the calling thread's from now on.
pub(crate) fn client() -> ExclusiveClient {
    static LOCK: Mutex<()> = Mutex::new(());
    let lock = LOCK.lock().unwrap_or_else(PoisonError::into_inner);
    lab::netns::isolate().unwrap();
    // Since Linux 7.2 the kernel resizes its table of virtual servers in the background, and a list that is read meanwhile can
    // lack some (docs/kernels.md). This many servers a bucket, 2^8, make it resize for none of the tests here.
    let _ = std::fs::write("/proc/sys/net/ipv4/vs/svc_lfactor", "8");
    ExclusiveClient { client: Client::connect().unwrap(), _lock: lock }
}

/// Runs a command, its words separated by white space, and returns its output.
pub(crate) fn run(command: &str) -> String {
    run_with_input(command, "")
}

/// An example of this crate, which cargo builds with the tests.
pub(crate) fn example(name: &str) -> String {
    let test = std::env::current_exe().unwrap();
    let target = test.ancestors().nth(2).unwrap();
    target.join("examples").join(name).to_str().unwrap().to_owned()
}

pub(crate) fn run_with_input(command: &str, input: &str) -> String {
    let mut words = command.split_whitespace();
    let mut process = Command::new(words.next().unwrap());
    process.args(words).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = process.spawn().expect(command);
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    // ipvsadm -R goes on after a line it does not understand, and succeeds.
    assert!(output.status.success() && output.stderr.is_empty(), "{command}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

pub(crate) fn tcp(address: &str) -> VirtualServerId {
    VirtualServerId::address(Protocol::Tcp, address.parse().unwrap())
}

pub(crate) fn round_robin(id: VirtualServerId) -> VirtualServer {
    VirtualServer::new(id, Scheduler::RoundRobin)
}

pub(crate) fn real(address: &str) -> RealServer {
    RealServer::new(address.parse().unwrap())
}

/// A network with a virtual server that leads to a process of this very thread.
pub(crate) fn local_service(
    client: &mut Client,
    protocol: Protocol,
    virtual_ip: &str,
    real_ip: &str,
) -> VirtualServerId {
    for ip in [virtual_ip, real_ip] {
        link::add_address("lo", ip).unwrap();
    }
    let id = VirtualServerId::address(protocol, SocketAddr::new(virtual_ip.parse().unwrap(), 80));
    client.add_virtual_server(&round_robin(id)).unwrap();
    client.add_real_server(&id, &RealServer::new(SocketAddr::new(real_ip.parse().unwrap(), 8080))).unwrap();
    id
}
