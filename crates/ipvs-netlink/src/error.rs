//! Errors: the operation, the object, and what the kernel holds against it.

use std::borrow::Cow;
use std::fmt;
use std::net::IpAddr;

use netlink_batch::Refusal;

use crate::errno::{
    EACCES, EAFNOSUPPORT, EEXIST, EINTR, EINVAL, ENETUNREACH, ENODEV, ENOENT, EOPNOTSUPP, EPERM, ERANGE, ESRCH,
};
use crate::id::{Family, VirtualServerId};
use crate::message::Message;
use crate::real_server::{Forwarding, RealServer, TUNNEL_TYPE_GUE, Tunnel};
use crate::virtual_server::{Netmask, VirtualServer};

/// What kind of failure it is, to match on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The virtual or real server, synchronization daemon or its interface does not exist (`ESRCH`, `ENOENT`, `ENODEV`).
    NotFound,
    /// It exists already (`EEXIST`).
    Exists,
    /// `CAP_NET_ADMIN` in the initial user namespace is missing (`EPERM`, `EACCES`).
    PermissionDenied,
    /// The kernel has no such scheduler, or persistence engine where one was asked for, and could not load its module
    /// (`ENOENT` to a new or changed virtual server).
    NoScheduler,
    /// The kernel has no IPVS, or IPVS without this address family or command.
    NotSupported,
    /// The kernel refuses the values (`EINVAL` and the like).
    Invalid,
    /// Others changed a list during each attempt to read it: read it again.
    Interrupted,
    /// Anything else, such as a failed socket or lack of memory.
    Other,
}

/// A failed operation. The text has the cause in it, so there is no `source` that would be shown twice; and it is the same
/// with `{:?}`, which is how Rust shows what `main` returns.
pub struct Error(Box<Failure>);

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

struct Failure {
    operation: &'static str,
    object: String,
    kind: ErrorKind,
    hint: Option<Cow<'static, str>>,
    cause: Cause,
}

enum Cause {
    Netlink(netlink_batch::Error),
    /// Found out before anything was sent.
    Own(&'static str),
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Netlink(error) => error.fmt(f),
            Self::Own(text) => f.write_str(text),
        }
    }
}

impl Error {
    /// What is wrong with a message that was not sent for that reason.
    pub(crate) fn fault(message: &Message, fault: &'static str) -> Self {
        Self(Box::new(Failure {
            operation: message.operation(),
            object: message.object(),
            kind: ErrorKind::Invalid,
            hint: None,
            cause: Cause::Own(fault),
        }))
    }

    /// Whether what the kernel refused was carried out all the same: a daemon that is stopped before its thread has begun
    /// is gone, and the kernel says `EINTR` (`stop_sync_thread`, `kthread_stop`).
    pub(crate) fn is_success_of(message: &Message, cause: &netlink_batch::Error) -> bool {
        matches!(message, Message::StopSyncDaemon(_)) && cause.refusal().is_some_and(|refusal| refusal.errno == EINTR)
    }

    pub(crate) fn new(message: &Message, cause: netlink_batch::Error) -> Self {
        let errno = cause.refusal().map_or(0, |refusal| refusal.errno);
        let (kind, hint) = match cause {
            netlink_batch::Error::Interrupted { .. } => (ErrorKind::Interrupted, None),
            _ => kind_and_hint(errno, message),
        };
        Self(Box::new(Failure {
            operation: message.operation(),
            object: message.object(),
            kind,
            hint,
            cause: Cause::Netlink(cause),
        }))
    }

    /// The family is missing: the error of connecting.
    pub(crate) fn connecting(cause: netlink_batch::Error) -> Self {
        let missing = cause.refusal().is_some_and(|refusal| refusal.errno == ENOENT);
        Self(Box::new(Failure {
            operation: "connect to IPVS",
            object: String::new(),
            kind: if missing { ErrorKind::NotSupported } else { ErrorKind::Other },
            hint: missing.then(|| "this kernel has no IPVS: load it with `modprobe ip_vs` (CONFIG_IP_VS)".into()),
            cause: Cause::Netlink(cause),
        }))
    }

    /// The kernel has no IPVS any more.
    pub(crate) fn unloaded(message: &Message, cause: netlink_batch::Error) -> Self {
        Self(Box::new(Failure {
            operation: message.operation(),
            object: message.object(),
            kind: ErrorKind::NotSupported,
            hint: Some("the module ip_vs was unloaded: load it with `modprobe ip_vs`".into()),
            cause: Cause::Netlink(cause),
        }))
    }

    /// A batch of which it is not known what was carried out.
    pub(crate) fn batch(messages: usize, cause: netlink_batch::Error) -> Self {
        Self(Box::new(Failure {
            operation: "carry out",
            object: format!("a batch of {messages} changes"),
            kind: ErrorKind::Other,
            hint: None,
            cause: Cause::Netlink(cause),
        }))
    }

