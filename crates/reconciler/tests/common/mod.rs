//! Services, slices and a reconciler on a model of the kernel, in few words.

#![allow(
    dead_code,
    unreachable_pub,
    clippy::allow_attributes,
    clippy::panic,
    clippy::unwrap_used,
    reason = "helpers of tests, of which every test file uses a part"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU16;
use std::time::{Duration, Instant};

use reconciler::fake::{FakeKernel, FakeServer};
use reconciler::front_end::FrontEnd;
use reconciler::report::SyncReport;
use reconciler::{Policy, Reconciler};
use service_watch::{
    Change, Endpoint, EndpointSlice, Hints, ObjectName, Protocol, Service, ServiceKind, ServicePort, SlicePort,
    TrafficPolicy,
};

/// The own node.
pub const NODE: &str = "node-a";

pub fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

pub fn ips(texts: &[&str]) -> BTreeSet<IpAddr> {
    texts.iter().map(|text| ip(text)).collect()
}

pub fn name(name: &str) -> ObjectName {
    ObjectName::new("default", name)
}

pub fn port(number: u16) -> NonZeroU16 {
    NonZeroU16::new(number).unwrap()
}

/// A Service with a TCP port 80 named `http`.
pub fn service(service_name: &str, cluster_ips: &[&str]) -> Service {
    Service {
        name: name(service_name),
        created: None,
        kind: ServiceKind::ClusterIp,
        cluster_ips: cluster_ips.iter().map(|text| ip(text)).collect(),
        external_ips: vec![],
        load_balancer_ips: vec![],
        ports: vec![ServicePort { name: "http".into(), protocol: Protocol::Tcp, port: port(80), node_port: None }],
        affinity_seconds: None,
        internal_policy: TrafficPolicy::Cluster,
        external_policy: TrafficPolicy::Cluster,
        source_ranges: None,
        health_check_node_port: None,
    }
}

/// A ready endpoint elsewhere.
pub fn endpoint(address: &str) -> Endpoint {
    Endpoint {
        address: ip(address),
        ready: true,
        serving: true,
        terminating: false,
        node: Some("node-b".into()),
        hints: None,
    }
}

/// An endpoint that is for one zone.
pub fn for_zone(zone: &str, endpoint: Endpoint) -> Endpoint {
    Endpoint { hints: Some(Box::new(Hints { zones: vec![zone.into()], nodes: Vec::new() })), ..endpoint }
}

/// A slice with a TCP port 8080 named `http`.
pub fn slice(slice_name: &str, service: &str, endpoints: Vec<Endpoint>) -> EndpointSlice {
    EndpointSlice {
        name: name(slice_name),
        service: name(service),
        is_ipv6: endpoints.first().is_some_and(|endpoint| endpoint.address.is_ipv6()),
        ports: vec![SlicePort { name: "http".into(), protocol: Protocol::Tcp, port: port(8080) }],
        endpoints,
        trigger_time: None,
    }
}

/// A slice of ready endpoints elsewhere.
pub fn ready(slice_name: &str, service: &str, addresses: &[&str]) -> EndpointSlice {
    slice(slice_name, service, addresses.iter().map(|address| endpoint(address)).collect())
}

pub fn tcp(address: &str, port: u16) -> FrontEnd {
    FrontEnd { address: ip(address), port, protocol: Protocol::Tcp }
}

/// The addresses of the API server as the source finds them.
pub fn reached_at(addresses: &[&str]) -> Change {
    Change::ApiServerAddresses(addresses.iter().map(|address| address.parse().unwrap()).collect())
}

/// A reconciler on a model of the kernel, and a clock that only tests move.
pub struct World {
    pub reconciler: Reconciler<FakeKernel>,
    pub now: Instant,
}

impl World {
    /// One whose source has said nothing yet.
    pub fn unsynced(kernel: FakeKernel, policy: Policy) -> Self {
        Self { reconciler: Reconciler::new(kernel, policy), now: Instant::now() }
    }

    /// One that has synced a node with an address and no Service.
    pub fn new() -> Self {
        Self::with(FakeKernel::default(), Policy::new(NODE), vec![])
    }

    /// One that has synced these changes.
    pub fn with(kernel: FakeKernel, policy: Policy, changes: Vec<Change>) -> Self {
        let mut world = Self::unsynced(kernel, policy);
        world.interfaces(ips(&["127.0.0.1", "192.168.1.1", "fd01::1"]));
        for change in changes {
            world.reconciler.apply(change);
        }
        world.reconciler.apply(Change::Synced);
        world.settle();
        world
    }

    pub fn apply(&mut self, change: Change) -> &mut Self {
        self.reconciler.apply(change);
        self
    }

    pub fn apply_all(&mut self, changes: Vec<Change>) -> &mut Self {
        for change in changes {
            self.apply(change);
        }
        self
    }

    /// Gives the node's interfaces these addresses, of which the reconciler is told.
    pub fn interfaces(&mut self, addresses: BTreeSet<IpAddr>) -> &mut Self {
        self.kernel().interfaces = addresses;
        self.reconciler.interfaces_changed();
        self
    }

    pub fn sync(&mut self) -> SyncReport {
        self.reconciler.sync(self.now).unwrap()
    }

    pub fn audit(&mut self) -> SyncReport {
        self.reconciler.audit(self.now).unwrap()
    }

    pub fn wait(&mut self, duration: Duration) -> &mut Self {
        self.now += duration;
        self
    }

    /// Syncs, then lets time pass until nothing is left to be looked at, or ten minutes have passed.
    pub fn settle(&mut self) -> &mut Self {
        self.sync();
        let deadline = self.now + Duration::from_secs(600);
        while let Some(look) = self.reconciler.next_check().filter(|look| *look < deadline) {
            self.now = look.max(self.now);
            self.sync();
        }
        self
    }

    pub fn kernel(&mut self) -> &mut FakeKernel {
        self.reconciler.kernel_mut()
    }

    pub fn server(&mut self, address: &str, port: u16) -> &mut FakeServer {
        self.kernel().servers.get_mut(&tcp(address, port)).unwrap()
    }

    /// Addresses and weights of the real servers of a front end.
    pub fn weights(&mut self, address: &str, port: u16) -> BTreeMap<String, u32> {
        let real_servers = &self.server(address, port).real_servers;
        real_servers.values().map(|held| (held.server.socket_address().to_string(), held.server.weight)).collect()
    }

    pub fn connections(&mut self, front_end: (&str, u16), real_server: &str, connections: u32) {
        let address: SocketAddr = real_server.parse().unwrap();
        self.server(front_end.0, front_end.1).real_servers.get_mut(&address).unwrap().connections = connections;
    }

    /// The kernel, to be given to the next agent.
    pub fn kill(mut self) -> FakeKernel {
        std::mem::take(self.kernel())
    }
}
