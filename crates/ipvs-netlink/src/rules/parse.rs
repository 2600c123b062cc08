//! Reading rules.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::num::{NonZeroU8, NonZeroU16};

use super::error::{Fault, ParseError};
use super::options::{Item, Kind, Word, read, suffix, words};
use crate::config::Timeouts;
use crate::id::{Family, Protocol, VirtualServerId};
use crate::message::Message;
use crate::name::Name;
use crate::real_server::{Forwarding, GueChecksum, RealServer, Tunnel};
use crate::scheduler::{Scheduler, SchedulerFlags};
use crate::sync_daemon::{SyncDaemon, SyncRole};
use crate::virtual_server::{Netmask, Persistence, VirtualServer};

// ipvsadm's: 31 days, its default for -p, and the greatest int.
const LONGEST_TIMEOUT: u32 = 31 * 86_400;
const DEFAULT_TIMEOUT: u32 = 360;
const GREATEST_INT: u32 = i32::MAX as u32;
/// What fits an IPv4 packet beside the headers of IP and UDP.
const LONGEST_SYNC_MESSAGE: u16 = u16::MAX - 20 - 8;

/// The message of a line; none where it is blank or a comment.
pub(super) fn line(line: &str) -> Result<Option<Message>, ParseError> {
    let mut words = words(line).peekable();
    words.next_if(|word| word.text == "ipvsadm");
    let Some(first) = words.peek().copied().filter(|word| !word.text.starts_with('#')) else { return Ok(None) };
    let (items, others) = read(words)?;
    let Some((command, options)) = items.split_first().filter(|(command, _)| command.kind.is_command()) else {
        return Err(first.error(Fault::NoCommand));
    };
    Command::new(*command, options, &others)?.message().map(Some)
}

/// A command with options that go with it, each given once.
struct Command<'a> {
    name: Item<'a>,
    options: &'a [Item<'a>],
    /// Words that belong to no option.
    arguments: &'a [Word<'a>],
}

const VIRTUAL_SERVER: [Kind; 4] = [Kind::TcpService, Kind::UdpService, Kind::SctpService, Kind::FwmarkService];
const FORWARDING: [Kind; 3] = [Kind::Gatewaying, Kind::Ipip, Kind::Masquerading];
const CHECKSUM: [Kind; 3] = [Kind::TunnelNoChecksum, Kind::TunnelChecksum, Kind::TunnelRemoteChecksum];

impl<'a> Command<'a> {
    fn new(name: Item<'a>, options: &'a [Item<'a>], arguments: &'a [Word<'a>]) -> Result<Self, ParseError> {
        for (index, option) in options.iter().enumerate() {
            if option.kind.is_command() {
                return Err(option.word.error(Fault::SecondCommand));
            }
            if !goes_with(name.kind, option.kind) {
                return Err(option.word.error(Fault::NotWith(name.kind.name())));
            }
            let says_the_same = |other: &&Item<'_>| {
                let either = |group: &[Kind]| group.contains(&option.kind) && group.contains(&other.kind);
                // Only -6 may come twice.
                let again = option.kind == other.kind && option.kind != Kind::Ipv6;
                again || either(&VIRTUAL_SERVER) || either(&FORWARDING) || either(&CHECKSUM)
            };
            if let Some(other) = options[..index].iter().find(says_the_same) {
                return Err(option.word.error(Fault::Repeated(other.kind.name())));
            }
        }
        if let Some(word) = arguments.first().filter(|_| name.kind != Kind::Set) {
            let comment = word.text.starts_with('#');
            return Err(word.error(if comment { Fault::Comment } else { Fault::Unexpected }));
        }
        Ok(Self { name, options, arguments })
    }

    fn message(&self) -> Result<Message, ParseError> {
        Ok(match self.name.kind {
            Kind::AddService => Message::AddVirtualServer(self.virtual_server()?),
            Kind::EditService => Message::SetVirtualServer(self.virtual_server()?),
            Kind::DeleteService => Message::DeleteVirtualServer(self.id()?),
            Kind::AddServer => Message::AddRealServer(self.id()?, self.real_server()?),
            Kind::EditServer => Message::SetRealServer(self.id()?, self.real_server()?),
            Kind::DeleteServer => Message::DeleteRealServer(self.id()?, self.real_address()?),
            Kind::Clear => Message::Flush,
            Kind::Zero if self.options.is_empty() => Message::Zero,
            Kind::Zero => Message::ZeroVirtualServer(self.id()?),
            Kind::Set => Message::SetTimeouts(self.timeouts()?),
            Kind::StartDaemon => Message::StartSyncDaemon(self.sync_daemon()?),
            Kind::StopDaemon => Message::StopSyncDaemon(self.role()?),
            _ => return Err(self.name.word.error(Fault::NoCommand)),
        })
    }

    fn option(&self, kind: Kind) -> Option<&Item<'a>> {
        self.one_of(&[kind])
    }

