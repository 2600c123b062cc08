//! Every metric is named, described and updated here: kube-proxy's under its names, and those of kube-ipvs.
//!
//! [`ALL`] lists them with type, labels, help and buckets. A test compares it with `docs/metrics.md`.

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
use crate::host::ProblemKind;
use crate::{logging, panics};

/// A metric.
pub(crate) struct Metric {
    pub(crate) name: &'static str,
    pub(crate) kind: MetricKind,
    pub(crate) labels: &'static [&'static str],
    pub(crate) help: &'static str,
}

/// The Prometheus type.
#[derive(Clone, Copy, Debug)]
pub(crate) enum MetricKind {
    Counter,
    Gauge,
    /// With these upper bounds of its buckets.
    Histogram(fn() -> Vec<f64>),
}

/// 1 ms to 16 s, each twice the last.
fn duration_buckets() -> Vec<f64> {
    (0..15).map(|power| 0.001 * f64::from(1 << power)).collect()
}

/// 10 µs to 5 s, each about twice the last.
fn short_duration_buckets() -> Vec<f64> {
    (0..20).map(|power| 0.00001 * f64::from(1 << power)).collect()
}

/// 1 to 262,144, each four times the last.
fn size_buckets() -> Vec<f64> {
    (0..10).map(|power| f64::from(1 << (2 * power))).collect()
}

