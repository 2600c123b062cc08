//! The flags of connection tracking.

use std::time::Duration;

use crate::go;

/// More than this kube-proxy does not derive from the number of processors.
const MOST: u64 = 1 << 20;
/// The kernel's numbers have a sign.
const LARGEST: i64 = i32::MAX as i64;

#[derive(Debug, clap::Args)]
pub(crate) struct Conntrack {
    /// How many connections to track for each processor; 0 leaves the kernel's limit
    #[arg(long = "conntrack-max-per-core", value_name = "NUMBER", default_value = "32768",
        value_parser = clap::value_parser!(u32).range(0..=LARGEST))]
    pub(crate) max_per_core: u32,

    /// How many connections to track at least, unless --conntrack-max-per-core is 0
    #[arg(long = "conntrack-min", value_name = "NUMBER", default_value = "131072",
        value_parser = clap::value_parser!(u32).range(0..=LARGEST))]
    pub(crate) min: u32,

    /// How long an idle TCP connection is tracked, in whole seconds; 0s leaves the kernel's value
    #[arg(long = "conntrack-tcp-timeout-established", value_name = "DURATION", default_value = "24h",
        value_parser = go::duration)]
    pub(crate) tcp_timeout_established: Duration,

    /// How long a TCP connection is tracked that the other side has closed; 0s leaves the kernel's value
    #[arg(long = "conntrack-tcp-timeout-close-wait", value_name = "DURATION", default_value = "1h",
        value_parser = go::duration)]
    pub(crate) tcp_timeout_close_wait: Duration,

    /// Let TCP packets outside the window pass; false leaves the kernel's value
    #[arg(long = "conntrack-tcp-be-liberal", value_name = "BOOL", num_args = 0..=1, require_equals = true,
        default_missing_value = "true", default_value = "false", hide_default_value = true, value_parser = go::boolean)]
    pub(crate) tcp_be_liberal: bool,

    /// How long a UDP flow is tracked that was not answered; 0s leaves the kernel's value
    #[arg(long = "conntrack-udp-timeout", value_name = "DURATION", default_value = "0s", value_parser = go::duration)]
    pub(crate) udp_timeout: Duration,

    /// How long an answered UDP flow is tracked; 0s leaves the kernel's value
    #[arg(long = "conntrack-udp-timeout-stream", value_name = "DURATION", default_value = "0s",
        value_parser = go::duration)]
    pub(crate) udp_timeout_stream: Duration,
}

impl Conntrack {
    /// How many connections to track; `None` leaves the kernel's limit.
    pub(crate) fn max(&self, cpus: u64) -> Option<u64> {
        let scaled = u64::from(self.max_per_core) * cpus;
        // The minimum does not lift the cap: that is how kube-proxy has it.
        (self.max_per_core > 0).then(|| if scaled > MOST { MOST } else { scaled.max(self.min.into()) })
    }
}