    fn one_of(&self, kinds: &[Kind]) -> Option<&Item<'a>> {
        self.options.iter().find(|option| kinds.contains(&option.kind))
    }

    /// The number an option has, or what it is without the option.
    fn number<T: Copy + Into<i64> + TryFrom<i64>>(
        &self,
        kind: Kind,
        least: T,
        most: T,
    ) -> Result<Option<T>, ParseError> {
        self.option(kind).map(|option| number(option.value(), least, most)).transpose()
    }

    fn id_option(&self) -> Result<&Item<'a>, ParseError> {
        self.one_of(&VIRTUAL_SERVER).ok_or_else(|| self.name.word.error(Fault::NoVirtualServer))
    }

    fn id(&self) -> Result<VirtualServerId, ParseError> {
        let option = self.id_option()?;
        let ipv6 = self.option(Kind::Ipv6);
        let protocol = match option.kind {
            Kind::TcpService => Protocol::Tcp,
            Kind::UdpService => Protocol::Udp,
            Kind::SctpService => Protocol::Sctp,
            _ => {
                let family = match ipv6 {
                    Some(ipv6) if ipv6.word.column < option.word.column => {
                        return Err(ipv6.word.error(Fault::Ipv6WithoutMark));
                    }
                    Some(_) => Family::Ipv6,
                    None => Family::Ipv4,
                };
                return firewall_mark(option.value(), family);
            }
        };
        if let Some(ipv6) = ipv6 {
            return Err(ipv6.word.error(Fault::Ipv6WithoutMark));
        }
        let (address, port) = address(option.value())?;
        Ok(VirtualServerId::Address { protocol, address, port: port.unwrap_or(0) })
    }

    fn virtual_server(&self) -> Result<VirtualServer, ParseError> {
        let id = self.id()?;
        let scheduler = match self.option(Kind::Scheduler) {
            Some(option) => scheduler(option.value())?,
            None => Scheduler::WeightedLeastConnection,
        };
        let persistence = self.persistence(id.family())?;
        if let VirtualServerId::Address { protocol, port, .. } = id {
            if port == 0 && persistence.is_none() {
                return Err(self.id_option()?.value().error(Fault::PortZero));
            }
            if let Some(option) = self.option(Kind::OnePacket).filter(|_| protocol != Protocol::Udp) {
                return Err(option.word.error(Fault::OnePacketWithoutUdp));
            }
        }
        let scheduler_flags = match self.option(Kind::SchedulerFlags) {
            Some(option) => scheduler_flags(option.value(), scheduler)?,
            None => SchedulerFlags::NONE,
        };
        let engine =
            self.option(Kind::Engine).map(|option| name(option.value(), "a persistence engine")).transpose()?;
        let one_packet = self.option(Kind::OnePacket).is_some();
        Ok(VirtualServer { id, scheduler, scheduler_flags, persistence, engine, one_packet })
    }

    fn persistence(&self, family: Family) -> Result<Option<Persistence>, ParseError> {
        let netmask = match self.option(Kind::Netmask) {
            // The address after it would set the mask back, or it would be read as one of the other family.
            Some(option) if option.word.column < self.last_of_id()? => {
                return Err(option.word.error(Fault::BeforeVirtualServer));
            }
            Some(option) => netmask(option.value(), family)?,
            None => Netmask::host(family),
        };
        // A mask alone means nothing to the kernel.
        let Some(option) = self.option(Kind::Persistent) else { return Ok(None) };
        let timeout = option.value.map_or(Ok(DEFAULT_TIMEOUT), |value| number(value, 1, LONGEST_TIMEOUT))?;
        Ok(Some(Persistence { timeout, netmask }))
    }

    /// The column of the last option that says which virtual server it is.
    fn last_of_id(&self) -> Result<usize, ParseError> {
        let options = self.options.iter().filter(|option| option.kind == Kind::Ipv6);
        let ipv6 = options.map(|option| option.word.column).max();
        Ok(self.id_option()?.word.column.max(ipv6.unwrap_or(0)))
    }

    fn real_address(&self) -> Result<SocketAddr, ParseError> {
        let option = self.option(Kind::RealServer).ok_or_else(|| self.name.word.error(Fault::NoRealServer))?;
        let (address, port) = address(option.value())?;
        if port.is_none() && option.word.column < self.id_option()?.word.column {
            return Err(option.word.error(Fault::BeforeVirtualServer));
        }
        let port = port.unwrap_or(match self.id()? {
            VirtualServerId::Address { port, .. } => port,
            VirtualServerId::FirewallMark { .. } => 0,
        });
        Ok(SocketAddr::new(address, port))
    }

    fn real_server(&self) -> Result<RealServer, ParseError> {
        let address = self.real_address()?;
        let forwarding = match self.one_of(&FORWARDING).map(|option| option.kind) {
            Some(Kind::Ipip) => Forwarding::Tunnel(self.tunnel()?),
            Some(Kind::Masquerading) => Forwarding::Masquerade,
            _ => Forwarding::DirectRoute,
        };
        if !matches!(forwarding, Forwarding::Tunnel(_)) {
            let of_tunnel = [&[Kind::TunnelType, Kind::TunnelPort], &CHECKSUM[..]].concat();
            if let Some(option) = self.one_of(&of_tunnel) {
                return Err(option.word.error(Fault::NoTunnel));
            }
            if let Some(option) = self.option(Kind::RealServer)
                && Family::of(address.ip()) != self.id()?.family()
            {
                return Err(option.value().error(Fault::OtherFamily));
            }
        }
        Ok(RealServer {
            forwarding,
            weight: self.number(Kind::Weight, 0, GREATEST_INT)?.unwrap_or(1),
            upper_threshold: self.number(Kind::UpperThreshold, 0, GREATEST_INT)?.unwrap_or(0),
            lower_threshold: self.number(Kind::LowerThreshold, 0, GREATEST_INT)?.unwrap_or(0),
            ..RealServer::new(address)
        })
    }

    fn tunnel(&self) -> Result<Tunnel, ParseError> {
        let kind = self.option(Kind::TunnelType);
        let checksum = self.one_of(&CHECKSUM);
        let port = self.number(Kind::TunnelPort, 1, u16::MAX)?.and_then(NonZeroU16::new);
        let text = kind.map_or("ipip", |option| option.value().text);
        let only = |options: &[Kind], name| match self.one_of(options) {
            Some(option) => Err(option.word.error(Fault::NotWithTunnel(name))),
            None => Ok(()),
        };
        Ok(match (text, kind) {
            ("gue", Some(kind)) => Tunnel::Gue {
                port: port.ok_or_else(|| kind.value().error(Fault::NoTunnelPort))?,
                checksum: match checksum.map(|option| option.kind) {
                    Some(Kind::TunnelChecksum) => GueChecksum::Udp,
                    Some(Kind::TunnelRemoteChecksum) => GueChecksum::Remote,
                    _ => GueChecksum::None,
                },
            },
            ("gre", _) => {
                only(&[Kind::TunnelPort, Kind::TunnelRemoteChecksum], "gre")?;
                Tunnel::Gre { checksum: checksum.is_some_and(|option| option.kind == Kind::TunnelChecksum) }
            }
            ("ipip", _) => {
                only(&[&[Kind::TunnelPort], &CHECKSUM[..]].concat(), "ipip")?;
                Tunnel::IpIp
            }
            (_, kind) => return Err(kind.unwrap_or(&self.name).value().error(Fault::TunnelType)),
        })
    }

    fn timeouts(&self) -> Result<Timeouts, ParseError> {
        if let Some(word) = self.arguments.get(3) {
            return Err(word.error(Fault::Unexpected));
        }
        let &[tcp, tcp_fin, udp] = self.arguments else {
            return Err(self.name.word.error(Fault::ThreeTimeouts));
        };
        let seconds = |word| number(word, 0, LONGEST_TIMEOUT);
        Ok(Timeouts { tcp: seconds(tcp)?, tcp_fin: seconds(tcp_fin)?, udp: seconds(udp)? })
    }

    fn role(&self) -> Result<SyncRole, ParseError> {
        let value = self.name.value();
        match value.text {
            "master" => Ok(SyncRole::Master),
            "backup" => Ok(SyncRole::Backup),
            _ => Err(value.error(Fault::SyncRole)),
        }
    }

    fn sync_daemon(&self) -> Result<SyncDaemon, ParseError> {
        let interface = match self.option(Kind::McastInterface) {
            Some(option) => name(option.value(), "an interface")?,
            None => name(Word { text: "eth0", ..self.name.word }, "an interface")?,
        };
        Ok(SyncDaemon {
            sync_id: self.number(Kind::SyncId, 0, u8::MAX)?.unwrap_or(0),
            max_length: self.number(Kind::SyncMaxLength, 1, LONGEST_SYNC_MESSAGE)?.and_then(NonZeroU16::new),
            group: self.option(Kind::McastGroup).map(|option| multicast_group(option.value())).transpose()?,
            port: self.number(Kind::McastPort, 1, u16::MAX)?.and_then(NonZeroU16::new),
            ttl: self.number(Kind::McastTtl, 1, u8::MAX)?.and_then(NonZeroU8::new),
            ..SyncDaemon::new(self.role()?, interface)
        })
    }
}

