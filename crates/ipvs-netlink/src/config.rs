//! What IPVS is set to, and what it says about itself.

use std::fmt;

/// Seconds an idle connection is kept, for all virtual servers (`ipvsadm --set`). Where they are set, 0 means "as it is". The
/// kernel takes at most `INT_MAX` ticks: 2,147,483 s where it has 1000 of them a second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timeouts {
    /// TCP connections; 900 unless set.
    pub tcp: u32,
    /// TCP connections after a FIN; 120 unless set.
    pub tcp_fin: u32,
    /// UDP flows; 300 unless set.
    pub udp: u32,
}

impl fmt::Display for Timeouts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TCP {} s, TCP after FIN {} s, UDP {} s", self.tcp, self.tcp_fin, self.udp)
    }
}

/// What IPVS says about itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Info {
    /// Major, minor and patch version; 1.2.1 in every Linux since 2.6.28.
    pub version: (u8, u8, u8),
    /// Buckets of the connection table.
    pub connection_table_size: u32,
}

impl Info {
    pub(crate) fn new(version: u32, connection_table_size: u32) -> Self {
        let [_, major, minor, patch] = version.to_be_bytes();
        Self { version: (major, minor, patch), connection_table_size }
    }
}
