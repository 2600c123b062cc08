//! The limits and timeouts of connection tracking (`--conntrack-*`), by kube-proxy's rules.

use std::fs;
use std::num::NonZero;
use std::path::Path;
use std::time::Duration;

use super::setting::{Importance, Setting};
use crate::config::settings::Conntrack;

/// The settings of connection tracking that differ from "leave the kernel's value".
pub(super) fn settings(conntrack: &Conntrack, cpus: u64) -> Vec<Setting> {
    let tuning = |path, value| Setting::sysctl(path, value, Importance::Tuning);
    let mut settings = Vec::new();
    if let Some(max) = conntrack.max(cpus) {
        settings.push(tuning("net/netfilter/nf_conntrack_max", max));
        let hash_size = "module/nf_conntrack/parameters/hashsize";
        settings.push(Setting::sysfs_at_least(hash_size, max / 4, Importance::Tuning));
    }
    let timeouts = [
        ("net/netfilter/nf_conntrack_tcp_timeout_established", conntrack.tcp_timeout_established),
        ("net/netfilter/nf_conntrack_tcp_timeout_close_wait", conntrack.tcp_timeout_close_wait),
        ("net/netfilter/nf_conntrack_udp_timeout", conntrack.udp_timeout),
        ("net/netfilter/nf_conntrack_udp_timeout_stream", conntrack.udp_timeout_stream),
    ];
    // Less than a second is as 0, which leaves the kernel's value: a timeout of 0 would drop connections at once.
    let timeouts = timeouts.into_iter().filter(|(_, timeout)| *timeout >= Duration::from_secs(1));
    settings.extend(timeouts.map(|(path, timeout)| tuning(path, timeout.as_secs())));
    if conntrack.tcp_be_liberal {
        settings.push(tuning("net/netfilter/nf_conntrack_tcp_be_liberal", 1));
    }
    settings
}

/// The processors of the machine. Not those that a cgroup allows this process: connections come from the whole machine.
pub(super) fn cpus(root: &Path) -> u64 {
    let online = fs::read_to_string(root.join("sys/devices/system/cpu/online")).ok();
    online
        .and_then(|list| cpu_list_len(&list))
        .unwrap_or_else(|| std::thread::available_parallelism().map_or(1, NonZero::get) as u64)
}

/// How many numbers a list of processors such as `0-3,6` has.
pub(super) fn cpu_list_len(list: &str) -> Option<u64> {
    let number = |text: &str| text.trim().parse::<u64>().ok();
    let lengths = list.split(',').map(|range| {
        let (low, high) = range.split_once('-').unwrap_or((range, range));
        Some(number(high)?.checked_sub(number(low)?)? + 1)
    });
    lengths.sum()
}