/// Whether an option has a meaning for a command.
fn goes_with(command: Kind, option: Kind) -> bool {
    use Kind::{AddServer, AddService, DeleteServer, DeleteService, EditServer, EditService, StartDaemon, Zero};
    match option {
        Kind::TcpService | Kind::UdpService | Kind::SctpService | Kind::FwmarkService | Kind::Ipv6 => {
            matches!(command, AddService | EditService | DeleteService | AddServer | EditServer | DeleteServer | Zero)
        }
        Kind::Scheduler | Kind::Persistent | Kind::Netmask | Kind::Engine | Kind::OnePacket | Kind::SchedulerFlags => {
            matches!(command, AddService | EditService)
        }
        Kind::RealServer => matches!(command, AddServer | EditServer | DeleteServer),
        Kind::McastInterface
        | Kind::SyncId
        | Kind::SyncMaxLength
        | Kind::McastGroup
        | Kind::McastPort
        | Kind::McastTtl => command == StartDaemon,
        _ => matches!(command, AddServer | EditServer),
    }
}

fn number<T: Copy + Into<i64> + TryFrom<i64>>(word: Word<'_>, least: T, most: T) -> Result<T, ParseError> {
    let (least, most) = (least.into(), most.into());
    let number = word.text.parse::<i64>().ok().filter(|number| (least..=most).contains(number));
    number.and_then(|number| T::try_from(number).ok()).ok_or_else(|| word.error(Fault::Number(least, most)))
}

