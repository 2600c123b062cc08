//! A claim on a network namespace that only a process with `CAP_NET_ADMIN` there can make, that one process at a time
//! can hold, and that the kernel ends with the process, however it ends.
//!
//! The claim is an empty table of `nf_tables` with an owner (`NFT_TABLE_F_OWNER`, Linux 5.12 and later): the kernel
//! deletes it when the netlink socket that made it is closed, and refuses changes by any other socket. On an older
//! kernel it is a group of `nfnetlink_log`, which belongs to the socket that bound it; nothing is logged to it.
//!
//! Both need `CAP_NET_ADMIN` in the user namespace that owns the network namespace. So a user without privileges, root of
//! a user namespace, and root without this capability can neither make a claim nor be taken for a process that made one.

use std::fs;
use std::os::fd::{AsFd, OwnedFd};

use netlink_batch::protocols::NETLINK_NETFILTER;
use netlink_batch::{Error, Refusal, Request, Socket};
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_netfilter::nflog::{ConfigCmd, ConfigNla, ULogMessage};
use netlink_packet_netfilter::nftables::{NfTablesMessage, TableAttribute, TableFlags, TableMessage};
use netlink_packet_netfilter::{NetfilterHeader, NetfilterMessage, NetfilterProtoFamily};
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::sockopt::{socket_domain, socket_protocol};
use rustix::net::{AddressFamily, getsockname};

use super::errno::{EBUSY, EEXIST, EINVAL, ENOENT, EOPNOTSUPP, EPERM};
use super::filter::message::Transaction;
use super::filter::read::RawMessage;

/// The table, of family `ip`.
pub const TABLE: &str = "kube-ipvs-instance";
/// The group of `nfnetlink_log` for kernels whose tables have no owners. Programs that use such groups number them from 0.
pub const LOG_GROUP: u16 = 50_105;

/// How often making the table is tried while other processes make and delete it.
const ATTEMPTS: u32 = 5;
/// `NFTA_TABLE_OWNER`.
const NFTA_TABLE_OWNER: u16 = 7;
/// What a table that has outlived its owner has. It is the port of the kernel, and of no process.
const NO_OWNER: u32 = 0;

/// What came of an attempt to claim the network namespace.
#[derive(Debug)]
pub enum Claim {
    /// This process has it, as long as a duplicate of this socket is open.
    Ours(OwnedFd),
    /// Another process has it: the one with this netlink port, in `ip` table [`TABLE`] or log group [`LOG_GROUP`].
    Taken {
        /// The port as `ss -f netlink` shows it; mostly the process id.
        port: Option<u32>,
    },
    /// The kernel can do neither, or failed.
    Unknown(String),
}

/// How a claim is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// A table of `nf_tables` with an owner.
    Table,
    /// A group of `nfnetlink_log`.
    LogGroup,
}

/// Claims the network namespace of the calling thread, in the best way that the kernel has. `inherited` is the socket of a
/// claim that this process made before it executed itself.
pub fn claim(inherited: Option<OwnedFd>) -> Claim {
    let inherited = inherited.and_then(|socket| Some((port(&socket)?, socket)));
    for method in [Method::Table, Method::LogGroup] {
        if let Some(claim) = claim_by(method, inherited.as_ref()) {
            return claim;
        }
    }
    Claim::Unknown("the kernel has neither tables with owners (Linux 5.12) nor the module nfnetlink_log".to_owned())
}

/// Claims the network namespace in one way. `None` if the kernel does not have it.
pub fn claim_by(method: Method, inherited: Option<&(u32, OwnedFd)>) -> Option<Claim> {
    let claim = || {
        let mut socket = Socket::open(NETLINK_NETFILTER)?;
        let owner = match method {
            Method::Table => claim_table(&mut socket, inherited.map(|(port, _)| *port))?,
            Method::LogGroup => claim_log_group(&mut socket, inherited.map(|(port, _)| *port))?,
        };
        Ok(owner.map(|owner| (owner, socket)))
    };
    let socket = match claim() {
        Ok(None) => return None,
        Ok(Some((Owner::This, socket))) => socket.as_fd().try_clone_to_owned(),
        Ok(Some((Owner::Inherited, _))) => inherited?.1.try_clone(),
        Ok(Some((Owner::Other(port), _))) => return Some(Claim::Taken { port }),
        Err(error) => return Some(Claim::Unknown(Error::to_string(&error))),
    };
    Some(socket.map_or_else(|error| Claim::Unknown(error.to_string()), Claim::Ours))
}

/// The port of a socket of nfnetlink; `None` for any other file.
pub fn port(socket: &OwnedFd) -> Option<u32> {
    let is_netfilter = socket_domain(socket).ok()? == AddressFamily::NETLINK
        && socket_protocol(socket).ok().flatten()?.as_raw().get() == u32::try_from(NETLINK_NETFILTER).ok()?;
    is_netfilter
        .then(|| SocketAddrNetlink::try_from(getsockname(socket).ok()?).ok().map(|address| address.pid()))
        .flatten()
}

