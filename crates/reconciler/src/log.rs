//! Log messages about syncs and audits.

use std::time::Duration;

use tracing::{debug, info, warn};

use crate::report::SyncReport;

/// How many warnings of a kind one sync logs. Users decide how many Services clash.
const MAX_WARNINGS: usize = 20;

/// Logs one line for a sync that changed anything, and one for each new problem.
/// `latency` is the time since the first of its changes was received, and how much of it that change was gathered with others.
pub(crate) fn report(report: &SyncReport, latency: Option<(Duration, Duration)>) {
    let claims = report.refused_claims();
    for (index, claim) in claims.iter().enumerate() {
        if index < MAX_WARNINGS {
            warn!(service = %claim.service, "{claim}");
        } else {
            debug!(service = %claim.service, "{claim}");
        }
    }
    warn_of_more(claims.len(), "addresses and front ends of more Services are refused");
    for (index, (service, left_out)) in report.over_budget.iter().enumerate() {
        if index < MAX_WARNINGS {
            warn!(%service, "{left_out}");
        } else {
            debug!(%service, "{left_out}");
        }
    }
    warn_of_more(report.over_budget.len(), "more Services exceed their budget");
    if !report.drifted_keys.is_empty() {
        let first = report.drifted_keys.iter().take(5).map(ToString::to_string).collect::<Vec<_>>().join(", ");
        warn!(count = report.drifted_keys.len(), "somebody else changed what this agent manages: {first}");
    }
    failures(report);
    let done = &report.applied;
    if report.foreign_servers > 0 {
        info!(
            virtual_servers = report.foreign_servers,
            "kept virtual servers that belong to no Service and are not provably those of kube-ipvs; if another proxy left them, \
             delete them with ipvsadm"
        );
    }
    if report.is_first_audit {
        let time_spent = &report.kernel_stats.time_spent;
        info!(
            reading = ?time_spent.reading, filter = ?time_spent.filter, ipvs = ?time_spent.ipvs, addresses = ?time_spent.addresses,
            flows = ?time_spent.flows, computing = ?report.duration.saturating_sub(time_spent.total()),
            "time spent in the first audit"
        );
    }
    if done.total() > 0 || report.is_first_audit {
        let latency = latency.filter(|_| !report.is_first_audit);
        info!(
            virtual_servers = counts(done.servers_added, done.servers_changed, done.servers_deleted),
            real_servers = counts(done.real_servers_added, done.real_servers_changed, done.real_servers_deleted),
            draining = (done.real_servers_drained > 0).then_some(done.real_servers_drained),
            addresses = counts(done.addresses_bound, 0, done.addresses_unbound),
            routes = counts(done.routes_added, 0, done.routes_removed),
            filter = counts(done.filter_added, 0, done.filter_removed),
            failed = (!report.failures.is_empty()).then_some(report.failures.len()),
            left = (report.left > 0).then_some(report.left),
            total = report.totals.virtual_servers,
            took = ?report.duration,
            latency = latency.map(|(latency, _)| tracing::field::debug(latency)),
            gathering = latency.map(|(_, gathering)| tracing::field::debug(gathering)),
            "{}{}",
            if report.is_audit { "audited" } else { "synced" },
            if done.total() == 0 { ", nothing to change" } else { "" }
        );
    }
}

/// Warns of what is logged at debug level only.
fn warn_of_more(count: usize, what: &str) {
    if let Some(more) = count.checked_sub(MAX_WARNINGS).filter(|more| *more > 0) {
        warn!(more, "{what}: with -v=4 each has a line");
    }
}

/// Logs one line for each new failure.
pub(crate) fn failures(report: &SyncReport) {
    let mut warnings = 0;
    for failure in &report.failures {
        let service = failure.service.as_ref().map(tracing::field::display);
        if failure.is_repeated {
            debug!(service, "still fails: {}", failure.error);
        } else if warnings < MAX_WARNINGS {
            warnings += 1;
            warn!(service, "{}; will try again", failure.error);
        } else {
            warnings += 1;
            debug!(service, "{}; will try again", failure.error);
        }
    }
    warn_of_more(warnings, "more operations failed and will be tried again");
}

/// The numbers of added, changed and deleted objects, as in `+2 -1`; `None` if all are 0.
pub(crate) fn counts(added: usize, changed: usize, deleted: usize) -> Option<String> {
    let counts = [('+', added), ('~', changed), ('-', deleted)];
    let parts: Vec<String> = counts.iter().filter(|(_, n)| *n > 0).map(|(sign, n)| format!("{sign}{n}")).collect();
    (!parts.is_empty()).then(|| parts.join(" "))
}
