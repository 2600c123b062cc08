//! What a kernel's IPVS can do, found out by asking it.

use std::collections::BTreeSet;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::num::NonZeroU32;
use std::path::Path;

use netlink_batch::Socket;
use netlink_packet_core::{DecodeError, Emitable, ParseableParametrized};
use netlink_packet_generic::{GenlFamily, GenlHeader, GenlMessage};

use crate::attributes::{FAMILY_NAME, dest, each_attribute, service, top};
use crate::client::{Client, wrap};
use crate::config::Info;
use crate::error::{Error, ErrorKind};
use crate::id::{Family, VirtualServerId};
use crate::message::Message;
use crate::name::Name;
use crate::real_server::RealServer;
use crate::scheduler::Scheduler;
use crate::stats::StatsWidth;
use crate::virtual_server::{Netmask, Persistence, VirtualServer};

/// Where the namespace's sysctls of IPVS are. Those of the calling thread's network namespace are seen.
const SYSCTLS: &str = "/proc/sys/net/ipv4/vs";

/// What a kernel's IPVS can do.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Features {
    /// What it says about itself.
    pub info: Info,
    /// The schedulers it has, or could load, of those that were asked for.
    pub schedulers: Vec<Scheduler>,
    /// Whether it has the persistence engine `sip`, or could load it.
    pub sip: bool,
    /// Whether it takes virtual servers of IPv6 (`CONFIG_IP_VS_IPV6`, and IPv6 not disabled).
    pub ipv6: bool,
    /// How wide the counters are that it tells.
    pub stats: StatsWidth,
    /// The tunnels it has beside IP in IP.
    pub tunnels: TunnelFeatures,
    /// Whether, and how, estimation is controlled, without which no counter moves.
    pub estimation: EstimationFeatures,
    /// Whether its tables of connections and virtual servers grow and shrink (the sysctls `conn_lfactor` and `svc_lfactor`).
    pub resizable_tables: bool,
}

/// The tunnels a kernel has beside IP in IP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum TunnelFeatures {
    /// None: what one asks for is taken, and is IP in IP.
    None,
    /// Generic UDP encapsulation.
    Gue,
    /// That, with checksums, and generic routing encapsulation.
    GueAndGre,
}

/// How the kernel's estimation is controlled, which brings counters and rates up to date. While it is off, what is listed
/// stays as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum EstimationFeatures {
    /// It is always on.
    AlwaysOn,
    /// It can be switched off (the sysctl `run_estimation`).
    Switch,
    /// That, and where and how eagerly it runs can be chosen (`est_cpulist` and `est_nice`).
    Threads,
}

impl Client {
    /// Asks the kernel what it can do.
    ///
    /// Asking for a scheduler makes the kernel load its module where there is one. Schedulers are asked for by requests that
    /// the kernel refuses for another reason if it knows them, so nothing changes. Where the namespace has no real server to
    /// look at, a virtual server by a firewall mark that no packet has, with one real server, is made and deleted.
    pub fn features(&mut self, schedulers: &[Scheduler]) -> Result<Features, Error> {
        let info = self.info()?;
        let probe = SchedulerProbe::choose(self)?;
        let mut found = Vec::new();
        for scheduler in schedulers {
            if probe.has(self, *scheduler, None)? {
                found.push(*scheduler);
            }
        }
        let some = probe.any_scheduler(self)?;
        let sip = match (some, "sip".parse()) {
            (Some(scheduler), Ok(engine)) => probe.has(self, scheduler, Some(engine))?,
            _ => false,
        };
        let known = self.known_attributes(probe, some)?;
        Ok(Features {
            info,
            schedulers: found,
            sip,
            ipv6: probe == SchedulerProbe::Ipv6,
            stats: if known.contains(&(top::SERVICE, service::STATS64)) {
                StatsWidth::Bits64
            } else {
                StatsWidth::Bits32
            },
            tunnels: match [dest::TUN_TYPE, dest::TUN_FLAGS].map(|kind| known.contains(&(top::DEST, kind))) {
                [false, _] => TunnelFeatures::None,
                [true, false] => TunnelFeatures::Gue,
                [true, true] => TunnelFeatures::GueAndGre,
            },
            estimation: match ["run_estimation", "est_nice"].map(has_sysctl) {
                [false, _] => EstimationFeatures::AlwaysOn,
                [true, false] => EstimationFeatures::Switch,
                [true, true] => EstimationFeatures::Threads,
            },
            resizable_tables: has_sysctl("conn_lfactor"),
        })
    }

