//! Counters and rates of a virtual or real server.

use netlink_packet_core::{DecodeError, parse_u32, parse_u64};

use crate::attributes::each_attribute;

/// What has passed, and how fast it passes, as of up to two seconds ago: so often the kernel's estimation brings both up to
/// date. Where that is off (the sysctl `run_estimation`) they stay as they are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// How wide the counters are, beyond which they begin anew at 0.
    pub width: StatsWidth,
    /// Connections scheduled.
    pub connections: u64,
    /// Packets from clients.
    pub incoming_packets: u64,
    /// Packets to clients; stays 0 where replies do not pass IPVS.
    pub outgoing_packets: u64,
    /// Bytes from clients.
    pub incoming_bytes: u64,
    /// Bytes to clients.
    pub outgoing_bytes: u64,
    /// New connections a second, as estimated by the kernel.
    pub connection_rate: u64,
    /// Packets from clients a second.
    pub incoming_packet_rate: u64,
    /// Packets to clients a second.
    pub outgoing_packet_rate: u64,
    /// Bytes from clients a second.
    pub incoming_byte_rate: u64,
    /// Bytes to clients a second.
    pub outgoing_byte_rate: u64,
}

/// How wide the kernel's counters are as it tells them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum StatsWidth {
    /// Connections, packets and all rates have 32 bits, and wrap; bytes have 64 (`IPVS_*_ATTR_STATS`, kernels before 4.1).
    Bits32,
    /// All have 64 bits (`IPVS_*_ATTR_STATS64`).
    #[default]
    Bits64,
}

impl Stats {
    /// What is listed in both widths, or on old kernels in 32 bits.
    pub(crate) fn listed(stats64: Option<&[u8]>, stats32: Option<&[u8]>) -> Result<Self, DecodeError> {
        match (stats64, stats32) {
            (Some(stats), _) => Self::parse(StatsWidth::Bits64, stats),
            (None, Some(stats)) => Self::parse(StatsWidth::Bits32, stats),
            (None, None) => Ok(Self::default()),
        }
    }

    /// Reads either form: the two differ in the width of their numbers only.
    fn parse(width: StatsWidth, buffer: &[u8]) -> Result<Self, DecodeError> {
        let mut stats = Self { width, ..Self::default() };
        each_attribute(buffer, |kind, value| {
            // IPVS_STATS_ATTR_*, in the order of the header.
            let field = match kind {
                1 => &mut stats.connections,
                2 => &mut stats.incoming_packets,
                3 => &mut stats.outgoing_packets,
                4 => &mut stats.incoming_bytes,
                5 => &mut stats.outgoing_bytes,
                6 => &mut stats.connection_rate,
                7 => &mut stats.incoming_packet_rate,
                8 => &mut stats.outgoing_packet_rate,
                9 => &mut stats.incoming_byte_rate,
                10 => &mut stats.outgoing_byte_rate,
                _ => return Ok(()),
            };
            *field = if value.len() == 4 { u64::from(parse_u32(value)?) } else { parse_u64(value)? };
            Ok(())
        })?;
        Ok(stats)
    }
}
