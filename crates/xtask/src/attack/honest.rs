//! Honest changes, and how long until the kernel has them; and the question kubelet asks all along.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::{PoisonError, RwLock};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use fastrand::Rng;
use ipvs_netlink::{Client, Protocol, VirtualServerId};
use lab::http::{self, HEALTH};
use lab::objects::{self, State, port, with};
use serde_json::{Value, json};
use test_apiserver::Server;

use super::record::Recorder;
use crate::workload::cluster::{self, VICTIMS, victim_vip};

/// What takes longer is given up, and is a failure long before.
const TIMEOUT: Duration = Duration::from_secs(60);
/// What takes longer is given up, and is a failure before.
const PROBE_TIMEOUT: Duration = Duration::from_secs(60);
const PROBE_INTERVAL: Duration = Duration::from_secs(1);
/// The VIP of a Service that comes and goes.
const COMING_VIP: &str = "10.98.1.1";

/// Held by everybody who needs an agent that runs, and by whoever restarts it.
#[derive(Debug, Default)]
pub(crate) struct Running(RwLock<()>);

impl Running {
    pub(crate) fn while_it_runs<T>(&self, action: impl FnOnce() -> T) -> T {
        let _guard = self.0.read().unwrap_or_else(PoisonError::into_inner);
        action()
    }

    pub(crate) fn while_it_restarts<T>(&self, action: impl FnOnce() -> T) -> T {
        let _guard = self.0.write().unwrap_or_else(PoisonError::into_inner);
        action()
    }
}

/// Changes endpoints, makes and deletes Services until it is over, each when the kernel has the one before.
pub(crate) fn change(
    server: &Server,
    seed: u64,
    recorder: &Recorder,
    running: &Running,
    is_over: impl Fn() -> bool,
) -> Result<()> {
    let mut rng = Rng::with_seed(seed.wrapping_add(3));
    let mut ipvs = Client::connect()?;
    let mut number = 0_u8;
    while !is_over() {
        number = number.wrapping_add(1);
        let endpoint = Ipv4Addr::new(10, 245, 1, number);
        running.while_it_runs(|| {
            let victim = rng.usize(..VICTIMS);
            server.apply(slice(&format!("victim-{victim}"), endpoint));
            wait(&mut ipvs, "an endpoint changed", &victim_vip(victim), &[endpoint], recorder)
        })?;
        if number.is_multiple_of(4) {
            running.while_it_runs(|| {
                server.apply(slice("coming", endpoint));
                server.apply(cluster::service("coming", COMING_VIP, &json!({})));
                wait(&mut ipvs, "a Service made", COMING_VIP, &[endpoint], recorder)?;
                server.delete("Service", "honest", "coming");
                server.delete("EndpointSlice", "honest", "coming-1");
                wait(&mut ipvs, "a Service deleted", COMING_VIP, &[], recorder)
            })?;
        }
        thread::sleep(Duration::from_millis(rng.u64(200..800)));
    }
    Ok(())
}

/// A slice of one endpoint that nobody asks.
fn slice(service: &str, endpoint: Ipv4Addr) -> Value {
    let ports = [port("a", "TCP", 8080)];
    let slice = objects::slice(&format!("{service}-1"), service, &ports, &[objects::endpoint(&endpoint, State::Ready)]);
    with(slice, json!({"metadata": {"namespace": "honest"}}))
}

/// Waits until a VIP has these real servers and no others.
fn wait(ipvs: &mut Client, kind: &str, vip: &str, expected: &[Ipv4Addr], recorder: &Recorder) -> Result<()> {
    let start = Instant::now();
    let front_end = SocketAddr::new(vip.parse().context("this is no address")?, 80);
    let id = VirtualServerId::address(Protocol::Tcp, front_end);
    loop {
        // A virtual server that does not exist is an error. Real servers that drain have no weight.
        let servers = ipvs.real_servers(&id).unwrap_or_default();
        let servers = servers.iter().filter(|it| it.server.weight > 0).map(|it| it.server.socket_address().ip());
        if servers.eq(expected.iter().copied().map(IpAddr::V4)) {
            recorder.changed(kind, start);
            return Ok(());
        }
        if start.elapsed() > TIMEOUT {
            recorder.changed(kind, start);
            recorder.broken(&format!("{kind}: the kernel does not have it after {} s", TIMEOUT.as_secs()));
            return Ok(());
        }
        thread::sleep(Duration::from_millis(10));
    }
}

/// Asks for /livez until it is over.
pub(crate) fn probe(recorder: &Recorder, running: &Running, is_over: impl Fn() -> bool) {
    while !is_over() {
        running.while_it_runs(|| {
            let start = Instant::now();
            match http::get_within(HEALTH, "/livez", PROBE_TIMEOUT) {
                Ok(answer) if answer.status == 200 => {
                    let took = recorder.elapsed(start);
                    recorder.lock().probes.add(took);
                }
                Ok(answer) => recorder.probe_failed(&format!("/livez is {}: {}", answer.status, answer.body)),
                Err(error) => recorder.probe_failed(&format!("/livez does not answer: {error}")),
            }
        });
        thread::sleep(PROBE_INTERVAL);
    }
}
