//! What is measured: kube-proxy's metrics under its names, as far as they mean something here, and ours beside them.
//!
//! [`ALL`] is the list of them, from which the exporter learns types, help and buckets; `docs/metrics.md` tells people the
//! same, and a test compares the two.

use std::collections::BTreeSet;
use std::time::SystemTime;

use hyper::StatusCode;
use ipvs_netlink::Family;
use metrics::{counter, gauge, histogram};
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};
use reconciler::plan::Key;
use reconciler::policy::Families;
use reconciler::report::SyncReport;
use reconciler::run::ReceivedChanges;
use service_watch::{Change, Counters};

use crate::health::family_name;

/// A metric.
pub(crate) struct Metric {
    pub(crate) name: &'static str,
    pub(crate) kind: Kind,
    pub(crate) labels: &'static [&'static str],
    pub(crate) help: &'static str,
}

/// What kind of number it is.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Kind {
    Counter,
    Gauge,
    /// With these upper bounds.
    Histogram(fn() -> Vec<f64>),
}

/// 1 ms to 16 s, each twice the last.
fn durations() -> Vec<f64> {
    (0..15).map(|power| 0.001 * f64::from(1 << power)).collect()
}

/// 10 µs to 5 s, each about twice the last.
fn short_durations() -> Vec<f64> {
    (0..20).map(|power| 0.00001 * f64::from(1 << power)).collect()
}

/// 1 to 262,144, each four times the last.
fn sizes() -> Vec<f64> {
    (0..10).map(|power| f64::from(1 << (2 * power))).collect()
}

/// kube-proxy's for the time from a change of an endpoint to the rules: fine up to a minute, then coarser up to five.
fn programming() -> Vec<f64> {
    let (seconds, fives, thirties) = (1..60, (60..120).step_by(5), (120..=300).step_by(30));
    [0.25, 0.5].into_iter().chain(seconds.chain(fives).chain(thirties).map(f64::from)).collect()
}

pub(crate) const HEALTHZ: &str = "kubeproxy_proxy_healthz_total";
pub(crate) const LIVEZ: &str = "kubeproxy_proxy_livez_total";
const SYNC_DURATION: &str = "kubeproxy_sync_proxy_rules_duration_seconds";
const SYNC_TIMESTAMP: &str = "kubeproxy_sync_proxy_rules_last_timestamp_seconds";
const QUEUED_TIMESTAMP: &str = "kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds";
const PROGRAMMING: &str = "kubeproxy_network_programming_duration_seconds";
const ENDPOINT_CHANGES_PENDING: &str = "kubeproxy_sync_proxy_rules_endpoint_changes_pending";
const ENDPOINT_CHANGES: &str = "kubeproxy_sync_proxy_rules_endpoint_changes_total";
const SERVICE_CHANGES_PENDING: &str = "kubeproxy_sync_proxy_rules_service_changes_pending";
const SERVICE_CHANGES: &str = "kubeproxy_sync_proxy_rules_service_changes_total";
const RESTORE_FAILURES: &str = "kubeproxy_sync_proxy_rules_iptables_restore_failures_total";
const NO_LOCAL_ENDPOINTS: &str = "kubeproxy_sync_proxy_rules_no_local_endpoints_total";
const CONNTRACK_DURATION: &str = "kubeproxy_conntrack_reconciler_sync_duration_seconds";
const CONNTRACK_DELETED: &str = "kubeproxy_conntrack_reconciler_deleted_entries_total";