    /// Whether the kernel has a scheduler, or could load it: [`Client::features`] for this alone.
    pub fn has_scheduler(&mut self, scheduler: Scheduler) -> Result<bool, Error> {
        SchedulerProbe::choose(self)?.has(self, scheduler, None)
    }

    /// The attributes with which the kernel lists virtual and real servers: the nest they are in, and their kind.
    fn known_attributes(
        &mut self,
        probe: SchedulerProbe,
        scheduler: Option<Scheduler>,
    ) -> Result<BTreeSet<(u16, u16)>, Error> {
        for entry in self.virtual_servers()? {
            match self.attributes_of(&entry.server.id) {
                Ok(known) if known.iter().any(|(nest, _)| *nest == top::DEST) => return Ok(known),
                // Somebody else has deleted it.
                Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        let Some(scheduler) = scheduler else { return Ok(BTreeSet::new()) };
        // Of IPv4 the kernel takes none where `lo` was never up.
        let (family, address): (_, IpAddr) = match probe {
            SchedulerProbe::Ipv6 => (Family::Ipv6, Ipv6Addr::LOCALHOST.into()),
            SchedulerProbe::Ipv4 => (Family::Ipv4, Ipv4Addr::LOCALHOST.into()),
        };
        let id = self.with_unused_mark(family, |client, id| {
            client.add_virtual_server(&VirtualServer::new(id, scheduler)).map(|()| id)
        })?;
        let example = RealServer::new(SocketAddr::new(address, 0));
        let known = self.add_real_server(&id, &example).and_then(|()| self.attributes_of(&id));
        match self.delete_virtual_server(&id) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
            _ => known,
        }
    }

    fn attributes_of(&mut self, id: &VirtualServerId) -> Result<BTreeSet<(u16, u16)>, Error> {
        let mut known = BTreeSet::new();
        let (socket, family) = self.socket_and_family();
        let request = Message::GetVirtualServer(*id);
        socket
            .request(&wrap(request, family).into(), |reply: GenlMessage<AttributeKinds>| known.extend(reply.payload.0))
            .map_err(|error| Error::new(&request, error))?;
        let request = Message::ListRealServers(*id);
        let mut dump = |socket: &mut Socket| {
            socket.dump(&wrap(request, family), |reply: GenlMessage<AttributeKinds>| known.extend(reply.payload.0))
        };
        dump(socket).map_err(|error| Error::new(&request, error))?;
        Ok(known)
    }

    /// Does something with a firewall mark for which there is no virtual server, and again with another one where somebody
    /// else takes it meanwhile.
    fn with_unused_mark<T>(
        &mut self,
        family: Family,
        mut action: impl FnMut(&mut Self, VirtualServerId) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let mut mark = NonZeroU32::MAX;
        loop {
            let id = VirtualServerId::FirewallMark { mark, family };
            match self.virtual_server(&id) {
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::NotFound => match action(self, id) {
                    Err(error) if error.kind() == ErrorKind::Exists => {}
                    result => return result,
                },
                Err(error) => return Err(error),
            }
            mark = NonZeroU32::new(mark.get() - 1).unwrap_or(NonZeroU32::MAX);
        }
    }
}

/// How to find out whether the kernel has a scheduler.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SchedulerProbe {
    /// With a virtual server of IPv6 and a netmask it cannot have: the kernel looks for the scheduler first, then for the
    /// persistence engine, then at the netmask (`ip_vs_add_service`).
    Ipv6,
    /// Without IPv6 no netmask is invalid in that way: a virtual server is added and deleted.
    Ipv4,
}

