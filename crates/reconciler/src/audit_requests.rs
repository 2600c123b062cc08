//! When to audit because another program changed what this one wrote: at once, but ever later while that goes on, so that two
//! programs that fight do not busy the node. It reads no clock: the caller passes the time.

use std::time::{Duration, Instant};

/// After this time without a request, the next one is granted at once again.
const CALM: Duration = Duration::from_secs(10);

/// The shortest time between two requested audits.
const DELAY_MIN: Duration = Duration::from_millis(100);

/// Audits take at most one part in so many of the time, the first few excepted.
const SHARE: u32 = 10;

/// Requests for audits.
#[derive(Debug, Default)]
pub(crate) struct AuditRequests {
    due: Option<Instant>,
    last: Option<RequestedAudit>,
}

/// The last audit that was requested.
#[derive(Clone, Copy, Debug)]
struct RequestedAudit {
    end: Instant,
    /// How long after its end the next one may start.
    delay: Duration,
}

impl AuditRequests {
    /// Requests an audit.
    pub(crate) fn request(&mut self, now: Instant) {
        let not_before = self.last.map_or(now, |last| last.end + last.delay);
        self.due.get_or_insert(not_before.max(now));
    }

    /// When the requested audit starts.
    pub(crate) fn due(&self) -> Option<Instant> {
        self.due
    }

    /// Puts a requested audit off, since the kernel could not be read.
    pub(crate) fn put_off(&mut self, until: Instant) {
        self.due = self.due.map(|due| due.max(until));
    }

    /// An audit has ended, requested or not. `max` is the longest delay, the time between audits that nobody requests.
    pub(crate) fn audited(&mut self, start: Instant, end: Instant, max: Duration) {
        if self.due.take().is_none() {
            return;
        }
        let shortest = ((end - start) * SHARE).max(DELAY_MIN);
        let delay = match self.last {
            Some(last) if start < last.end + last.delay + CALM => shortest.max(last.delay * 2),
            _ => shortest,
        };
        self.last = Some(RequestedAudit { end, delay: delay.min(max) });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAX: Duration = Duration::from_secs(30);

    /// Requests an audit as soon as the last has ended, for a while. Returns when they started.
    fn fight(requests: &mut AuditRequests, start: Instant, duration: Duration, audit: Duration) -> Vec<Duration> {
        let (mut now, mut starts) = (start, Vec::new());
        while now < start + duration {
            requests.request(now);
            now = requests.due().unwrap();
            starts.push(now - start);
            requests.audited(now, now + audit, MAX);
            now += audit;
        }
        starts
    }

    #[test]
    fn the_first_request_is_granted_at_once() {
        let (mut requests, now) = (AuditRequests::default(), Instant::now());
        assert_eq!(requests.due(), None);
        requests.request(now);
        requests.request(now + Duration::from_secs(1));
        assert_eq!(requests.due(), Some(now));
        requests.audited(now, now, MAX);
        assert_eq!(requests.due(), None);
    }

    #[test]
    fn a_fight_costs_ever_less() {
        let (mut requests, now) = (AuditRequests::default(), Instant::now());
        let starts = fight(&mut requests, now, Duration::from_secs(600), Duration::from_millis(1));
        assert!(starts[1] < Duration::from_millis(150), "{starts:?}");
        assert!(starts.len() < 40, "{starts:?}");
        let gap = starts[starts.len() - 1].saturating_sub(starts[starts.len() - 2]);
        assert!(gap >= MAX && gap < MAX + Duration::from_secs(1), "{starts:?}");
    }

    #[test]
    fn long_audits_have_long_pauses() {
        let (mut requests, now) = (AuditRequests::default(), Instant::now());
        let starts = fight(&mut requests, now, Duration::from_secs(4), Duration::from_millis(400));
        assert_eq!(starts, [Duration::ZERO, Duration::from_millis(4400)]);
    }

    #[test]
    fn after_a_calm_time_requests_are_granted_at_once_again() {
        let (mut requests, now) = (AuditRequests::default(), Instant::now());
        fight(&mut requests, now, Duration::from_secs(60), Duration::from_millis(1));
        let later = now + Duration::from_secs(200);
        requests.request(later);
        assert_eq!(requests.due(), Some(later));
        requests.audited(later, later, MAX);
        requests.request(later);
        assert_eq!(requests.due(), Some(later + DELAY_MIN));
    }

    #[test]
    fn an_audit_that_nobody_requested_delays_no_request() {
        let (mut requests, now) = (AuditRequests::default(), Instant::now());
        requests.audited(now, now + Duration::from_secs(1), MAX);
        requests.request(now);
        assert_eq!(requests.due(), Some(now));
    }
}