const BUILD: &str = "kube_ipvs_build_info";
const SYNC: &str = "kube_ipvs_sync_duration_seconds";
const PLAN: &str = "kube_ipvs_plan_operations";
const OPERATIONS: &str = "kube_ipvs_operations_total";
const FAILURES: &str = "kube_ipvs_operation_failures_total";
const FAILING: &str = "kube_ipvs_failing";
const DRIFT_FOUND: &str = "kube_ipvs_drift_found_total";
const DRIFT_REPAIRED: &str = "kube_ipvs_drift_repaired_total";
const UNREPAIRED: &str = "kube_ipvs_drift_unrepaired";
const WRONG_SETTINGS: &str = "kube_ipvs_settings_wrong";
const UNREADABLE: &str = "kube_ipvs_kernel_read_failures_total";
const SERVICES: &str = "kube_ipvs_services";
const VIRTUAL_SERVERS: &str = "kube_ipvs_virtual_servers";
const REAL_SERVERS: &str = "kube_ipvs_real_servers";
const DRAINING: &str = "kube_ipvs_real_servers_draining";
const VIPS: &str = "kube_ipvs_vips";
const BATCHES: &str = "kube_ipvs_netlink_batches_total";
const MESSAGES: &str = "kube_ipvs_netlink_messages_total";
const BYTES: &str = "kube_ipvs_netlink_sent_bytes_total";
const CHANGE: &str = "kube_ipvs_change_duration_seconds";
const CLASHES: &str = "kube_ipvs_front_end_clashes_total";
const REFUSED: &str = "kube_ipvs_refused_vips_total";
const WATCH_RESTARTS: &str = "kube_ipvs_watch_restarts_total";
const WATCH_ERRORS: &str = "kube_ipvs_watch_errors_total";
const PROBLEMS: &str = "kube_ipvs_object_problems_total";
const EVENTS_DROPPED: &str = "kube_ipvs_events_dropped_total";
const PROCESS_CPU: &str = "process_cpu_seconds_total";
const PROCESS_MEMORY: &str = "process_resident_memory_bytes";
const PROCESS_FILES: &str = "process_open_fds";
const PROCESS_START: &str = "process_start_time_seconds";

macro_rules! metrics {
    ($($name:ident $kind:expr, [$($label:literal),*], $help:literal;)+) => {
        &[$(Metric { name: $name, kind: $kind, labels: &[$($label),*], help: $help }),+]
    };
}

/// Every metric there is.
pub(crate) const ALL: &[Metric] = metrics! {
    SYNC_DURATION Kind::Histogram(durations), ["ip_family"], "How long a sync or an audit took";
    SYNC_TIMESTAMP Kind::Gauge, ["ip_family"], "When the last sync or audit ended that could read the kernel";
    QUEUED_TIMESTAMP Kind::Gauge, ["ip_family"], "When a change last was heard of";
    PROGRAMMING Kind::Histogram(programming), ["ip_family"], "From the time an EndpointSlice says its content began to be so until the kernel had it";
    ENDPOINT_CHANGES_PENDING Kind::Gauge, [], "Changes of EndpointSlices that the kernel does not have yet";
    ENDPOINT_CHANGES Kind::Counter, [], "Changes of EndpointSlices";
    SERVICE_CHANGES_PENDING Kind::Gauge, [], "Changes of Services that the kernel does not have yet";
    SERVICE_CHANGES Kind::Counter, [], "Changes of Services";
    RESTORE_FAILURES Kind::Counter, ["ip_family"], "Operations on the packet filter that failed (there is no iptables here)";
    NO_LOCAL_ENDPOINTS Kind::Gauge, ["traffic_policy", "ip_family"], "Services with a traffic policy Local and endpoints, none of them on this node";
    HEALTHZ Kind::Counter, ["code"], "Answers of /healthz by status";
    LIVEZ Kind::Counter, ["code"], "Answers of /livez by status";
    CONNTRACK_DURATION Kind::Histogram(durations), ["ip_family"], "How long it took to look for flows in connection tracking that lead nowhere";
    CONNTRACK_DELETED Kind::Counter, ["ip_family"], "Such flows that were deleted";

    BUILD Kind::Gauge, ["version"], "1, with the version";
    SYNC Kind::Histogram(short_durations), ["kind"], "How long a sync (of what changed) or an audit (of everything) took";
    PLAN Kind::Histogram(sizes), ["kind"], "How many operations a sync or an audit carried out";
    OPERATIONS Kind::Counter, ["operation"], "Operations that the kernel carried out";
    FAILURES Kind::Counter, ["object"], "Operations that the kernel refused, by what they were about";
    FAILING Kind::Gauge, [], "Things whose last operation failed; each is tried again";
    DRIFT_FOUND Kind::Counter, [], "Things that somebody else had changed when an audit looked";
    DRIFT_REPAIRED Kind::Counter, [], "Those of them that were repaired at once";
    UNREPAIRED Kind::Gauge, ["ip_family"], "1 while something that somebody else changed cannot be repaired";
    WRONG_SETTINGS Kind::Gauge, [], "Settings of the kernel that Services depend on, that somebody else changed and that cannot be set back";
    UNREADABLE Kind::Counter, [], "Times the state of the kernel could not be read";
    SERVICES Kind::Gauge, [], "Services that are served";
    VIRTUAL_SERVERS Kind::Gauge, [], "Virtual servers that are desired";
    REAL_SERVERS Kind::Gauge, [], "Real servers in the kernel, those that drain included";
    DRAINING Kind::Gauge, [], "Real servers that get no new connections and keep those they have";
    VIPS Kind::Gauge, [], "Addresses on kube-ipvs0 that are desired";
    BATCHES Kind::Counter, [], "Datagrams sent to the kernel: batches, transactions, dumps, requests";
    MESSAGES Kind::Counter, [], "Netlink messages in them";
    BYTES Kind::Counter, [], "Bytes in them";
    CHANGE Kind::Histogram(short_durations), [], "From hearing of a change until the kernel had it, --ipvs-min-sync-period included";
    CLASHES Kind::Counter, [], "Times two Services began to claim one front end";
    REFUSED Kind::Counter, [], "VIPs that began to be refused because a Node has the address";
    WATCH_RESTARTS Kind::Counter, [], "Times a watch had to list everything anew";
    WATCH_ERRORS Kind::Counter, [], "Requests to the API server that failed, and files that could not be read";
    PROBLEMS Kind::Counter, [], "Objects and parts of objects that could not be used, each time one was read";
    EVENTS_DROPPED Kind::Counter, [], "Events that were not posted: too many at once, or not taken by the API server";
    PROCESS_CPU Kind::Counter, [], "Processor time of the agent, in seconds";
    PROCESS_MEMORY Kind::Gauge, [], "Memory of the agent, in bytes";
    PROCESS_FILES Kind::Gauge, [], "Open files of the agent";
    PROCESS_START Kind::Gauge, [], "When the agent started, in seconds since 1970";
};