    /// The kind of failure.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// What was to be done, as in `add virtual server`.
    pub fn operation(&self) -> &'static str {
        self.0.operation
    }

    /// What it was to be done to, as in `TCP 10.0.0.1:80`; may be empty.
    pub fn object(&self) -> &str {
        &self.0.object
    }

    /// The kernel's answer with its errno and, where it gives them, its own words and the attribute it objects to. (IPVS
    /// itself names no attribute up to Linux 6.1; the generic netlink layer before it does.)
    pub fn refusal(&self) -> Option<&Refusal> {
        match &self.0.cause {
            Cause::Netlink(error) => error.refusal(),
            Cause::Own(_) => None,
        }
    }
}

/// What kind of failure an errno is for a message, and what to do about it.
fn kind_and_hint(errno: i32, message: &Message) -> (ErrorKind, Option<Cow<'static, str>>) {
    use Message::{AddRealServer, AddVirtualServer, SetRealServer, SetVirtualServer};

    let (kind, hint) = match (errno, message) {
        (ENOENT, AddVirtualServer(server) | SetVirtualServer(server)) => {
            return (ErrorKind::NoScheduler, Some(no_scheduler(server).into()));
        }
        (ENODEV, Message::StartSyncDaemon(_)) => (ErrorKind::NotFound, "this network namespace has no such interface"),
        (ENETUNREACH, Message::StartSyncDaemon(_)) => {
            (ErrorKind::Other, "the interface is down, or has no route or address for the multicast group")
        }
        (ESRCH, Message::StopSyncDaemon(_)) => (ErrorKind::NotFound, "none runs"),
        (ESRCH, _) => (ErrorKind::NotFound, "there is no such virtual server"),
        (ENOENT, _) => (ErrorKind::NotFound, "the virtual server has no such real server"),
        (EPERM | EACCES, _) => (ErrorKind::PermissionDenied, "it requires CAP_NET_ADMIN in the initial user namespace"),
        (EAFNOSUPPORT, _) => {
            (ErrorKind::NotSupported, "IPVS has no IPv6 here: CONFIG_IP_VS_IPV6 is off, or ipv6.disable=1 is set")
        }
        (ERANGE, AddRealServer(_, server) | SetRealServer(_, server)) => (ErrorKind::Invalid, out_of_range(server)),
        (EINVAL, AddVirtualServer(server) | SetVirtualServer(server)) => {
            return (ErrorKind::Invalid, invalid_virtual_server(server).map(Into::into));
        }
        (EINVAL, AddRealServer(id, server)) => {
            let hint = invalid_real_server(id, server, invalid_address(server.address)).or(match server.address {
                IpAddr::V4(_) => Some(NO_LOCAL_TABLE),
                IpAddr::V6(_) => None,
            });
            return (ErrorKind::Invalid, hint.map(Into::into));
        }
        // The address of one that exists is not looked at again.
        (EINVAL, SetRealServer(id, server)) => {
            return (ErrorKind::Invalid, invalid_real_server(id, server, None).map(Into::into));
        }
        (EINVAL, Message::StartSyncDaemon(daemon)) if daemon.group.is_some_and(|group| !group.is_multicast()) => {
            (ErrorKind::Invalid, "the group is not a multicast address")
        }
        (EINVAL, Message::StartSyncDaemon(_)) => {
            (ErrorKind::Invalid, "no daemon runs while a tunnel leads to a real server of the other address family")
        }
        (EINVAL, Message::SetTimeouts(_)) => {
            (ErrorKind::Invalid, "a timeout is at most 2147483 s where the kernel has 1000 ticks a second")
        }
        (EEXIST, _) => return (ErrorKind::Exists, None),
        (EOPNOTSUPP, _) => return (ErrorKind::NotSupported, None),
        (EINVAL | ERANGE, _) => return (ErrorKind::Invalid, None),
        _ => return (ErrorKind::Other, None),
    };
    (kind, Some(hint.into()))
}

fn out_of_range(server: &RealServer) -> &'static str {
    if i32::try_from(server.weight).is_err() {
        "a weight is at most 2147483647"
    } else {
        "the lower threshold is at most the upper one"
    }
}

fn invalid_virtual_server(server: &VirtualServer) -> Option<&'static str> {
    match server.persistence?.netmask {
        Netmask::V6(1..=128) | Netmask::V4(_) => None,
        Netmask::V6(_) => Some("the netmask of persistence is for IPv6 a prefix length from 1 to 128"),
    }
}