/// kube-proxy's buckets of `network_programming_duration`: by the second up to a minute, then coarser up to five
/// minutes.
fn programming_buckets() -> Vec<f64> {
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
const HOST_PROBLEMS: &str = "kube_ipvs_host_problem";
const UNREADABLE: &str = "kube_ipvs_kernel_read_failures_total";
const SERVICES: &str = "kube_ipvs_services";
const EXTERNAL_IPS: &str = "kube_ipvs_services_with_external_ips";
const VIRTUAL_SERVERS: &str = "kube_ipvs_virtual_servers";
const REAL_SERVERS: &str = "kube_ipvs_real_servers";
const DRAINING: &str = "kube_ipvs_real_servers_draining";
const VIPS: &str = "kube_ipvs_vips";
const BATCHES: &str = "kube_ipvs_netlink_batches_total";
const MESSAGES: &str = "kube_ipvs_netlink_messages_total";
const BYTES: &str = "kube_ipvs_netlink_sent_bytes_total";
const CHANGE: &str = "kube_ipvs_change_duration_seconds";
const LEFT: &str = "kube_ipvs_keys_left";
const OVER_BUDGET: &str = "kube_ipvs_services_over_budget";
const CLASHES: &str = "kube_ipvs_front_end_clashes_total";
const REFUSED: &str = "kube_ipvs_refused_vips_total";
const WATCH_RESTARTS: &str = "kube_ipvs_watch_restarts_total";
const WATCH_ERRORS: &str = "kube_ipvs_watch_errors_total";
const PROBLEMS: &str = "kube_ipvs_object_problems_total";
const EVENTS_DROPPED: &str = "kube_ipvs_events_dropped_total";
const PANICS: &str = "kube_ipvs_internal_errors_total";
const LOG_DROPPED: &str = "kube_ipvs_log_lines_dropped_total";
const PROCESS_CPU: &str = "process_cpu_seconds_total";
const PROCESS_MEMORY: &str = "process_resident_memory_bytes";
const PROCESS_FILES: &str = "process_open_fds";
const PROCESS_START: &str = "process_start_time_seconds";

macro_rules! metrics {
    ($($name:ident $kind:expr, [$($label:literal),*], $help:literal;)+) => {
        &[$(Metric { name: $name, kind: $kind, labels: &[$($label),*], help: $help }),+]
    };
}

/// Every metric.
pub(crate) const ALL: &[Metric] = metrics! {
    SYNC_DURATION MetricKind::Histogram(duration_buckets), ["ip_family"], "How long a sync or an audit took";
    SYNC_TIMESTAMP MetricKind::Gauge, ["ip_family"], "When the last sync or audit ended that could read the kernel";
    QUEUED_TIMESTAMP MetricKind::Gauge, ["ip_family"], "When the last change was received";
    PROGRAMMING MetricKind::Histogram(programming_buckets), ["ip_family"], "From an EndpointSlice's last-change-trigger-time until the kernel had the change";
    ENDPOINT_CHANGES_PENDING MetricKind::Gauge, [], "Changes of EndpointSlices that are not in the kernel yet";
    ENDPOINT_CHANGES MetricKind::Counter, [], "Changes of EndpointSlices";
    SERVICE_CHANGES_PENDING MetricKind::Gauge, [], "Changes of Services that are not in the kernel yet";
    SERVICE_CHANGES MetricKind::Counter, [], "Changes of Services";
    RESTORE_FAILURES MetricKind::Counter, ["ip_family"], "Operations on the packet filter that failed (the agent does not use iptables)";
    NO_LOCAL_ENDPOINTS MetricKind::Gauge, ["traffic_policy", "ip_family"], "Services with a traffic policy Local and endpoints, none of them on this node";
    HEALTHZ MetricKind::Counter, ["code"], "Responses of /healthz by status code";
    LIVEZ MetricKind::Counter, ["code"], "Responses of /livez by status code";
    CONNTRACK_DURATION MetricKind::Histogram(duration_buckets), ["ip_family"], "How long it took to find and delete stale flows in connection tracking";
    CONNTRACK_DELETED MetricKind::Counter, ["ip_family"], "Stale flows that were deleted";

    BUILD MetricKind::Gauge, ["version"], "1, with the version";
    SYNC MetricKind::Histogram(short_duration_buckets), ["kind"], "How long a sync (of what changed) or an audit (of everything) took";
    PLAN MetricKind::Histogram(size_buckets), ["kind"], "How many operations a sync or an audit carried out";
    OPERATIONS MetricKind::Counter, ["operation"], "Operations that the kernel carried out";
    FAILURES MetricKind::Counter, ["object"], "Operations that the kernel refused, by the kind of object";
    FAILING MetricKind::Gauge, [], "Objects whose last operation failed; each is tried again";
    DRIFT_FOUND MetricKind::Counter, [], "Objects that another program had changed, found by audits";
    DRIFT_REPAIRED MetricKind::Counter, [], "Changed objects that the same audit repaired";
    UNREPAIRED MetricKind::Gauge, ["ip_family"], "1 while an object that another program changed cannot be repaired";
    WRONG_SETTINGS MetricKind::Gauge, [], "Kernel settings that Services require, that another program changed and that cannot be restored";
    HOST_PROBLEMS MetricKind::Gauge, ["problem"], "1 while other programs have set up this host so that Services fail; the log and the Node's Events have the remedy";
    UNREADABLE MetricKind::Counter, [], "Times the state of the kernel could not be read";
    SERVICES MetricKind::Gauge, [], "Services that are served";
    EXTERNAL_IPS MetricKind::Gauge, [], "Services that request external IPs, whether or not the gate AllowServiceExternalIPs lets them";
    VIRTUAL_SERVERS MetricKind::Gauge, [], "Virtual servers in the desired state";
    REAL_SERVERS MetricKind::Gauge, [], "Real servers in the kernel, including those that drain";
    DRAINING MetricKind::Gauge, [], "Real servers that get no new connections and keep those they have";
    VIPS MetricKind::Gauge, [], "VIPs in the desired state";
    LEFT MetricKind::Gauge, [], "Objects of large Services that are not in the kernel yet, and Services that are not computed yet";
    OVER_BUDGET MetricKind::Gauge, [], "Services that exceed kubeIPVS.serviceBudget, so that a part of them is not served";
    BATCHES MetricKind::Counter, [], "Datagrams sent to the kernel: batches, transactions, dumps, requests";
    MESSAGES MetricKind::Counter, [], "Netlink messages sent to the kernel";
    BYTES MetricKind::Counter, [], "Bytes sent to the kernel";
    CHANGE MetricKind::Histogram(short_duration_buckets), [], "From receiving a change until the kernel had it, including the gathering of 20 to 40 ms and --ipvs-min-sync-period";
    CLASHES MetricKind::Counter, [], "Front ends that a second Service began to claim";
    REFUSED MetricKind::Counter, [], "VIPs that began to be refused because a Node, a pod or the API server has the address";
    WATCH_RESTARTS MetricKind::Counter, [], "Watches that had to list all objects again";
    WATCH_ERRORS MetricKind::Counter, [], "Requests to the API server that failed, and files that could not be read";
    PROBLEMS MetricKind::Counter, [], "Objects and fields that could not be used, counted each time one was read";
    EVENTS_DROPPED MetricKind::Counter, [], "Events that were not sent: too many at once, or refused by the API server";
    PANICS MetricKind::Counter, [], "Panics: each is a defect, and is logged with its place";
    LOG_DROPPED MetricKind::Counter, [], "Lines of the log that were dropped because nobody read standard error";
    PROCESS_CPU MetricKind::Counter, [], "Processor time of the agent, in seconds";
    PROCESS_MEMORY MetricKind::Gauge, [], "Memory of the agent, in bytes";
    PROCESS_FILES MetricKind::Gauge, [], "Open files of the agent";
    PROCESS_START MetricKind::Gauge, [], "When the agent started, in seconds since 1970";
};

/// Installs the recorder. The returned handle renders the metrics.
pub(crate) fn install_recorder() -> Result<PrometheusHandle, BuildError> {
    let mut builder = PrometheusBuilder::new();
    for metric in ALL {
        if let MetricKind::Histogram(buckets) = metric.kind {
            builder = builder.set_buckets_for_metric(Matcher::Full(metric.name.to_owned()), &buckets())?;
        }
    }
    let handle = builder.install_recorder()?;
    for metric in ALL {
        match metric.kind {
            MetricKind::Counter => metrics::describe_counter!(metric.name, metric.help),
            MetricKind::Gauge => metrics::describe_gauge!(metric.name, metric.help),
            MetricKind::Histogram(_) => metrics::describe_histogram!(metric.name, metric.help),
        }
        // Counters and gauges exist with value 0 from the start: `rate()` of an alert needs a first value.
        match (metric.kind, metric.labels) {
            (MetricKind::Counter, []) => counter!(metric.name).absolute(0),
            (MetricKind::Counter, ["ip_family"]) => {
                for family in [Family::Ipv4, Family::Ipv6] {
                    counter!(metric.name, "ip_family" => family_name(family)).absolute(0);
                }
            }
            (MetricKind::Counter, ["code"]) => {
                for code in ["200", "503"] {
                    counter!(metric.name, "code" => code).absolute(0);
                }
            }
            (MetricKind::Gauge, []) => gauge!(metric.name).set(0.0),
            _ => {}
        }
    }
    gauge!(BUILD, "version" => env!("CARGO_PKG_VERSION")).set(1.0);
    gauge!(PROCESS_START).set(seconds(SystemTime::now()));
    Ok(handle)
}

/// A change was received from the source.
pub(crate) fn change_received(change: &Change, families: Families) {
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

/// How many Services have `spec.externalIPs`.
pub(crate) fn set_services_with_external_ips(number: usize) {
    gauge!(EXTERNAL_IPS).set(to_f64(number));
}

/// Sets which problems the host has.
pub(crate) fn set_host_problems(is_found: impl Fn(ProblemKind) -> bool) {
    for kind in ProblemKind::ALL {
        gauge!(HOST_PROBLEMS, "problem" => kind.name()).set(if is_found(kind) { 1.0 } else { 0.0 });
    }
}

/// A sync or an audit has ended. Trigger times of EndpointSlices before `started`, when the agent started, are ignored:
/// they do not measure this agent.
pub(crate) fn sync_ended(report: &SyncReport, received: &ReceivedChanges, families: Families, started: SystemTime) {
    let now = SystemTime::now();
    let kind = if report.is_audit { "audit" } else { "sync" };
    histogram!(SYNC, "kind" => kind).record(report.duration);
    if report.applied.total() > 0 {
        histogram!(PLAN, "kind" => kind).record(to_f64(report.applied.total()));
    }
    for family in families.iter() {
        let name = family_name(family);
        histogram!(SYNC_DURATION, "ip_family" => name).record(report.duration);
        gauge!(SYNC_TIMESTAMP, "ip_family" => name).set(seconds(now));
        let is_unrepaired = report.unrepaired.contains(&family);
        gauge!(UNREPAIRED, "ip_family" => name).set(f64::from(u8::from(is_unrepaired)));
    }
    gauge!(SERVICE_CHANGES_PENDING).decrement(to_f64(received.services));
    gauge!(ENDPOINT_CHANGES_PENDING).decrement(to_f64(received.slices));
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
    for cleanup in &report.kernel_stats.conntrack_cleanups {
        let name = family_name(cleanup.family);
        histogram!(CONNTRACK_DURATION, "ip_family" => name).record(cleanup.duration);
        counter!(CONNTRACK_DELETED, "ip_family" => name).increment(cleanup.deleted as u64);
    }

    let totals = &report.totals;
    for (name, number) in [
        (SERVICES, totals.services),
        (VIRTUAL_SERVERS, totals.virtual_servers),
        (REAL_SERVERS, totals.real_servers),
        (DRAINING, totals.draining),
        (VIPS, totals.vips),
        (LEFT, report.left),
        (OVER_BUDGET, totals.over_budget),
        (FAILING, totals.failing),
    ] {
        gauge!(name).set(to_f64(number));
    }
    for (policy, numbers) in [("internal", totals.internal_without_local), ("external", totals.external_without_local)]
    {
        for (family, number) in [Family::Ipv4, Family::Ipv6].into_iter().zip(numbers) {
            if families.contains(family) {
                let name = family_name(family);
                gauge!(NO_LOCAL_ENDPOINTS, "traffic_policy" => policy, "ip_family" => name).set(to_f64(number));
            }
        }
    }
}

/// Sets how many sysctls are not as Services need them.
pub(crate) fn set_wrong_sysctls(count: usize) {
    gauge!(WRONG_SETTINGS).set(u32::try_from(count).unwrap_or(u32::MAX));
}

/// The state of the kernel could not be read.
pub(crate) fn kernel_read_failed() {
    counter!(UNREADABLE).increment(1);
}

/// A request to [`HEALTHZ`] or [`LIVEZ`] was answered with this status.
pub(crate) fn count_health_request(metric: &'static str, status: StatusCode) {
    counter!(metric, "code" => status.as_u16().to_string()).increment(1);
}

/// The unit of processor times in /proc (`USER_HZ` of `asm-generic/param.h`), which does not depend on the kernel's own
/// tick.
const USER_HZ: u64 = 100;

/// Updates the metrics that are counted elsewhere, before they are rendered. The source comes with the number of kinds
/// of objects that it watches: it lists each kind once, and every further list is a restart of a watch.
pub(crate) fn collect(source: Option<(&Counters, u64)>, events_dropped: u64) {
    if let Some((source, kinds)) = source {
        counter!(WATCH_RESTARTS).absolute(source.lists().saturating_sub(kinds));
        counter!(WATCH_ERRORS).absolute(source.errors());
        counter!(PROBLEMS).absolute(source.problems());
    }
    counter!(EVENTS_DROPPED).absolute(events_dropped);
    counter!(PANICS).absolute(panics::count());
    counter!(LOG_DROPPED).absolute(logging::dropped_lines());
    if let Ok(files) = std::fs::read_dir("/proc/self/fd") {
        gauge!(PROCESS_FILES).set(to_f64(files.count()));
    }
    if let Some(kib) = resident_kib() {
        gauge!(PROCESS_MEMORY).set(to_f64(kib * 1024));
    }
    // utime and stime, after the name of the program, which may hold anything.
    if let Ok(stat) = std::fs::read_to_string("/proc/self/stat") {
        let after_name = stat.rsplit(')').next().unwrap_or_default();
        let ticks: u64 = after_name.split_whitespace().skip(11).take(2).filter_map(|n| n.parse::<u64>().ok()).sum();
        counter!(PROCESS_CPU).absolute(ticks / USER_HZ);
    }
}

fn resident_kib() -> Option<usize> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.split_whitespace().next()?.parse().ok())
}

