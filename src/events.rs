//! Every Kubernetes Event of the agent is made here: on the Service that it concerns, otherwise on the Node. The
//! recorder in `service-watch` limits repetitions and rates.

use std::sync::{Arc, OnceLock};

use reconciler::contribution::AddressOwner;
use reconciler::report::SyncReport;
use service_watch::{Event, EventObject, EventRecorder, EventType, ObjectName};

/// If more operations than this keep failing, they have a common cause: one Event on the Node replaces those on
/// Services.
const MAX_FAILURE_EVENTS: usize = 5;

/// Publishes Events, once there is an API server. Until then, and with manifests, they are discarded.
#[derive(Clone, Default)]
pub(crate) struct EventPublisher(Arc<OnceLock<EventRecorder>>);

impl EventPublisher {
    /// Sends all further Events to this API server.
    pub(crate) fn connect(&self, recorder: EventRecorder) {
        self.0.get_or_init(|| recorder);
    }

    pub(crate) fn publish(&self, event: Event) {
        if let Some(recorder) = self.0.get() {
            recorder.publish(event);
        }
    }

    /// Whether Events are sent at present.
    pub(crate) fn is_connected(&self) -> bool {
        self.0.get().is_some()
    }

    /// How many Events could not be sent.
    pub(crate) fn dropped(&self) -> u64 {
        self.0.get().map_or(0, EventRecorder::dropped)
    }
}

/// The Events of a sync or an audit.
pub(crate) fn of_sync(report: &SyncReport) -> Vec<Event> {
    let mut events = Vec::new();
    for claim in report.refused_claims() {
        let (reason, action) = match claim.owner {
            Some(AddressOwner::Node) => ("AddressIsANodes", "RefuseAddress"),
            Some(AddressOwner::ApiServer) => ("AddressIsTheApiServers", "RefuseAddress"),
            Some(AddressOwner::Pod) => ("AddressIsAPods", "RefuseAddress"),
            None => ("FrontEndTaken", "LeaveFrontEnd"),
        };
        events.push(warning(Some(claim.service), reason, action, claim.to_string()));
    }
    for (service, left_out) in &report.over_budget {
        events.push(warning(Some(service), "ServiceBudgetExceeded", "LimitService", left_out.to_string()));
    }
    if let Some(first) = report.drifted_keys.first() {
        // Without their number, so that the same drift gives the same note.
        let result = if report.unrepaired.is_empty() { "it is repaired" } else { "not all of it can be repaired yet" };
        let note = format!("somebody else changed what this agent manages, such as {first}; {result}");
        events.push(warning(None, "DriftFound", "RepairKernel", note));
    }
    // A first failure is not reported: the next attempt may succeed.
    let repeated: Vec<_> = report.failures.iter().filter(|failure| failure.is_repeated).collect();
    if let [first, ..] = repeated.as_slice()
        && repeated.len() > MAX_FAILURE_EVENTS
    {
        let note = format!("{} operations keep failing and are tried again, such as: {}", repeated.len(), first.error);
        events.push(warning(None, "ProgrammingFailed", "ProgramKernel", note));
    } else {
        events.extend(repeated.into_iter().map(|failure| {
            let note = format!("{}; it is tried again", failure.error);
            warning(failure.service.as_ref(), "ProgrammingFailed", "ProgramKernel", note)
        }));
    }
    events
}

/// The agent cannot listen on a Service's health-check node port. Reason and action are kube-proxy's.
pub(crate) fn health_check_port_failed(service: &ObjectName, problem: String) -> Event {
    warning(Some(service), "FailedToStartServiceHealthcheck", "Listen", problem)
}

/// The agent cannot listen on its health or metrics port. Reasons are kube-proxy's.
pub(crate) fn agent_port_failed(reason: &str, problem: String) -> Event {
    warning(None, reason, "StartKubeIpvs", problem)
}

/// Another program changed a sysctl that Services depend on, and it cannot be restored.
pub(crate) fn sysctl_changed(problem: String) -> Event {
    warning(None, "KernelSettingChanged", "SetKernelSetting", problem)
}

/// Another program has set up something that keeps Services from working.
pub(crate) fn host_problem(reason: &str, problem: String) -> Event {
    warning(None, reason, "CheckHost", problem)
}

/// The agent has started.
pub(crate) fn starting() -> Event {
    Event {
        regarding: EventObject::Node,
        event_type: EventType::Normal,
        reason: "Starting".to_owned(),
        action: "StartKubeIpvs".to_owned(),
        note: concat!("kube-ipvs ", env!("CARGO_PKG_VERSION")).to_owned(),
    }
}

/// A warning on a Service, or without one on this node's Node.
fn warning(service: Option<&ObjectName>, reason: &str, action: &str, note: String) -> Event {
    Event {
        regarding: service.map_or(EventObject::Node, |service| EventObject::Service(service.clone())),
        event_type: EventType::Warning,
        reason: reason.to_owned(),
        action: action.to_owned(),
        note,
    }
}

#[cfg(test)]
mod tests {
    use reconciler::plan::Key;
    use reconciler::report::Failure;

    use super::*;

    fn failure(service: &str, is_repeated: bool) -> Failure {
        Failure {
            key: Key::Device,
            service: Some(ObjectName::new("default", service)),
            error: "cannot add it: EINVAL".to_owned(),
            is_repeated,
        }
    }

    fn subjects(failures: Vec<Failure>) -> Vec<EventObject> {
        of_sync(&SyncReport { failures, ..SyncReport::default() }).into_iter().map(|event| event.regarding).collect()
    }

    #[test]
    fn only_repeated_failures_are_events_of_their_service() {
        assert_eq!(subjects(vec![failure("a", false)]), []);
        let events = subjects(vec![failure("a", true), failure("b", false)]);
        assert_eq!(events, [EventObject::Service(ObjectName::new("default", "a"))]);
    }

    #[test]
    fn many_repeated_failures_are_one_event_of_the_node() {
        let events = subjects(["a", "b", "c", "d", "e", "f"].map(|name| failure(name, true)).into());
        assert_eq!(events, [EventObject::Node]);
    }
}