impl SchedulerProbe {
    fn choose(client: &mut Client) -> Result<Self, Error> {
        match client.with_unused_mark(Family::Ipv6, |_, _| Ok(())) {
            Ok(()) => Ok(Self::Ipv6),
            Err(error) if error.kind() == ErrorKind::NotSupported => Ok(Self::Ipv4),
            Err(error) => Err(error),
        }
    }

    /// A scheduler that the kernel has, to probe other things with. `none` needs no module, where a kernel knows it.
    fn any_scheduler(self, client: &mut Client) -> Result<Option<Scheduler>, Error> {
        for scheduler in "none".parse().into_iter().chain(Scheduler::ALL) {
            if self.has(client, scheduler, None)? {
                return Ok(Some(scheduler));
            }
        }
        Ok(None)
    }

    fn has(self, client: &mut Client, scheduler: Scheduler, engine: Option<Name>) -> Result<bool, Error> {
        let (family, netmask) = match self {
            Self::Ipv6 => (Family::Ipv6, Netmask::V6(0)),
            Self::Ipv4 => (Family::Ipv4, Netmask::host(Family::Ipv4)),
        };
        let persistence = Some(Persistence { timeout: 1, netmask });
        let request = |id| VirtualServer { persistence, engine, ..VirtualServer::new(id, scheduler) };
        match client.with_unused_mark(family, |client, id| client.add_virtual_server(&request(id)).map(|()| id)) {
            Ok(id) => match client.delete_virtual_server(&id) {
                // Somebody else has deleted it.
                Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
                _ => Ok(true),
            },
            Err(error) if error.kind() == ErrorKind::NoScheduler => Ok(false),
            Err(error) if error.kind() == ErrorKind::Invalid && self == Self::Ipv6 => Ok(true),
            Err(error) => Err(error),
        }
    }
}

fn has_sysctl(name: &str) -> bool {
    fs::exists(Path::new(SYSCTLS).join(name)).unwrap_or(false)
}

/// The kinds of the attributes in a reply, without their values.
#[derive(Debug)]
struct AttributeKinds(Vec<(u16, u16)>);

impl GenlFamily for AttributeKinds {
    fn family_name() -> &'static str {
        FAMILY_NAME
    }

    fn command(&self) -> u8 {
        0
    }

    fn version(&self) -> u8 {
        0
    }
}

impl Emitable for AttributeKinds {
    fn buffer_len(&self) -> usize {
        0
    }

    fn emit(&self, _: &mut [u8]) {}
}

impl ParseableParametrized<[u8], GenlHeader> for AttributeKinds {
    fn parse_with_param(buffer: &[u8], _: GenlHeader) -> Result<Self, DecodeError> {
        let mut kinds = Vec::new();
        each_attribute(buffer, |nest, content| {
            each_attribute(content, |kind, _| {
                kinds.push((nest, kind));
                Ok(())
            })
        })?;
        Ok(Self(kinds))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::tests::is_in_own_namespace;

    #[test]
    #[ignore = "needs a kernel with IPVS: cargo xtask test"]
    fn both_scheduler_probes_agree_and_leave_no_virtual_server() {
        if !is_in_own_namespace("features::tests::both_scheduler_probes_agree_and_leave_no_virtual_server") {
            return;
        }
        let mut client = Client::connect().unwrap();
        let engines = [None, Some("sip".parse().unwrap()), Some("nosuch".parse().unwrap())];
        let unknown: Scheduler = "nosuch".parse().unwrap();
        for scheduler in [Scheduler::RoundRobin, Scheduler::MaglevHashing, unknown] {
            for engine in engines {
                let answers =
                    [SchedulerProbe::Ipv6, SchedulerProbe::Ipv4].map(|probe| probe.has(&mut client, scheduler, engine));
                let answers = answers.map(Result::unwrap);
                let wanted = scheduler != unknown && engine.is_none_or(|engine| engine.as_str() == "sip");
                assert_eq!(answers, [wanted; 2], "{scheduler} {engine:?}");
            }
        }
        assert_eq!(client.virtual_servers().unwrap(), []);
    }
}
