//! What people should know of a sync, as Kubernetes Events: on the Service it concerns, else on the Node. How often the same
//! is said, and how many at once, is the business of whoever posts them.

use reconciler::contribution::AddressOwner;
use reconciler::report::SyncReport;
use service_watch::{Event, EventType, EventObject, ObjectName};

/// More Services than this that fail in one sync have a reason in common: the Node is told, and they are not.
const FEW: usize = 5;

/// What a sync or an audit gives to tell.
pub(crate) fn of(report: &SyncReport) -> Vec<Event> {
    let mut events = Vec::new();
    for (service, vip, holder) in &report.refused_vips {
        let reason = match holder {
            AddressOwner::Node => "AddressIsANodes",
            AddressOwner::ApiServer => "AddressIsTheApiServers",
        };
        let note = format!(
            "{vip} is the address of {} and is not served: it would cut nodes off from there",
            holder.description()
        );
        events.push(warning(Some(service), reason, "RefuseAddress", note));
    }
    for clash in &report.conflicts {
        events.push(warning(
            Some(&clash.loser),
            "FrontEndTaken",
            "LeaveFrontEnd",
            format!(
                "{} belongs to Service {}, which was given it, is older, or first by name: give one of the two another address or port",
                clash.front_end, clash.winner
            ),
        ));
    }
    if let Some(first) = report.drifted_keys.first() {
        // How many they are is not said: it would be another note each time.
        let fate = if report.unrepaired.is_empty() { "it is repaired" } else { "not all of it can be repaired yet" };
        let note = format!("somebody else changed what this agent manages, such as {first}; {fate}");
        events.push(warning(None, "DriftFound", "RepairKernel", note));
    }
    // The first failure may be over by the next attempt.
    let lasting: Vec<_> = report.failures.iter().filter(|failure| failure.is_repeated).collect();
    if let [first, ..] = lasting.as_slice()
        && lasting.len() > FEW
    {
        let note = format!("{} operations keep failing and are tried again, such as: {}", lasting.len(), first.error);
        events.push(warning(None, "ProgrammingFailed", "ProgramKernel", note));
    } else {
        events.extend(lasting.into_iter().map(|failure| {
            let note = format!("{}; it is tried again", failure.error);
            warning(failure.service.as_ref(), "ProgrammingFailed", "ProgramKernel", note)
        }));
    }
    events
}

/// A port on which nobody can be told of a Service's endpoints; kube-proxy's reason and action.
pub(crate) fn health_check_port(service: &ObjectName, problem: String) -> Event {
    warning(Some(service), "FailedToStartServiceHealthcheck", "Listen", problem)
}

/// A port of the agent itself that cannot be listened on; kube-proxy's reasons.
pub(crate) fn own_port(reason: &str, problem: String) -> Event {
    warning(None, reason, "StartKubeIpvs", problem)
}

/// A setting of the kernel that Services depend on, and that somebody has changed.
pub(crate) fn setting(problem: String) -> Event {
    warning(None, "KernelSettingChanged", "SetKernelSetting", problem)
}

pub(crate) fn starting() -> Event {
    Event {
        regarding: EventObject::Node,
        event_type: EventType::Normal,
        reason: "Starting".to_owned(),
        action: "StartKubeIpvs".to_owned(),
        note: concat!("kube-ipvs ", env!("CARGO_PKG_VERSION")).to_owned(),
    }
}

/// On a Service, or on the own Node.
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
        of(&SyncReport { failures, ..SyncReport::default() }).into_iter().map(|event| event.regarding).collect()
    }

    #[test]
    fn what_fails_once_is_not_told_and_what_keeps_failing_is_told_to_its_service() {
        assert_eq!(subjects(vec![failure("a", false)]), []);
        let told = subjects(vec![failure("a", true), failure("b", false)]);
        assert_eq!(told, [EventObject::Service(ObjectName::new("default", "a"))]);
    }

    #[test]
    fn many_failures_at_once_are_one_event_of_the_node() {
        let told = subjects(["a", "b", "c", "d", "e", "f"].map(|name| failure(name, true)).into());
        assert_eq!(told, [EventObject::Node]);
    }
}
