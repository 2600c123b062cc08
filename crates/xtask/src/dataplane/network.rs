//! The recorded network: a node with two pods, another node with a pod, and a client outside the cluster, each in a
//! network namespace, with the bridge between them in one more.

use std::collections::BTreeMap;
use std::fs;
use std::net::IpAddr;

use anyhow::{Context, Result};
use lab::link;
use lab::netns::{End, Namespace};
use serde::Deserialize;

/// Where Services may have addresses: the client reaches all of these through the node.
const VIP_RANGES: [&str; 6] =
    ["10.96.0.0/16", "198.51.100.0/24", "203.0.113.0/24", "fd00:10:96::/112", "2001:db8:1::/64", "2001:db8:2::/64"];

/// Further addresses of the node: an external IP that is on an interface, in both families.
const EXTRAS: [&str; 2] = ["192.168.10.60", "fd00:192:168:10::60"];

/// The other node's end of its pod's cable. Nobody sees these addresses.
const REMOTE_POD_SIDE: [&str; 2] = ["10.244.2.1/32", "fd00:10:244:0:2::1/128"];

/// The pods of one node, as the other node knows them.
const PODS: [&str; 2] = ["10.244.1.0/24", "fd00:10:244:0:1::/64"];
const REMOTE_PODS: [&str; 2] = ["10.244.2.0/24", "fd00:10:244:0:2::/64"];

/// What `topology.json` says of addresses: one of each family by name.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Topology {
    pub(crate) addresses: BTreeMap<String, Vec<IpAddr>>,
}

/// The namespaces.
#[derive(Debug)]
pub(crate) struct Network {
    namespaces: BTreeMap<&'static str, Namespace>,
    topology: Topology,
}

impl Topology {
    pub(crate) fn of(&self, name: &str) -> Result<&[IpAddr]> {
        let addresses = self.addresses.get(name).with_context(|| format!("the topology has no address of {name}"))?;
        Ok(addresses)
    }

    pub(crate) fn address(&self, name: &str, is_ipv6: bool) -> Option<IpAddr> {
        self.addresses.get(name)?.iter().copied().find(|address| address.is_ipv6() == is_ipv6)
    }
}

impl Network {
    pub(crate) fn build(topology: Topology) -> Result<Self> {
        let mut namespaces = BTreeMap::new();
        for name in ["fabric", "node", "remote", "client", "pod-a", "pod-b", "remote-pod"] {
            namespaces.insert(name, namespace(["node", "remote"].contains(&name))?);
        }
        let network = Self { namespaces, topology };
        network.bridge()?;
        let node_side = network.topology.of("node-pod-side")?.to_vec();
        for pod in ["pod-a", "pod-b"] {
            network.pod("node", pod, &node_side)?;
        }
        let remote_side = REMOTE_POD_SIDE.iter().filter_map(|range| range.split('/').next()?.parse().ok());
        network.pod("remote", "remote-pod", &remote_side.collect::<Vec<_>>())?;
        network.routes()?;
        Ok(network)
    }

    pub(crate) fn namespace(&self, name: &str) -> Result<&Namespace> {
        self.namespaces.get(name).with_context(|| format!("the topology has nobody called {name}"))
    }

    pub(crate) fn node(&self) -> Result<&Namespace> {
        self.namespace("node")
    }

    /// All addresses of the node.
    pub(crate) fn addresses_of_node(&self) -> Result<Vec<IpAddr>> {
        let extras: Vec<IpAddr> = EXTRAS.iter().filter_map(|address| address.parse().ok()).collect();
        Ok([self.topology.of("node")?, self.topology.of("node-pod-side")?, &extras].concat())
    }

