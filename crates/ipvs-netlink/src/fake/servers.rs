//! Virtual and real servers: what `ip_vs_genl_set_cmd` does with them once it has found the virtual server.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use super::kernel::Kernel;
use crate::errno::{EAFNOSUPPORT, EEXIST, EINVAL, ENOENT, ERANGE, ESRCH};
use crate::id::{Family, Protocol, VirtualServerId};
use crate::real_server::{Forwarding, RealServer, RealServerEntry, Tunnel};
use crate::stats::Stats;
use crate::virtual_server::{Netmask, Persistence, VirtualServer, VirtualServerEntry};

/// What goes through a real server. Nothing does in a fake, so tests say what is listed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// As in [`RealServerEntry`].
    pub active_connections: u32,
    /// As in [`RealServerEntry`].
    pub inactive_connections: u32,
    /// As in [`RealServerEntry`].
    pub persistent_connections: u32,
    /// As in [`RealServerEntry`].
    pub stats: Stats,
}

/// All virtual servers, with what is left of deleted real servers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Servers {
    by_id: BTreeMap<VirtualServerId, Virtual>,
    /// The latest first.
    trash: Vec<Trashed>,
    /// How many virtual servers there ever were.
    births: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Virtual {
    server: VirtualServer,
    stats: Stats,
    /// The latest first, as the kernel lists them.
    real_servers: Vec<Real>,
    birth: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Real {
    server: RealServer,
    traffic: Traffic,
}

/// A deleted real server that something went through: it has that again when it comes again.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Trashed {
    id: VirtualServerId,
    address: SocketAddr,
    birth: u64,
    traffic: Traffic,
}

impl Servers {
    /// What every command on a virtual server begins with (`ip_vs_genl_parse_service`).
    fn find(&mut self, kernel: &Kernel, id: &VirtualServerId) -> Result<&mut Virtual, i32> {
        check_family(kernel, id.family())?;
        self.by_id.get_mut(&canonical(id)).ok_or(ESRCH)
    }

    pub(super) fn add(&mut self, kernel: &Kernel, server: &VirtualServer) -> Result<(), i32> {
        check_family(kernel, server.id.family())?;
        if self.by_id.contains_key(&canonical(&server.id)) {
            return Err(EEXIST);
        }
        check_virtual(kernel, server)?;
        self.births += 1;
        let server = normalized(kernel, server);
        let made = Virtual { server, stats: Stats::default(), real_servers: Vec::new(), birth: self.births };
        self.by_id.insert(server.id, made);
        Ok(())
    }

    pub(super) fn set(&mut self, kernel: &Kernel, server: &VirtualServer) -> Result<(), i32> {
        let found = self.find(kernel, &server.id)?;
        check_virtual(kernel, server)?;
        found.server = normalized(kernel, server);
        Ok(())
    }

    pub(super) fn delete(&mut self, kernel: &Kernel, id: &VirtualServerId) -> Result<(), i32> {
        self.find(kernel, id)?;
        if let Some(deleted) = self.by_id.remove(&canonical(id)) {
            self.discard(deleted);
        }
        Ok(())
    }

    pub(super) fn flush(&mut self) {
        for (_, deleted) in std::mem::take(&mut self.by_id) {
            self.discard(deleted);
        }
    }

    fn discard(&mut self, deleted: Virtual) {
        for real in deleted.real_servers {
            self.move_to_trash(deleted.server.id, deleted.birth, &real);
        }
    }

    /// `__ip_vs_del_dest`. One through which nothing went would come again as if it were new.
    fn move_to_trash(&mut self, id: VirtualServerId, birth: u64, real: &Real) {
        if real.traffic != Traffic::default() {
            let address = real.server.socket_address();
            self.trash.insert(0, Trashed { id, address, birth, traffic: real.traffic });
        }
    }

    pub(super) fn empty_trash(&mut self) {
        self.trash.clear();
    }