/// Without its table of local addresses, which comes with the first IPv4 address of a network namespace, the kernel takes every
/// IPv4 address for a broadcast address (`__inet_dev_addr_type`).
const NO_LOCAL_TABLE: &str = "the address is the broadcast address of a network here, or this network namespace never had an \
                              IPv4 address: bring its interface lo up";

/// Why the kernel refuses a real server, as far as its values tell: in the order in which the kernel looks at them
/// (`ip_vs_genl_set_cmd`, `ip_vs_add_dest`).
fn invalid_real_server(
    id: &VirtualServerId,
    server: &RealServer,
    invalid_address: Option<&'static str>,
) -> Option<&'static str> {
    let is_of_other_family = Family::of(server.address) != id.family();
    match server.forwarding {
        Forwarding::Tunnel(_) => {}
        _ if is_of_other_family => return Some("only a tunnel leads to a real server of the other address family"),
        _ => {}
    }
    if i32::try_from(server.upper_threshold).is_err() {
        return Some("this kernel takes upper thresholds of at most 2147483647");
    }
    if let Forwarding::Tunnel(Tunnel::Other { kind: TUNNEL_TYPE_GUE, port: 0, .. }) = server.forwarding {
        return Some("generic UDP encapsulation needs a port");
    }
    let daemon = "no tunnel leads to the other address family while a synchronization daemon runs";
    invalid_address.or(is_of_other_family.then_some(daemon))
}

fn invalid_address(address: IpAddr) -> Option<&'static str> {
    let (is_unicast, is_link_local) = match address {
        IpAddr::V4(v4) => (!(v4.is_unspecified() || v4.is_broadcast() || v4.is_multicast()), false),
        IpAddr::V6(v6) => {
            (!(v6.is_unspecified() || v6.is_multicast() || v6.to_ipv4_mapped().is_some()), v6.is_unicast_link_local())
        }
    };
    match (is_unicast, is_link_local) {
        (false, _) => Some("the address is not a unicast address"),
        (true, true) => Some("a link-local address has to be one of this network namespace's own"),
        (true, false) => None,
    }
}

fn no_scheduler(server: &VirtualServer) -> String {
    let scheduler = server.scheduler;
    match server.engine {
        None => {
            format!(
                "the kernel has no scheduler \"{scheduler}\"; load it with `modprobe ip_vs_{scheduler}` or choose another"
            )
        }
        Some(engine) => format!(
            "the kernel has no scheduler \"{scheduler}\" or no persistence engine \"{engine}\"; load them with `modprobe -a \
             ip_vs_{scheduler} ip_vs_pe_{engine}` or choose others"
        ),
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot {}", self.0.operation)?;
        if !self.0.object.is_empty() {
            write!(f, " {}", self.0.object)?;
        }
        write!(f, ": {}", self.0.cause)?;
        if let Some(hint) = &self.0.hint {
            write!(f, ": {hint}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::Client;
    use crate::client::tests::{is_in_own_namespace, web};

    #[test]
    #[ignore = "needs a kernel with IPVS: cargo xtask test"]
    fn a_namespace_whose_lo_was_never_up_takes_no_ipv4_real_server() {
        if !is_in_own_namespace("error::tests::a_namespace_whose_lo_was_never_up_takes_no_ipv4_real_server") {
            return;
        }
        let mut client = Client::connect().unwrap();
        client.add_virtual_server(&web()).unwrap();
        for address in ["10.1.0.7:80", "127.0.0.1:80", "192.0.2.255:80"] {
            let server = RealServer::new(address.parse().unwrap());
            let error = client.add_real_server(&web().id, &server).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Invalid);
            assert!(error.to_string().ends_with(NO_LOCAL_TABLE), "{error}");
        }
        let tunnel = Forwarding::Tunnel(Tunnel::IpIp);
        let server = RealServer { forwarding: tunnel, ..RealServer::new("[fd00:1::7]:80".parse().unwrap()) };
        client.add_real_server(&web().id, &server).unwrap();
        client.features(&[]).unwrap();
    }

    #[cfg(feature = "fake")]
    #[test]
    fn without_an_ipv4_address_the_fake_takes_no_ipv4_real_server() {
        let mut ipvs = crate::fake::Ipvs::default();
        let server = RealServer::new("10.1.0.7:80".parse().unwrap());
        ipvs.add_virtual_server(&web()).unwrap();
        ipvs.kernel.addresses.retain(|(address, _)| address.is_ipv6());
        let error = ipvs.add_real_server(&web().id, &server).unwrap_err();
        assert!(error.to_string().ends_with(NO_LOCAL_TABLE), "{error}");
        ipvs.kernel.addresses.insert(("127.0.0.1".parse().unwrap(), 8));
        ipvs.add_real_server(&web().id, &server).unwrap();
    }
}