fn name(word: Word<'_>, what: &'static str) -> Result<Name, ParseError> {
    let name = word.text.parse().ok().filter(|_| !word.text.starts_with('-'));
    name.ok_or_else(|| word.error(Fault::Name(what)))
}

fn scheduler(word: Word<'_>) -> Result<Scheduler, ParseError> {
    name(word, "a scheduler")?.as_str().parse().map_err(|_| word.error(Fault::Name("a scheduler")))
}

/// ipvsadm shows marks as signed numbers of 32 bits.
fn firewall_mark(word: Word<'_>, family: Family) -> Result<VirtualServerId, ParseError> {
    let number = word.text.parse::<i64>().ok();
    let mark = number.and_then(|number| match number {
        ..0 => i32::try_from(number).ok().map(i32::cast_unsigned),
        _ => u32::try_from(number).ok(),
    });
    let id = mark.and_then(|mark| VirtualServerId::firewall_mark(mark, family));
    id.ok_or_else(|| word.error(Fault::FirewallMark))
}

/// An address and, where there is one, its port.
fn address(word: Word<'_>) -> Result<(IpAddr, Option<u16>), ParseError> {
    if let Ok(address) = word.text.parse::<Ipv6Addr>() {
        return Ok((address.into(), None));
    }
    let (host, port) = if let Some(rest) = word.text.strip_prefix('[') {
        let (host, after) = rest.split_once(']').ok_or_else(|| word.error(Fault::NotNumeric))?;
        let port = after.strip_prefix(':').ok_or_else(|| word.error(Fault::BracketsWithoutPort))?;
        (host.parse::<Ipv6Addr>().ok().map(IpAddr::from), Some(port))
    } else {
        let (host, port) = word.text.rsplit_once(':').map_or((word.text, None), |(host, port)| (host, Some(port)));
        (host.parse::<Ipv4Addr>().ok().map(IpAddr::from), port)
    };
    let host = host.ok_or_else(|| word.error(Fault::NotNumeric))?;
    let port = port.map(|port| port.parse().map_err(|_| word.error(Fault::Port))).transpose()?;
    Ok((host, port))
}

