//! What a kernel and its network namespace have, as far as commands depend on it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::num::NonZeroU32;

use crate::id::Family;
use crate::name::Name;
use crate::scheduler::Scheduler;

/// A network interface, as far as synchronization daemons depend on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interface {
    /// Bytes of a packet, at most.
    pub mtu: u32,
    /// Whether IPv6 multicast leaves by it, for which it needs a route and an address. `lo` has none.
    pub routes_ipv6_multicast: bool,
}

/// What the kernel of a fake has, and the network namespace around it. The default is Linux 6.1 with all of IPVS and
/// nothing but a loopback interface, which is up.
///
/// It can change at any time: a module is loaded, an interface comes.
///
/// ```
/// use ipvs_netlink::fake::{Interface, Ipvs};
///
/// let mut ipvs = Ipvs::default();
/// ipvs.kernel.schedulers.remove(&"mh".parse()?);
/// ipvs.kernel.interfaces.insert("eth0".parse()?, Interface { mtu: 9000, routes_ipv6_multicast: true });
/// ipvs.kernel.addresses.insert(("10.9.0.1".parse()?, 24));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// The schedulers it has, as modules or built in. `none` is always there.
    pub schedulers: BTreeSet<Name>,
    /// The persistence engines it has.
    pub persistence_engines: BTreeSet<Name>,
    /// Whether IPv6 is on; where it is not (`ipv6.disable=1`), the family is not supported.
    pub ipv6: bool,
    /// How often the clock ticks in a second (`CONFIG_HZ`): what timeouts are counted in.
    pub ticks_per_second: NonZeroU32,
    /// Buckets of the connection table (`ip_vs.conn_tab_bits`).
    pub connection_table_size: u32,
    /// The largest upper threshold of a real server: 2,147,483,647 by default, as in Linux 7.2 and in stable releases of 2026
    /// (`ip_vs_add_dest`); [`u32::MAX`] in older ones.
    pub largest_upper_threshold: u32,
    /// The addresses of the namespace, with the prefix lengths of their networks. A real server may be any unicast
    /// address; what depends on this is that it is not the broadcast address of a network, and that a link-local IPv6
    /// address has to be one of the host's own. Without any of IPv4, as where `lo` was never up, no IPv4 address is taken as
    /// that of a real server.
    pub addresses: BTreeSet<(IpAddr, u8)>,
    /// The interfaces of the namespace.
    pub interfaces: BTreeMap<Name, Interface>,
}

impl Default for Kernel {
    fn default() -> Self {
        // Names that are constant and short parse.
        let names = |names: &[&str]| names.iter().filter_map(|name| name.parse().ok()).collect();
        let loopback = Interface { mtu: 65_536, routes_ipv6_multicast: false };
        Self {
            schedulers: names(&Scheduler::ALL.each_ref().map(Scheduler::name)),
            persistence_engines: names(&["sip"]),
            ipv6: true,
            ticks_per_second: NonZeroU32::new(250).unwrap_or(NonZeroU32::MIN),
            connection_table_size: 4096,
            largest_upper_threshold: i32::MAX.unsigned_abs(),
            addresses: BTreeSet::from([(Ipv4Addr::LOCALHOST.into(), 8), (Ipv6Addr::LOCALHOST.into(), 128)]),
            interfaces: "lo".parse().map(|name| (name, loopback)).into_iter().collect(),
        }
    }
}

impl Kernel {
    /// `ip_vs_is_af_valid`.
    pub(super) fn has_family(&self, family: Family) -> bool {
        family == Family::Ipv4 || self.ipv6
    }

    pub(super) fn has_scheduler(&self, scheduler: &Scheduler) -> bool {
        let name = scheduler.name();
        name == "none" || self.schedulers.iter().any(|known| known.as_str() == name)
    }

    /// Whether an address is one that `ip_vs_new_dest` takes.
    pub(super) fn accepts_real_server(&self, address: IpAddr) -> bool {
        match address {
            // inet_addr_type: 0.0.0.0 alone of its network counts as broadcast, and 240.0.0.0/4 as unicast.
            IpAddr::V4(v4) => {
                let refused = v4.is_unspecified() || v4.is_broadcast() || v4.is_multicast();
                // Before the first address there is no table to look it up in, and it counts as broadcast.
                let has_table = self.addresses.iter().any(|(local, _)| local.is_ipv4());
                !refused && has_table && (self.is_local(address) || !self.is_broadcast(v4))
            }
            // ipv6_addr_type: an IPv4 address in IPv6 form is not unicast, 100::/64 and fec0::/10 are.
            IpAddr::V6(v6) => {
                let is_unicast = !(v6.is_unspecified() || v6.is_multicast() || v6.to_ipv4_mapped().is_some());
                (is_unicast && !v6.is_unicast_link_local()) || self.is_local(address)
            }
        }
    }

    fn is_local(&self, address: IpAddr) -> bool {
        self.addresses.iter().any(|(local, _)| *local == address)
    }

    /// Whether it is the last address of a network (`fib_add_ifaddr`).
    fn is_broadcast(&self, address: Ipv4Addr) -> bool {
        self.addresses.iter().any(|(local, prefix_length)| match local {
            IpAddr::V4(local) if *prefix_length < 31 => {
                let hosts = u32::MAX >> prefix_length;
                // A network that begins with 0.0.0.0 gets no routes.
                local.to_bits() & !hosts != 0 && address.to_bits() == local.to_bits() | hosts
            }
            _ => false,
        })
    }

    /// The limit of `ip_vs_set_timeout`, in seconds: what fits a signed int in ticks.
    pub(super) fn max_timeout(&self) -> u32 {
        i32::MAX.unsigned_abs() / self.ticks_per_second
    }

    /// The timeout of a virtual server as it is listed: its ticks wrap in an unsigned int.
    pub(super) fn wrap_timeout(&self, seconds: u32) -> u32 {
        seconds.wrapping_mul(self.ticks_per_second.get()) / self.ticks_per_second
    }
}