    pub(super) fn zero(&mut self, kernel: &Kernel, id: &VirtualServerId) -> Result<(), i32> {
        self.find(kernel, id)?.zero();
        Ok(())
    }

    pub(super) fn zero_all(&mut self) {
        self.by_id.values_mut().for_each(Virtual::zero);
    }

    /// Adds a real server. `synchronized` says whether a synchronization daemon runs.
    pub(super) fn add_real(
        &mut self,
        kernel: &Kernel,
        id: &VirtualServerId,
        server: &RealServer,
        synchronized: bool,
    ) -> Result<(), i32> {
        let found = self.find(kernel, id)?;
        check_real(kernel, id, server, synchronized)?;
        if found.position(server.socket_address()).is_some() {
            return Err(EEXIST);
        }
        if !kernel.accepts_real_server(server.address) {
            return Err(EINVAL);
        }
        let (id, birth) = (found.server.id, found.birth);
        let traffic = self.recover(&id, birth, server.socket_address());
        self.find(kernel, &id)?.real_servers.insert(0, Real { server: *server, traffic });
        Ok(())
    }

    /// `ip_vs_trash_get_dest`, which tells virtual servers by firewall mark apart by the mark alone. Statistics begin anew
    /// with the virtual server.
    fn recover(&mut self, id: &VirtualServerId, birth: u64, address: SocketAddr) -> Traffic {
        let is_it = |trashed: &Trashed| {
            trashed.address == address
                && match (trashed.id, id) {
                    (
                        VirtualServerId::FirewallMark { mark: old, .. },
                        VirtualServerId::FirewallMark { mark: new, .. },
                    ) => old == *new,
                    (old, new) => old == *new,
                }
        };
        let Some(position) = self.trash.iter().position(is_it) else { return Traffic::default() };
        let mut trashed = self.trash.remove(position);
        if trashed.birth != birth {
            zero(&mut trashed.traffic.stats);
        }
        trashed.traffic
    }

    pub(super) fn set_real(
        &mut self,
        kernel: &Kernel,
        id: &VirtualServerId,
        server: &RealServer,
        synchronized: bool,
    ) -> Result<(), i32> {
        let found = self.find(kernel, id)?;
        check_real(kernel, id, server, synchronized)?;
        let position = found.position(server.socket_address()).ok_or(ENOENT)?;
        found.real_servers[position].server = *server;
        Ok(())
    }

    pub(super) fn delete_real(
        &mut self,
        kernel: &Kernel,
        id: &VirtualServerId,
        address: SocketAddr,
    ) -> Result<(), i32> {
        let found = self.find(kernel, id)?;
        check_family(kernel, Family::of(address.ip()))?;
        let position = found.position(address).ok_or(ENOENT)?;
        let deleted = found.real_servers.remove(position);
        let (id, birth) = (found.server.id, found.birth);
        self.move_to_trash(id, birth, &deleted);
        Ok(())
    }

    /// Whether a real server is of another family than its virtual server (`mixed_address_family_dests`).
    pub(super) fn has_mixed_families(&self) -> bool {
        self.by_id
            .iter()
            .any(|(id, found)| found.real_servers.iter().any(|real| Family::of(real.server.address) != id.family()))
    }

    pub(super) fn list(&self) -> impl Iterator<Item = VirtualServerEntry> {
        self.by_id.values().map(Virtual::entry)
    }

    pub(super) fn get(&self, kernel: &Kernel, id: &VirtualServerId) -> Result<VirtualServerEntry, i32> {
        check_family(kernel, id.family())?;
        self.by_id.get(&canonical(id)).map(Virtual::entry).ok_or(ESRCH)
    }

    pub(super) fn list_real(&self, id: &VirtualServerId) -> impl Iterator<Item = RealServerEntry> {
        self.by_id.get(&canonical(id)).into_iter().flat_map(|found| found.real_servers.iter().map(Real::entry))
    }

    pub(super) fn stats_mut(&mut self, id: &VirtualServerId) -> Option<&mut Stats> {
        self.by_id.get_mut(&canonical(id)).map(|found| &mut found.stats)
    }