    /// One segment for the two nodes and the client.
    fn bridge(&self) -> Result<()> {
        let fabric = self.namespace("fabric")?;
        fabric.run(|| link::add_bridge("bridge"))??;
        for name in ["node", "remote", "client"] {
            let mut addresses = self.with_prefix(name, ["24", "64"])?;
            if name == "node" {
                addresses.push(format!("{}/24", EXTRAS[0]));
            }
            let addresses: Vec<&str> = addresses.iter().map(String::as_str).collect();
            Namespace::connect(
                End { namespace: fabric, device: name, addresses: &[] },
                End { namespace: self.namespace(name)?, device: "eth0", addresses: &addresses },
            )?;
            fabric.run(|| link::set_master(name, "bridge"))??;
        }
        // Deprecated, so that nothing takes it as its source.
        Ok(self.node()?.run(|| link::add_deprecated_address("eth0", &format!("{}/64", EXTRAS[1])))??)
    }

    /// A pod behind a node, point to point: nothing but the two ends is on the cable.
    fn pod(&self, node: &str, pod: &str, node_side: &[IpAddr]) -> Result<()> {
        let (node, namespace) = (self.namespace(node)?, self.namespace(pod)?);
        let whole = |address: &IpAddr| format!("{address}/{}", if address.is_ipv6() { 128 } else { 32 });
        let near: Vec<String> = node_side.iter().map(whole).collect();
        let far: Vec<String> = self.topology.of(pod)?.iter().map(whole).collect();
        Namespace::connect(
            End { namespace: node, device: pod, addresses: &near.iter().map(String::as_str).collect::<Vec<_>>() },
            End { namespace, device: "eth0", addresses: &far.iter().map(String::as_str).collect::<Vec<_>>() },
        )?;
        for address in self.topology.of(pod)? {
            node.run(|| link::add_route_dev(&address.to_string(), pod))??;
        }
        namespace.run(|| {
            node_side.iter().try_for_each(|address| {
                let (all, address) = (if address.is_ipv6() { "::/0" } else { "0.0.0.0/0" }, address.to_string());
                link::add_route_dev(&address, "eth0")?;
                link::add_route_via(all, &address)
            })
        })??;
        Ok(())
    }

    /// No default routes but the pods'.
    fn routes(&self) -> Result<()> {
        let via = |from: &str, to: &str, through: &str| -> Result<()> {
            let router = self.topology.address(through, to.contains(':')).context("a router has no address")?;
            Ok(self.namespace(from)?.run(|| link::add_route_via(to, &router.to_string()))??)
        };
        for range in REMOTE_PODS {
            via("node", range, "remote")?;
        }
        for range in PODS {
            via("remote", range, "node")?;
        }
        VIP_RANGES.iter().try_for_each(|range| via("client", range, "node"))
    }

    fn with_prefix(&self, name: &str, prefixes: [&str; 2]) -> Result<Vec<String>> {
        let addresses = self.topology.of(name)?.iter();
        Ok(addresses.map(|address| format!("{address}/{}", prefixes[usize::from(address.is_ipv6())])).collect())
    }
}

/// A namespace that filters no sources and has no limit on refusals: many probes go out in a short time.
fn namespace(is_router: bool) -> Result<Namespace> {
    const ROUTER: [(&str, &str); 2] = [("ipv4/ip_forward", "1"), ("ipv6/conf/all/forwarding", "1")];
    const SETTINGS: [(&str, &str); 11] = [
        ("ipv4/conf/all/rp_filter", "0"),
        ("ipv4/conf/default/rp_filter", "0"),
        ("ipv4/conf/all/send_redirects", "0"),
        ("ipv4/conf/default/send_redirects", "0"),
        ("ipv4/conf/all/accept_redirects", "0"),
        ("ipv4/conf/default/accept_redirects", "0"),
        ("ipv6/conf/all/accept_redirects", "0"),
        ("ipv6/conf/default/accept_redirects", "0"),
        ("ipv4/icmp_ratelimit", "0"),
        ("ipv6/icmp/ratelimit", "0"),
        // Lets root ping without a raw socket.
        ("ipv4/ping_group_range", "0 0"),
    ];
    let namespace = Namespace::new()?;
    namespace.run(|| -> Result<()> {
        for (key, value) in ROUTER.iter().filter(|_| is_router).chain(&SETTINGS) {
            fs::write(format!("/proc/sys/net/{key}"), value).with_context(|| format!("cannot set {key}"))?;
        }
        Ok(())
    })??;
    Ok(namespace)
}
