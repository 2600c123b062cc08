//! What can be wrong with a line, and what no line can say.

use crate::id::{Family, Protocol};
use crate::real_server::{Forwarding, Tunnel};

/// A line that is no rule: where, and what would be right.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}, column {column}: {word:?} {fault}")]
#[non_exhaustive]
pub struct ParseError {
    /// The number of the line, from 1 on.
    pub line: usize,
    /// The character of the line, from 1 on.
    pub column: usize,
    /// The word that is wrong, or for what is missing the one that asks for it.
    pub word: String,
    pub(super) fault: Fault,
}

/// Goes on where the word ends: `"-x" takes no value`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Fault {
    #[error(
        "is no command, with which a rule begins: -A, -E, -D, -a, -e, -d, -C, -Z, --set, --start-daemon or --stop-daemon"
    )]
    NoCommand,
    #[error("is a second command: each has a line of its own")]
    SecondCommand,
    #[error("is no option of a rule")]
    UnknownOption,
    #[error("does not go with {0}")]
    NotWith(&'static str),
    #[error("repeats or contradicts {0}")]
    Repeated(&'static str),
    #[error("takes no value")]
    UnwantedValue,
    #[error("needs a value: {0}")]
    NoValue(&'static str),
    #[error("is neither an option nor the value of one")]
    Unexpected,
    #[error("is a comment where none can be: a comment has a line of its own")]
    Comment,
    #[error("needs a virtual server: -t, -u or --sctp-service with address:port, or -f with a firewall mark")]
    NoVirtualServer,
    #[error("needs a real server: -r with address:port")]
    NoRealServer,
    #[error("has to come after the virtual server (-t, -u, --sctp-service or -f)")]
    BeforeVirtualServer,
    #[error(
        "is not address:port, as in 10.0.0.1:80 or [fd00::1]:80, in numbers: names are not looked up (ipvsadm -Sn, with -n, \
         writes none)"
    )]
    NotNumeric,
    #[error(
        "has a port that is no number from 0 to 65535: names are not looked up (ipvsadm -Sn, with -n, writes none)"
    )]
    Port,
    #[error("has no port: an IPv6 address in brackets is followed by one, as in [fd00::1]:80")]
    BracketsWithoutPort,
    #[error("is no number from {0} to {1}")]
    Number(i64, i64),
    #[error("is no firewall mark: a number from 1 to 4294967295")]
    FirewallMark,
    #[error("goes with -f, a firewall mark, and comes after it")]
    Ipv6WithoutMark,
    #[error("cannot be the name of {0}: 1 to 15 bytes, the first no hyphen")]
    Name(&'static str),
    #[error("is no scheduler flag: flag-1, flag-2, flag-3; with sh sh-fallback, sh-port; with mh mh-fallback, mh-port")]
    SchedulerFlag,
    #[error("is a flag of another scheduler than {0}")]
    OtherSchedulersFlag(String),
    #[error("is no mask: {}", match .0 {
        Family::Ipv4 => "for IPv4 one has four parts, as in 255.255.255.0",
        Family::Ipv6 => "for IPv6 it is a prefix length from 1 to 128",
    })]
    Netmask(Family),
    #[error("has no port, or port 0, which takes persistence (-p)")]
    PortZero,
    #[error("is for UDP (-u) and firewall marks (-f)")]
    OnePacketWithoutUdp,
    #[error("is of another address family than the virtual server, where only a tunnel (-i) leads")]
    OtherFamily,
    #[error("goes with a tunnel (-i)")]
    NoTunnel,
    #[error("is no tunnel type: ipip, gue or gre")]
    TunnelType,
    #[error("needs a port: --tun-port")]
    NoTunnelPort,
    #[error("does not go with the tunnel type {0}")]
    NotWithTunnel(&'static str),
    #[error("is neither master nor backup")]
    SyncRole,
    #[error("is no multicast address, as 224.0.0.81 or ff02::81")]
    MulticastGroup,
    #[error("needs three timeouts in seconds: TCP, TCP after FIN, UDP")]
    ThreeTimeouts,
}

/// A message that no rule can say.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FormatError {
    /// The message asks or answers, and changes nothing.
    #[error("only what changes something is a rule")]
    NoChange,
    /// A protocol for which ipvsadm has no option.
    #[error("no rule can name {0}: ipvsadm knows TCP, UDP and SCTP")]
    Protocol(Protocol),
    /// A forwarding method for which ipvsadm has no option.
    #[error("no rule can name the forwarding method \"{0}\": ipvsadm knows masquerade, tunnel and direct-route")]
    Forwarding(Forwarding),
    /// A tunnel for which ipvsadm has no options.
    #[error("no rule can name {0:?}: ipvsadm knows IP in IP, GUE and GRE")]
    Tunnel(Tunnel),
    /// A value that ipvsadm refuses; the error is that of reading the rule.
    #[error("ipvsadm takes no such rule: {:?} {}", .0.word, .0.fault)]
    Value(ParseError),
    /// The line would mean something else.
    #[error("{0:?} would be read as something else")]
    Ambiguous(String),
}
