//! What IPVS is set to, and what it says about itself.

/// Seconds an idle connection is kept, for all virtual servers (`ipvsadm --set`). To [`Client::set_timeouts`](crate::Client::set_timeouts) 0 means
/// "as it is".
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timeouts {
    /// TCP connections; 900 unless set.
    pub tcp: u32,
    /// TCP connections after a FIN; 120 unless set.
    pub tcp_fin: u32,
    /// UDP flows; 300 unless set.
    pub udp: u32,
}

/// What IPVS says about itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