/// Which socket has the claim.
enum Owner {
    /// The one that asked for it.
    This,
    /// The one that this process had before.
    Inherited,
    /// One of another process, with this port if it is known.
    Other(Option<u32>),
}

/// `None` if tables have no owners.
fn claim_table(socket: &mut Socket, inherited: Option<u32>) -> Result<Option<Owner>, Error> {
    let mut refused = None;
    for _ in 0..ATTEMPTS {
        let table = find_table(socket)?;
        match table {
            // No process has it: somebody has loaded a saved ruleset, for example. It is replaced.
            Some(NO_OWNER) | None => {}
            Some(port) if inherited == Some(port) => return Ok(Some(Owner::Inherited)),
            Some(port) => return Ok(Some(Owner::Other(Some(port)))),
        }
        match make_table(socket, table.is_some())? {
            Ok(()) => return Ok(Some(Owner::This)),
            Err(refusal) if [EINVAL, EOPNOTSUPP].contains(&refusal.errno) => return Ok(None),
            // Another process has made, replaced or deleted it in between.
            Err(refusal) if [EEXIST, EPERM, ENOENT].contains(&refusal.errno) => refused = Some(refusal),
            Err(refusal) => return Err(refusal.into()),
        }
    }
    refused.map_or(Ok(None), |refusal| Err(refusal.into()))
}

/// The port of the table's owner, or [`NO_OWNER`], if there is a table.
fn find_table(socket: &mut Socket) -> Result<Option<u32>, Error> {
    let mut found = None;
    let message = NfTablesMessage::GetTable(TableMessage { attributes: vec![TableAttribute::Name(TABLE.into())] });
    let result = socket.request(&Request::from(of_ip(message)), |table: RawMessage| {
        found = Some(table.number(NFTA_TABLE_OWNER).unwrap_or(NO_OWNER));
    });
    match result {
        Err(Error::Refused(refusal)) if refusal.errno == ENOENT => Ok(None),
        result => result.map(|()| found),
    }
}

fn make_table(socket: &mut Socket, replaces: bool) -> Result<Result<(), Refusal>, Error> {
    let name = || TableAttribute::Name(TABLE.into());
    let delete = NfTablesMessage::DeleteTable(TableMessage { attributes: vec![name()] });
    let attributes = vec![name(), TableAttribute::Flags(TableFlags::Owner)];
    let make = NfTablesMessage::NewTable(TableMessage { attributes });
    let requests = replaces.then(|| Request::from(of_ip(delete)));
    let requests = requests.into_iter().chain([Request { message: of_ip(make), flags: NLM_F_CREATE | NLM_F_EXCL }]);
    let (begin, end) = Transaction::begin_and_end();
    Ok(socket.transaction(&begin, requests, &end)?.map_err(|(_, refusal)| refusal))
}

fn of_ip(message: NfTablesMessage) -> NetfilterMessage {
    NetfilterMessage::new(NetfilterHeader::new(NetfilterProtoFamily::IPv4, 0, 0), message)
}

/// `None` if the kernel has no `nfnetlink_log`.
fn claim_log_group(socket: &mut Socket, inherited: Option<u32>) -> Result<Option<Owner>, Error> {
    let message = ULogMessage::Config(vec![ConfigNla::Cmd(ConfigCmd::Bind)]);
    let header = NetfilterHeader::new(NetfilterProtoFamily::Unspec, 0, LOG_GROUP);
    let result = socket.request(&Request::from(NetfilterMessage::new(header, message)), |_: RawMessage| {});
    let refusal = match result {
        Ok(()) => return Ok(Some(Owner::This)),
        Err(Error::Refused(refusal)) => refusal,
        Err(error) => return Err(error),
    };
    match refusal.errno {
        // nfulnl_recv_config: EPERM if the group is another socket's, and nfnetlink_rcv: if the capability is missing.
        EPERM | EBUSY => {
            let port = log_group_port();
            Ok(port.map(|port| if inherited == Some(port) { Owner::Inherited } else { Owner::Other(Some(port)) }))
        }
        // nfnetlink knows no such subsystem.
        EINVAL | EOPNOTSUPP => Ok(None),
        _ => Err(refusal.into()),
    }
}

/// The port that the group belongs to, of which the kernel has a line "group port ...".
fn log_group_port() -> Option<u32> {
    let lines = fs::read_to_string("/proc/thread-self/net/netfilter/nfnetlink_log").ok()?;
    lines.lines().find_map(|line| {
        let mut numbers = line.split_ascii_whitespace();
        (numbers.next()?.parse() == Ok(LOG_GROUP)).then(|| numbers.next()?.parse().ok())?
    })
}