    pub(super) fn traffic_mut(&mut self, id: &VirtualServerId, address: SocketAddr) -> Option<&mut Traffic> {
        let found = self.by_id.get_mut(&canonical(id))?;
        let position = found.position(address)?;
        Some(&mut found.real_servers[position].traffic)
    }
}

impl Virtual {
    fn position(&self, address: SocketAddr) -> Option<usize> {
        let wanted = (address.ip(), address.port());
        self.real_servers.iter().position(|real| (real.server.address, real.server.port) == wanted)
    }

    /// `ip_vs_zero_service`
    fn zero(&mut self) {
        zero(&mut self.stats);
        for real in &mut self.real_servers {
            zero(&mut real.traffic.stats);
        }
    }

    fn entry(&self) -> VirtualServerEntry {
        VirtualServerEntry { server: self.server, stats: self.stats }
    }
}

impl Real {
    fn entry(&self) -> RealServerEntry {
        RealServerEntry {
            server: self.server,
            active_connections: self.traffic.active_connections,
            inactive_connections: self.traffic.inactive_connections,
            persistent_connections: self.traffic.persistent_connections,
            stats: self.traffic.stats,
        }
    }
}

fn zero(stats: &mut Stats) {
    *stats = Stats { width: stats.width, ..Stats::default() };
}

/// The form under which the kernel finds it: a protocol is its number.
fn canonical(id: &VirtualServerId) -> VirtualServerId {
    match *id {
        VirtualServerId::Address { protocol, address, port } => {
            VirtualServerId::Address { protocol: Protocol::from_number(protocol.number()), address, port }
        }
        mark @ VirtualServerId::FirewallMark { .. } => mark,
    }
}

fn check_family(kernel: &Kernel, family: Family) -> Result<(), i32> {
    if kernel.has_family(family) { Ok(()) } else { Err(EAFNOSUPPORT) }
}

/// What `ip_vs_add_service` and `ip_vs_edit_service` look at, in this order.
fn check_virtual(kernel: &Kernel, server: &VirtualServer) -> Result<(), i32> {
    if !kernel.has_scheduler(&server.scheduler) {
        return Err(ENOENT);
    }
    if server.engine.is_some_and(|engine| !kernel.persistence_engines.contains(&engine)) {
        return Err(ENOENT);
    }
    match server.persistence.map(|persistence| persistence.netmask) {
        Some(Netmask::V6(prefix)) if !(1..=128).contains(&prefix) => Err(EINVAL),
        _ => Ok(()),
    }
}

fn normalized(kernel: &Kernel, server: &VirtualServer) -> VirtualServer {
    let wrapped =
        |persistence: Persistence| Persistence { timeout: kernel.wrap_timeout(persistence.timeout), ..persistence };
    VirtualServer { persistence: server.persistence.map(wrapped), ..*server }
}

/// What `ip_vs_genl_set_cmd`, and then `ip_vs_add_dest` and `ip_vs_edit_dest`, look at before they look for the real
/// server, in this order.
fn check_real(kernel: &Kernel, id: &VirtualServerId, server: &RealServer, synchronized: bool) -> Result<(), i32> {
    let family = Family::of(server.address);
    check_family(kernel, family)?;
    let is_tunnel = matches!(server.forwarding, Forwarding::Tunnel(_));
    if family != id.family() && (synchronized || !is_tunnel) {
        return Err(EINVAL);
    }
    // The weight is a signed int there.
    if i32::try_from(server.weight).is_err() || server.lower_threshold > server.upper_threshold {
        return Err(ERANGE);
    }
    if server.upper_threshold > kernel.largest_upper_threshold {
        return Err(EINVAL);
    }
    // IP_VS_CONN_F_TUNNEL_TYPE_GUE
    if matches!(server.forwarding, Forwarding::Tunnel(Tunnel::Other { kind: 1, port: 0, .. })) {
        return Err(EINVAL);
    }
    Ok(())
}