/// Starts measuring. What was measured is had from what this returns.
pub(crate) fn install() -> Result<PrometheusHandle, BuildError> {
    let mut builder = PrometheusBuilder::new();
    for metric in ALL {
        if let Kind::Histogram(buckets) = metric.kind {
            builder = builder.set_buckets_for_metric(Matcher::Full(metric.name.to_owned()), &buckets())?;
        }
    }
    let handle = builder.install_recorder()?;
    for metric in ALL {
        match metric.kind {
            Kind::Counter => metrics::describe_counter!(metric.name, metric.help),
            Kind::Gauge => metrics::describe_gauge!(metric.name, metric.help),
            Kind::Histogram(_) => metrics::describe_histogram!(metric.name, metric.help),
        }
        // What has not happened yet is 0 from the start: an alert on a rise needs something to rise from.
        match (metric.kind, metric.labels) {
            (Kind::Counter, []) => counter!(metric.name).absolute(0),
            (Kind::Counter, ["ip_family"]) => {
                for family in [Family::Ipv4, Family::Ipv6] {
                    counter!(metric.name, "ip_family" => family_name(family)).absolute(0);
                }
            }
            (Kind::Counter, ["code"]) => {
                for code in ["200", "503"] {
                    counter!(metric.name, "code" => code).absolute(0);
                }
            }
            (Kind::Gauge, []) => gauge!(metric.name).set(0.0),
            _ => {}
        }
    }
    gauge!(BUILD, "version" => env!("CARGO_PKG_VERSION")).set(1.0);
    gauge!(PROCESS_START).set(seconds(SystemTime::now()));
    Ok(handle)
}

