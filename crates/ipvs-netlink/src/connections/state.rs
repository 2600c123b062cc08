//! The states of connections and templates, by the kernel's names.

use std::fmt;
use std::str::FromStr;

use crate::name::{InvalidName, Name};

/// The state of a connection as the real server has it, guessed from the packets that pass; or that of a template.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum ConnectionState {
    /// `NONE`: a TCP or SCTP connection before its first packet, or a template no connection of which was established
    /// yet.
    None,
    /// `ESTABLISHED`, of TCP and SCTP.
    Established,
    /// `SYN_SENT`, of TCP: the real server has sent a SYN, as in active FTP.
    SynSent,
    /// `SYN_RECV`, of TCP: the client has sent a SYN.
    SynReceived,
    /// `FIN_WAIT`, of TCP: the real server has sent a FIN.
    FinWait,
    /// `TIME_WAIT`, of TCP: both have sent a FIN.
    TimeWait,
    /// `CLOSE`, of TCP: reset, or over.
    Close,
    /// `CLOSE_WAIT`, of TCP: the client has sent a FIN.
    CloseWait,
    /// `LAST_ACK`, of TCP.
    LastAck,
    /// `LISTEN`, of TCP: awaited, as the data connection of FTP is.
    Listen,
    /// `SYNACK`, of TCP: both have sent a SYN, while IPVS defends itself against floods (sysctl `secure_tcp`).
    SynAck,
    /// `UDP`, the only one of UDP.
    Udp,
    /// `INIT1`, of SCTP: the client has sent INIT.
    Init1,
    /// `INIT`, of SCTP: the client has sent INIT again.
    Init,
    /// `C-SENT`, of SCTP: the real server has answered with INIT ACK and its cookie.
    CookieSent,
    /// `C-REPLIED`, of SCTP: the client has sent the cookie back.
    CookieReplied,
    /// `C-WAIT`, of SCTP: the real server has sent INIT.
    CookieWait,
    /// `COOKIE`, of SCTP: the client has answered the real server's INIT with INIT ACK and its cookie.
    Cookie,
    /// `C-ECHOED`, of SCTP: the real server has sent the cookie back.
    CookieEchoed,
    /// `S-SENT`, of SCTP: the real server has sent SHUTDOWN.
    ShutdownSent,
    /// `S-RECEIVED`, of SCTP: the client has sent SHUTDOWN.
    ShutdownReceived,
    /// `S-ACK-SENT`, of SCTP: the real server has sent SHUTDOWN ACK.
    ShutdownAckSent,
    /// `REJECTED`, of SCTP: INIT was answered with ABORT.
    Rejected,
    /// `CLOSED`, of SCTP.
    Closed,
    /// `ASSURED`, of templates, since Linux 4.19: a connection of it was established, or a UDP flow of it answered.
    Assured,
    /// One that this crate does not know; or `ERR!`, `BUG!` or `?`, which the kernel writes for numbers without a name.
    Other(Name),
}

impl ConnectionState {
    /// The states of Linux 6.1.
    pub const ALL: [Self; 25] = [
        Self::None,
        Self::Established,
        Self::SynSent,
        Self::SynReceived,
        Self::FinWait,
        Self::TimeWait,
        Self::Close,
        Self::CloseWait,
        Self::LastAck,
        Self::Listen,
        Self::SynAck,
        Self::Udp,
        Self::Init1,
        Self::Init,
        Self::CookieSent,
        Self::CookieReplied,
        Self::CookieWait,
        Self::Cookie,
        Self::CookieEchoed,
        Self::ShutdownSent,
        Self::ShutdownReceived,
        Self::ShutdownAckSent,
        Self::Rejected,
        Self::Closed,
        Self::Assured,
    ];

    /// The kernel's name of it.
    pub fn name(&self) -> &str {
        match self {
            Self::None => "NONE",
            Self::Established => "ESTABLISHED",
            Self::SynSent => "SYN_SENT",
            Self::SynReceived => "SYN_RECV",
            Self::FinWait => "FIN_WAIT",
            Self::TimeWait => "TIME_WAIT",
            Self::Close => "CLOSE",
            Self::CloseWait => "CLOSE_WAIT",
            Self::LastAck => "LAST_ACK",
            Self::Listen => "LISTEN",
            Self::SynAck => "SYNACK",
            Self::Udp => "UDP",
            Self::Init1 => "INIT1",
            Self::Init => "INIT",
            Self::CookieSent => "C-SENT",
            Self::CookieReplied => "C-REPLIED",
            Self::CookieWait => "C-WAIT",
            Self::Cookie => "COOKIE",
            Self::CookieEchoed => "C-ECHOED",
            Self::ShutdownSent => "S-SENT",
            Self::ShutdownReceived => "S-RECEIVED",
            Self::ShutdownAckSent => "S-ACK-SENT",
            Self::Rejected => "REJECTED",
            Self::Closed => "CLOSED",
            Self::Assured => "ASSURED",
            Self::Other(name) => name.as_str(),
        }
    }
}

impl fmt::Display for ConnectionState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for ConnectionState {
    type Err = InvalidName;

    fn from_str(name: &str) -> Result<Self, InvalidName> {
        match Self::ALL.iter().find(|state| state.name() == name) {
            Some(state) => Ok(*state),
            None => name.parse().map(Self::Other),
        }
    }
}
