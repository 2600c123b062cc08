//! Packets on a real kernel: they go where Services say, and nowhere else, and they go on doing so while things change.
//! (What a node does with each kind of traffic, compared with kube-proxy cell by cell, is in `cargo xtask dataplane`.)

#![expect(clippy::panic, clippy::unwrap_used, reason = "a test that cannot go on fails")]

#[path = "../common/mod.rs"]
mod common;
#[path = "../../crates/takeover/tests/kube_proxy/mod.rs"]
mod kube_proxy;
mod network;
mod objects;
mod traffic;

mod cold_start;
mod default_route;
mod draining;
mod foreign_rules;
mod host_network;
mod hostile;
mod no_exec;
mod over_time;
mod policies;
mod refused;
mod rolling;
mod ruleset;
mod source_ranges;
mod takeover;
mod together;
mod udp;
mod vip_binding;

use std::sync::atomic::{AtomicBool, Ordering};

use common::{Agent, Manifests};
use network::CLUSTER_CIDR;

/// What every agent here is told: limits of connection tracking belong to the host.
const FLAGS: [&str; 1] = ["--conntrack-max-per-core=0"];

/// Starts an agent and waits until it has programmed everything.
fn serving(manifests: &Manifests, flags: &[&str]) -> Agent {
    let mut agent = manifests.agent(&[&FLAGS[..], flags].concat());
    agent.says("audited");
    agent
}

/// Starts one more agent for one look: everything is as it should be.
fn finds_nothing_to_change(manifests: &Manifests) {
    let mut agent = manifests.agent(&[&FLAGS[..], &[CLUSTER_CIDR, "--once"]].concat());
    assert!(agent.ends().success(), "{}", agent.log());
    assert!(agent.log().contains("audited, nothing to change"), "{}", agent.log());
}

/// Tells threads that it is over when it goes away, also when a test fails in the middle.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