/// A source said something.
pub(crate) fn change_heard(change: &Change, families: Families) {
    match change {
        Change::Service(_) | Change::ServiceDeleted(_) => {
            counter!(SERVICE_CHANGES).increment(1);
            gauge!(SERVICE_CHANGES_PENDING).increment(1.0);
        }
        Change::Slice(_) | Change::SliceDeleted(_) => {
            counter!(ENDPOINT_CHANGES).increment(1);
            gauge!(ENDPOINT_CHANGES_PENDING).increment(1.0);
        }
        _ => {}
    }
    let now = seconds(SystemTime::now());
    for family in families.iter() {
        gauge!(QUEUED_TIMESTAMP, "ip_family" => family_name(family)).set(now);
    }
}

/// A sync or an audit has ended. `started` is when the agent did: slices that are older say nothing about it.
pub(crate) fn synced(report: &SyncReport, received: &ReceivedChanges, families: Families, started: SystemTime) {
    let now = SystemTime::now();
    let kind = if report.is_audit { "audit" } else { "sync" };
    histogram!(SYNC, "kind" => kind).record(report.duration);
    if report.applied.total() > 0 {
        histogram!(PLAN, "kind" => kind).record(count(report.applied.total()));
    }
    for family in families.iter() {
        let name = family_name(family);
        histogram!(SYNC_DURATION, "ip_family" => name).record(report.duration);
        gauge!(SYNC_TIMESTAMP, "ip_family" => name).set(seconds(now));
        let is_unrepaired = report.unrepaired.contains(&family);
        gauge!(UNREPAIRED, "ip_family" => name).set(f64::from(u8::from(is_unrepaired)));
    }
    gauge!(SERVICE_CHANGES_PENDING).decrement(count(received.services));
    gauge!(ENDPOINT_CHANGES_PENDING).decrement(count(received.slices));
    for (family, triggered) in report.trigger_times.iter().filter(|(_, triggered)| *triggered >= started) {
        let latency = now.duration_since(*triggered).unwrap_or_default();
        histogram!(PROGRAMMING, "ip_family" => family_name(*family)).record(latency);
    }
    for at in &received.received_at {
        histogram!(CHANGE).record(at.elapsed());
    }

    for (operation, number) in report.applied.by_kind() {
        if number > 0 {
            counter!(OPERATIONS, "operation" => operation).increment(number as u64);
        }
    }
    for failure in &report.failures {
        counter!(FAILURES, "object" => failure.key.kind()).increment(1);
        if matches!(failure.key, Key::Table(_) | Key::SetElement(_) | Key::SourceRanges(..)) {
            for family in families.iter().filter(|family| failure.key.is_of_family(*family)) {
                counter!(RESTORE_FAILURES, "ip_family" => family_name(family)).increment(1);
            }
        }
    }
    let failed: BTreeSet<&Key> = report.failures.iter().map(|failure| &failure.key).collect();
    let unrepaired = report.drifted_keys.iter().filter(|key| failed.contains(key)).count();
    counter!(DRIFT_FOUND).increment(report.drifted_keys.len() as u64);
    counter!(DRIFT_REPAIRED).increment((report.drifted_keys.len() - unrepaired) as u64);
    counter!(CLASHES).increment(report.conflicts.len() as u64);
    counter!(REFUSED).increment(report.refused_vips.len() as u64);
    counter!(BATCHES).increment(report.kernel_stats.sent.datagrams);
    counter!(MESSAGES).increment(report.kernel_stats.sent.messages);
    counter!(BYTES).increment(report.kernel_stats.sent.bytes);
    for flush in &report.kernel_stats.conntrack_cleanups {
        let name = family_name(flush.family);
        histogram!(CONNTRACK_DURATION, "ip_family" => name).record(flush.duration);
        counter!(CONNTRACK_DELETED, "ip_family" => name).increment(flush.deleted as u64);
    }

    let totals = &report.totals;
    for (name, number) in [
        (SERVICES, totals.services),
        (VIRTUAL_SERVERS, totals.virtual_servers),
        (REAL_SERVERS, totals.real_servers),
        (DRAINING, totals.draining),
        (VIPS, totals.vips),
        (FAILING, totals.failing),
    ] {
        gauge!(name).set(count(number));
    }
    for (policy, numbers) in [("internal", totals.internal_without_local), ("external", totals.external_without_local)]
    {
        for (family, number) in [Family::Ipv4, Family::Ipv6].into_iter().zip(numbers) {
            if families.contains(family) {
                let name = family_name(family);
                gauge!(NO_LOCAL_ENDPOINTS, "traffic_policy" => policy, "ip_family" => name).set(count(number));
            }
        }
    }
}