fn seconds(time: SystemTime) -> f64 {
    time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

/// Exact up to 2^53, which no count reaches.
#[expect(clippy::cast_precision_loss, reason = "no number here comes near 2^53")]
fn to_f64(number: usize) -> f64 {
    number as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn docs_metrics_md_has_every_metric_with_its_type_and_labels() {
        let page = include_str!("../docs/metrics.md");
        let rows: Vec<&str> = page.lines().filter(|line| line.starts_with("| `")).collect();
        for metric in ALL {
            let kind = match metric.kind {
                MetricKind::Counter => "counter",
                MetricKind::Gauge => "gauge",
                MetricKind::Histogram(_) => "histogram",
            };
            let labels = metric.labels.iter().map(|label| format!("`{label}`")).collect::<Vec<_>>().join(", ");
            let labels = if labels.is_empty() { "–" } else { &labels };
            let row = format!("| `{}` | {kind} | {labels} | {} |", metric.name, metric.help);
            assert!(rows.contains(&row.as_str()), "docs/metrics.md lacks: {row}");
        }
        assert_eq!(rows.len(), ALL.len(), "docs/metrics.md has metrics that do not exist");
    }

    #[test]
    fn buckets_are_those_of_kube_proxy() {
        assert_eq!(duration_buckets().first().zip(duration_buckets().last()), Some((&0.001, &16.384)));
        let programming = programming_buckets();
        assert_eq!(programming[..4], [0.25, 0.5, 1.0, 2.0]);
        assert_eq!(programming[programming.len() - 8..], [115.0, 120.0, 150.0, 180.0, 210.0, 240.0, 270.0, 300.0]);
        assert!(programming.is_sorted());
    }
}
