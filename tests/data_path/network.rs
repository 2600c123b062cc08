//! A node in the test's own thread, with clients outside the cluster and pods, each in a network namespace.

use std::net::IpAddr;

use lab::link;
use lab::netns::{End, Namespace, isolate};
use lab::objects;
use serde_json::{Value, json};

use crate::traffic::{Answer, Try, tcp, udp};

/// What pods see of whoever is masqueraded: the node's end of their cables.
pub(crate) const NODE_V4: &str = "10.244.0.1";
pub(crate) const NODE_V6: &str = "fd00:244::ffff";
/// The flag that tells the agent so, for both families.
pub(crate) const CLUSTER_CIDR: &str = "--cluster-cidr=10.244.0.0/16,fd00:244::/64";

/// The node as the API has it.
pub(crate) fn node() -> Value {
    let node = objects::node("node-a", &["192.168.1.1", "fd00:192:1::1"]);
    objects::with(node, json!({"spec": {"podCIDRs": ["10.244.0.0/16", "fd00:244::/64"]}}))
}

/// The namespaces around the node.
pub(crate) struct Network {
    /// Outside the cluster: 192.168.N.2, each on a cable of its own.
    pub(crate) clients: Vec<Host>,
    /// On the node: 10.244.1.N.
    pub(crate) pods: Vec<Host>,
}

/// Somebody on the network, who sends everything to the node.
pub(crate) struct Host {
    pub(crate) namespace: Namespace,
    pub(crate) v4: IpAddr,
    pub(crate) v6: IpAddr,
}

impl Network {
    /// Makes the calling thread's namespace a node, with so many clients and pods.
    pub(crate) fn new(clients: usize, pods: usize) -> Self {
        isolate().unwrap();
        // Many probes go out in a short time, and each is to be answered.
        for setting in
            ["ipv4/ip_forward=1", "ipv6/conf/all/forwarding=1", "ipv4/icmp_ratelimit=0", "ipv6/icmp/ratelimit=0"]
        {
            let (key, value) = setting.split_once('=').unwrap();
            std::fs::write(format!("/proc/sys/net/{key}"), value).unwrap();
        }
        let node = Namespace::own().unwrap();
        Self {
            clients: (1..=clients).map(|number| client(&node, number)).collect(),
            pods: (1..=pods).map(|number| pod(&node, number)).collect(),
        }
    }
}

fn client(node: &Namespace, number: usize) -> Host {
    let (v4, v6) = (format!("192.168.{number}"), format!("fd00:192:{number}:"));
    let host = Host {
        namespace: Namespace::new().unwrap(),
        v4: format!("{v4}.2").parse().unwrap(),
        v6: format!("{v6}:2").parse().unwrap(),
    };
    let far = [format!("{v4}.2/24"), format!("{v6}:2/64")];
    let near = [format!("{v4}.1/24"), format!("{v6}:1/64")];
    host.connect(node, &format!("eth{}", number - 1), &near, &far);
    host.route_through(&format!("{v4}.1"), &format!("{v6}:1"));
    host
}

fn pod(node: &Namespace, number: usize) -> Host {
    let host = Host {
        namespace: Namespace::new().unwrap(),
        v4: format!("10.244.1.{number}").parse().unwrap(),
        v6: format!("fd00:244::{number}").parse().unwrap(),
    };
    let device = format!("pod{number}");
    let far = [format!("{}/32", host.v4), format!("{}/128", host.v6)];
    host.connect(node, &device, &[format!("{NODE_V4}/32"), format!("{NODE_V6}/128")], &far);
    for address in [host.v4, host.v6] {
        link::add_route_dev(&address.to_string(), &device).unwrap();
    }
    host.run(|| [NODE_V4, NODE_V6].iter().try_for_each(|address| link::add_route_dev(address, "eth0"))).unwrap();
    host.route_through(NODE_V4, NODE_V6);
    host
}

impl Host {
    fn connect(&self, node: &Namespace, device: &str, near: &[String; 2], far: &[String; 2]) {
        let (near, far) = (near.each_ref().map(String::as_str), far.each_ref().map(String::as_str));
        Namespace::connect(
            End { namespace: node, device, addresses: &near },
            End { namespace: &self.namespace, device: "eth0", addresses: &far },
        )
        .unwrap();
    }

    fn route_through(&self, v4: &str, v6: &str) {
        self.run(|| link::add_route_via("0.0.0.0/0", v4).and_then(|()| link::add_route_via("::/0", v6))).unwrap();
    }

    /// Does something on a thread of this host.
    pub(crate) fn run<T: Send>(&self, action: impl FnOnce() -> T + Send) -> T {
        self.namespace.run(action).unwrap()
    }

    pub(crate) fn tcp(&self, target: &str) -> Try {
        self.run(|| tcp(target))
    }

    pub(crate) fn udp(&self, target: &str) -> Try {
        self.run(|| udp(target))
    }

    /// What the host gets that is answered by this backend and seen with its own address.
    #[expect(clippy::unnecessary_wraps, reason = "it is compared with what came of a try")]
    pub(crate) fn seen_by(&self, backend: &str, target: &str) -> Try {
        Ok(Answer { backend: backend.to_owned(), source: if target.contains('[') { self.v6 } else { self.v4 } })
    }
}

/// What those get who are masqueraded and answered by this backend.
#[expect(clippy::unnecessary_wraps, reason = "it is compared with what came of a try")]
pub(crate) fn masqueraded(backend: &str, target: &str) -> Try {
    let source = if target.contains('[') { NODE_V6 } else { NODE_V4 };
    Ok(Answer { backend: backend.to_owned(), source: source.parse().unwrap() })
}