/// How many settings of the kernel are not as Services need them.
pub(crate) fn wrong_settings(count: usize) {
    gauge!(WRONG_SETTINGS).set(u32::try_from(count).unwrap_or(u32::MAX));
}

/// The state of the kernel could not be read.
pub(crate) fn unreadable() {
    counter!(UNREADABLE).increment(1);
}

/// Somebody asked whether all is well.
pub(crate) fn health_asked(metric: &'static str, answer: StatusCode) {
    counter!(metric, "code" => answer.as_u16().to_string()).increment(1);
}

/// The kernel's unit of processor time towards programs (`USER_HZ` of `asm-generic/param.h`): fixed, whatever the kernel's
/// own clock is.
const TICKS_A_SECOND: u64 = 100;

/// What is counted elsewhere, at the moment somebody asks: by a source, with how many kinds of objects it has. It lists
/// each once; more is beginning anew.
pub(crate) fn collect(source: Option<(&Counters, u64)>, events_dropped: u64) {
    if let Some((source, kinds)) = source {
        counter!(WATCH_RESTARTS).absolute(source.lists().saturating_sub(kinds));
        counter!(WATCH_ERRORS).absolute(source.errors());
        counter!(PROBLEMS).absolute(source.problems());
    }
    counter!(EVENTS_DROPPED).absolute(events_dropped);
    if let Ok(files) = std::fs::read_dir("/proc/self/fd") {
        gauge!(PROCESS_FILES).set(count(files.count()));
    }
    if let Some(kib) = resident_kib() {
        gauge!(PROCESS_MEMORY).set(count(kib * 1024));
    }
    // utime and stime, after the name of the program, which may hold anything.
    if let Ok(stat) = std::fs::read_to_string("/proc/self/stat") {
        let after_name = stat.rsplit(')').next().unwrap_or_default();
        let ticks: u64 = after_name.split_whitespace().skip(11).take(2).filter_map(|n| n.parse::<u64>().ok()).sum();
        counter!(PROCESS_CPU).absolute(ticks / TICKS_A_SECOND);
    }
}

fn resident_kib() -> Option<usize> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.split_whitespace().next()?.parse().ok())
}

fn seconds(time: SystemTime) -> f64 {
    time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

/// Exact up to 2^53, which no node has of anything.
#[expect(clippy::cast_precision_loss, reason = "no number here comes near 2^53")]
fn count(number: usize) -> f64 {
    number as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_of_metrics_has_every_metric_with_its_type_and_labels() {
        let page = include_str!("../docs/metrics.md");
        let rows: Vec<&str> = page.lines().filter(|line| line.starts_with("| `")).collect();
        for metric in ALL {
            let kind = match metric.kind {
                Kind::Counter => "counter",
                Kind::Gauge => "gauge",
                Kind::Histogram(_) => "histogram",
            };
            let labels = metric.labels.iter().map(|label| format!("`{label}`")).collect::<Vec<_>>().join(", ");
            let labels = if labels.is_empty() { "–" } else { &labels };
            let row = format!("| `{}` | {kind} | {labels} | {} |", metric.name, metric.help);
            assert!(rows.contains(&row.as_str()), "docs/metrics.md lacks: {row}");
        }
        assert_eq!(rows.len(), ALL.len(), "docs/metrics.md has what is not there");
    }

    #[test]
    fn buckets_are_kube_proxys() {
        assert_eq!(durations().first().zip(durations().last()), Some((&0.001, &16.384)));
        let programming = programming();
        assert_eq!(programming[..4], [0.25, 0.5, 1.0, 2.0]);
        assert_eq!(programming[programming.len() - 8..], [115.0, 120.0, 150.0, 180.0, 210.0, 240.0, 270.0, 300.0]);
        assert!(programming.is_sorted());
    }
}
