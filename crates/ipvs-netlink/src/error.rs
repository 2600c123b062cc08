//! Errors: the operation, the object, and what the kernel holds against it.

use std::fmt;

use crate::attributes;
use crate::message::Message;
use netlink_packet_generic::GenlFamily;

// errno.h, the same on every architecture Linux runs on but for values not used here.
const EPERM: i32 = 1;
const ENOENT: i32 = 2;
const ESRCH: i32 = 3;
const EACCES: i32 = 13;
const EEXIST: i32 = 17;
const EINVAL: i32 = 22;
const EAFNOSUPPORT: i32 = 97;
const EOPNOTSUPP: i32 = 95;

/// What kind of failure it is, to match on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The virtual or real server does not exist (`ESRCH`, `ENOENT`).
    NotFound,
    /// It exists already (`EEXIST`).
    Exists,
    /// `CAP_NET_ADMIN` in the initial user namespace is missing (`EPERM`, `EACCES`).
    PermissionDenied,
    /// The kernel has no such scheduler, and could not load its module (`ENOENT` to a new or changed virtual server).
    NoScheduler,
    /// The kernel has no IPVS, or IPVS without this address family or command.
    NotSupported,
    /// The kernel refuses the values (`EINVAL` and the like).
    Invalid,
    /// Anything else, such as a failed socket or lack of memory.
    Other,
}

/// A failed operation.
#[derive(Debug)]
pub struct Error(Box<Failure>);

#[derive(Debug)]
struct Failure {
    operation: &'static str,
    object: String,
    kind: ErrorKind,
    attribute: Option<&'static str>,
    hint: Option<String>,
    source: netlink_batch::Error,
}

impl Error {
    pub(crate) fn new(message: &Message, source: netlink_batch::Error) -> Self {
        let refusal = source.refusal();
        let errno = refusal.map_or(0, |refusal| refusal.errno);
        let attribute = refusal
            .and_then(|refusal| refusal.attribute.or(refusal.missing))
            .map(|attribute| attributes::name(message.command(), attribute));
        let (kind, hint) = match (errno, message) {
            (ENOENT, Message::AddVirtualServer(server) | Message::SetVirtualServer(server)) => (
                ErrorKind::NoScheduler,
                Some(format!(
                    "the kernel has no scheduler \"{0}\"; load it with `modprobe ip_vs_{0}` or choose another",
                    server.scheduler
                )),
            ),
            (ESRCH | ENOENT, _) => (ErrorKind::NotFound, None),
            (EEXIST, _) => (ErrorKind::Exists, None),
            (EPERM | EACCES, _) => {
                (ErrorKind::PermissionDenied, Some("it takes CAP_NET_ADMIN in the initial user namespace".to_owned()))
            }
            (EAFNOSUPPORT | EOPNOTSUPP, _) => (ErrorKind::NotSupported, None),
            (EINVAL | 34, _) => (ErrorKind::Invalid, None),
            _ => (ErrorKind::Other, None),
        };
        Self(Box::new(Failure {
            operation: message.operation(),
            object: message.object(),
            kind,
            attribute,
            hint,
            source,
        }))
    }

    /// The family is missing: the error of connecting.
    pub(crate) fn connecting(source: netlink_batch::Error) -> Self {
        let missing = source.refusal().is_some_and(|refusal| refusal.errno == ENOENT);
        Self(Box::new(Failure {
            operation: "connect to IPVS",
            object: String::new(),
            kind: if missing { ErrorKind::NotSupported } else { ErrorKind::Other },
            attribute: None,
            hint: missing.then(|| "this kernel has no IPVS: load it with `modprobe ip_vs` (CONFIG_IP_VS)".to_owned()),
            source,
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

    /// The name in `linux/ip_vs.h` of the attribute the kernel objects to, where it says so.
    pub fn attribute(&self) -> Option<&'static str> {
        self.0.attribute
    }

    /// The kernel's errno, where it answered.
    pub fn errno(&self) -> Option<i32> {
        self.0.source.refusal().map(|refusal| refusal.errno)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot {}", self.0.operation)?;
        if !self.0.object.is_empty() {
            write!(f, " {}", self.0.object)?;
        }
        write!(f, ": {}", self.0.source)?;
        if let Some(attribute) = self.0.attribute {
            write!(f, " [{attribute}]")?;
        }
        if let Some(hint) = &self.0.hint {
            write!(f, ": {hint}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.0.source)
    }
}