fn netmask(word: Word<'_>, family: Family) -> Result<Netmask, ParseError> {
    let netmask = match family {
        Family::Ipv4 => word.text.parse().ok().map(Netmask::V4),
        Family::Ipv6 => word.text.parse().ok().and_then(|length| Netmask::prefix(family, length)),
    };
    netmask.ok_or_else(|| word.error(Fault::Netmask(family)))
}

fn scheduler_flags(word: Word<'_>, scheduler: Scheduler) -> Result<SchedulerFlags, ParseError> {
    let mut flags = SchedulerFlags::NONE;
    let mut from = 0;
    for text in word.text.split(',') {
        let flag = Word { text, ..suffix(word, from) };
        from += text.len() + 1;
        if text.is_empty() {
            continue;
        }
        let of_another = match text {
            "sh-fallback" | "sh-port" => scheduler != Scheduler::SourceHashing,
            "mh-fallback" | "mh-port" => scheduler != Scheduler::MaglevHashing,
            _ => false,
        };
        if of_another {
            return Err(flag.error(Fault::OtherSchedulersFlag(scheduler.to_string())));
        }
        flags = flags.union(SchedulerFlags::from_name(text).ok_or_else(|| flag.error(Fault::SchedulerFlag))?);
    }
    Ok(flags)
}

fn multicast_group(word: Word<'_>) -> Result<IpAddr, ParseError> {
    let address = word.text.parse().ok().filter(IpAddr::is_multicast);
    address.ok_or_else(|| word.error(Fault::MulticastGroup))
}
