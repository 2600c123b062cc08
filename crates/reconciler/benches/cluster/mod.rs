//! A cluster of any size on a kernel that costs nothing: what the benchmark of instructions and the test of allocations
//! measure.

#![allow(
    dead_code,
    clippy::allow_attributes,
    clippy::unwrap_used,
    reason = "included by several targets, each of which uses a part and cannot go on without"
)]

use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU16;
use std::time::{Duration, Instant};

use ipvs_netlink::RealServer;
use reconciler::front_end::FrontEnd;
use reconciler::kernel::{Kernel, KernelError, Observed, ObservedServer, Scope};
use reconciler::plan::Plan;
use reconciler::report::SyncReport;
use reconciler::{Policy, Reconciler};
use service_watch::{
    Change, Endpoint, EndpointSlice, ObjectName, Protocol, Service, ServiceKind, ServicePort, SlicePort, TrafficPolicy,
};

/// How many endpoints a Service has before anything changes.
pub(crate) const ENDPOINTS: u32 = 10;

/// A virtual server that drains is looked at after this.
const LOOK: Duration = Duration::from_millis(100);

/// Does all that it is asked, and remembers nothing.
#[derive(Debug, Default)]
pub(crate) struct FreeKernel {
    /// What the next reading finds.
    found: Vec<ObservedServer>,
}

impl Kernel for FreeKernel {
    fn dump(&mut self, _: Scope<'_>) -> Result<Observed, KernelError> {
        Ok(Observed { servers: std::mem::take(&mut self.found), ..Observed::default() })
    }

    fn apply(&mut self, plan: &Plan) -> Vec<Result<(), KernelError>> {
        plan.operations().iter().map(|_| Ok(())).collect()
    }
}

/// A reconciler that has synced.
#[derive(Debug)]
pub(crate) struct Cluster {
    reconciler: Reconciler<FreeKernel>,
    now: Instant,
}

impl Cluster {
    /// One with so many Services.
    pub(crate) fn with_services(services: u32) -> Self {
        Self::started(everything(services))
    }

    /// One that starts with all these changes.
    pub(crate) fn started(changes: Vec<Change>) -> Self {
        let mut cluster = Self { reconciler: Reconciler::new(FreeKernel::default(), policy()), now: Instant::now() };
        for change in changes {
            cluster.reconciler.apply(change);
        }
        cluster.sync();
        cluster
    }

    /// What one change costs: to take it in, to carry it out, and to know when to go on.
    pub(crate) fn apply_and_sync(&mut self, change: Change) -> SyncReport {
        self.reconciler.apply(change);
        self.sync()
    }

    /// Has one real server drain at each of the last so many of so many Services.
    pub(crate) fn drain(&mut self, draining: u32, services: u32) {
        for number in services - draining..services {
            self.reconciler.apply(Change::Slice(slice(number, ENDPOINTS - 1)));
        }
        let report = self.sync();
        assert_eq!(report.totals.draining, draining as usize);
    }

    /// The look at a Service that has been told to have one endpoint less. Its real servers are found idle.
    pub(crate) fn look(&mut self) -> SyncReport {
        self.now += LOOK;
        self.sync()
    }

    /// What the look will find: the real server that has drained, and the others.
    pub(crate) fn expect_look(&mut self, service: u32) {
        let server = |endpoint| RealServer::new(SocketAddr::new(address(service, endpoint), 8080));
        let mut real_servers: Vec<_> = (0..ENDPOINTS).map(|endpoint| (server(endpoint), true)).collect();
        real_servers.last_mut().unwrap().0.weight = 0;
        let real_servers = real_servers.into_iter().collect();
        let front_end = FrontEnd { address: cluster_ip(service), port: 80, protocol: Protocol::Tcp };
        let scheduler = policy().scheduler;
        let config = ipvs_netlink::VirtualServer::new(front_end.id(), scheduler).into();
        self.reconciler.kernel_mut().found = vec![ObservedServer { front_end, config, real_servers }];
    }

    fn sync(&mut self) -> SyncReport {
        let report = self.reconciler.sync(self.now).unwrap();
        std::hint::black_box(self.reconciler.next_check());
        report
    }
}

pub(crate) fn policy() -> Policy {
    Policy::new("node-a")
}

/// Services with their endpoints, as a source tells them.
pub(crate) fn everything(services: u32) -> Vec<Change> {
    let each = (0..services).flat_map(|it| [Change::Service(service(it)), Change::Slice(slice(it, ENDPOINTS))]);
    each.chain([Change::Synced]).collect()
}

/// A Service with a ClusterIP and a TCP port.
pub(crate) fn service(number: u32) -> Service {
    Service {
        name: name(number),
        created: Some(1_700_000_000),
        kind: ServiceKind::ClusterIp,
        cluster_ips: vec![cluster_ip(number)],
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

/// Its only slice, with so many endpoints.
pub(crate) fn slice(service: u32, endpoints: u32) -> EndpointSlice {
    slice_of(service, 0, (0..endpoints).map(|endpoint| address(service, endpoint)))
}

/// One of its slices.
pub(crate) fn slice_of(service: u32, number: u32, addresses: impl Iterator<Item = IpAddr>) -> EndpointSlice {
    let endpoint = |address| Endpoint {
        address,
        ready: true,
        serving: true,
        terminating: false,
        node: Some("node-b".into()),
        hints: None,
    };
    EndpointSlice {
        name: ObjectName::new("default", &format!("service-{service}-{number}")),
        service: name(service),
        is_ipv6: false,
        ports: vec![SlicePort { name: "http".into(), protocol: Protocol::Tcp, port: port(8080) }],
        endpoints: addresses.map(endpoint).collect(),
        trigger_time: None,
    }
}

pub(crate) fn name(service: u32) -> ObjectName {
    ObjectName::new("default", &format!("service-{service}"))
}

/// 10.96.0.0 and on.
pub(crate) fn cluster_ip(service: u32) -> IpAddr {
    IpAddr::V4((0x0a60_0000 + service).into())
}

/// 10.128.0.0 and on, 16 for each Service.
fn address(service: u32, endpoint: u32) -> IpAddr {
    IpAddr::V4((0x0a80_0000 + service * 16 + endpoint).into())
}

fn port(number: u16) -> NonZeroU16 {
    NonZeroU16::new(number).unwrap()
}
