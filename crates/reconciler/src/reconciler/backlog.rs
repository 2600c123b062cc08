//! The keys of large changes, which are written in parts, so that between them the changes of other Services come first.
//!
//! There is one job for each Service. The smallest job is written first, except that jobs of bootstrap Services come before all others.
//! The order within a job keeps traffic correct although its parts are plans of their own:
//! * what front ends refer to comes before all of them if it is added, and after all of them if it is deleted;
//! * a VIP that is wanted is guarded before its front ends are written, and bound after them;
//! * a VIP that is not wanted is unbound before its front ends are deleted.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use foldhash::HashMap;
use service_watch::ObjectName;

use super::PlanReason;
use crate::front_end::FrontEnd;
use crate::plan::Key;

/// Whose keys a job has, and why they are planned. Keys without an owner share a job.
pub(super) type JobName = (Option<ObjectName>, PlanReason);

/// The order of the jobs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Rank {
    is_for_all: bool,
    /// About how many operations it takes.
    cost: usize,
    /// Distinguishes jobs of the same cost: the first comes first.
    number: u64,
}

/// When a key is written within a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Slot {
    First,
    At(IpAddr, Step),
    Last,
}

/// The order at an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Step {
    /// The VIP is guarded if it is wanted, and unbound otherwise.
    Before,
    FrontEnds,
    /// The VIP is bound.
    After,
}

#[derive(Debug)]
struct Job {
    name: JobName,
    keys: BTreeSet<(Slot, Key)>,
}

/// A part of the backlog: the keys of one plan.
#[derive(Debug)]
pub(super) struct Part {
    pub(super) keys: BTreeSet<Key>,
    pub(super) reason: PlanReason,
    /// VIPs of which front ends are still to be written: they are guarded, and not bound yet.
    pub(super) unfinished_vips: BTreeSet<IpAddr>,
}

/// The keys of large changes.
#[derive(Debug, Default)]
pub(super) struct Backlog {
    jobs: BTreeMap<Rank, Job>,
    ranks: HashMap<JobName, Rank>,
    next_number: u64,
}

impl Backlog {
    pub(super) fn is_empty(&self) -> bool {
        self.jobs.is_empty()
    }

    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    /// Whether a Service has a job.
    pub(super) fn has_job(&self, service: &ObjectName) -> bool {
        // A name is cheap to clone, and mostly there is no job at all.
        !self.is_empty()
            && [PlanReason::Change, PlanReason::Dump]
                .into_iter()
                .any(|reason| self.ranks.contains_key(&(Some(service.clone()), reason)))
    }

    /// Every key.
    pub(super) fn keys(&self) -> impl Iterator<Item = &Key> {
        self.jobs.values().flat_map(|job| job.keys.iter().map(|(_, key)| key))
    }

    /// How many keys there are.
    pub(super) fn len(&self) -> usize {
        self.jobs.values().map(|job| job.keys.len()).sum()
    }

    /// Whether a key is in any job. There are few jobs, so this is quicker than to go through [`Backlog::keys`] for a few keys.
    pub(super) fn contains(&self, key: &Key) -> bool {
        let slots = [true, false].map(|is_wanted| (slot(key, is_wanted), key.clone()));
        self.jobs.values().any(|job| slots.iter().any(|entry| job.keys.contains(entry)))
    }

    /// Adds keys to a job, each with its cost in operations and whether it is wanted.
    pub(super) fn push(&mut self, name: JobName, is_urgent: bool, keys: impl IntoIterator<Item = (Key, usize, bool)>) {
        let held = self.ranks.remove(&name).and_then(|rank| Some((rank, self.jobs.remove(&rank)?)));
        let (mut rank, mut job) = held.unwrap_or_else(|| {
            self.next_number += 1;
            let rank = Rank { is_for_all: true, cost: 0, number: self.next_number };
            (rank, Job { name: name.clone(), keys: BTreeSet::new() })
        });
        rank.is_for_all &= !is_urgent;
        for (key, cost, is_wanted) in keys {
            rank.cost = rank.cost.saturating_add(cost);
            if let Key::Vip(address) = &key
                && is_wanted
            {
                // Guarded before its front ends are written, and bound after them.
                job.keys.insert((Slot::At(*address, Step::Before), key.clone()));
            }
            job.keys.insert((slot(&key, is_wanted), key));
        }
        if !job.keys.is_empty() {
            self.ranks.insert(name, rank);
            self.jobs.insert(rank, job);
        }
    }

    /// Takes the next keys: those of the first jobs, until they cost as much as `limit`; at least one.
    pub(super) fn take(&mut self, limit: usize, cost: impl Fn(&Key) -> usize) -> Option<Part> {
        let reason = self.jobs.values().next()?.name.1;
        let mut part = Part { keys: BTreeSet::new(), reason, unfinished_vips: BTreeSet::new() };
        let mut spent = 0;
        while spent < limit
            && let Some(mut entry) = self.jobs.first_entry()
            && entry.get().name.1 == reason
        {
            while spent < limit
                && let Some((slot, key)) = entry.get_mut().keys.pop_first()
            {
                spent += cost(&key);
                match slot {
                    Slot::At(address, Step::Before) => _ = part.unfinished_vips.insert(address),
                    Slot::At(address, Step::After) => _ = part.unfinished_vips.remove(&address),
                    _ => {}
                }
                part.keys.insert(key);
            }
            if entry.get().keys.is_empty() {
                self.ranks.remove(&entry.remove().name);
            }
        }
        Some(part)
    }
}

/// When a key is written within a job; of a VIP, when it is bound or unbound.
fn slot(key: &Key, is_wanted: bool) -> Slot {
    match key {
        Key::VirtualServer(FrontEnd { address, .. }) | Key::Flows(FrontEnd { address, .. }) => {
            Slot::At(*address, Step::FrontEnds)
        }
        Key::Vip(address) => Slot::At(*address, if is_wanted { Step::After } else { Step::Before }),
        _ if is_wanted => Slot::First,
        _ => Slot::Last,
    }
}

#[cfg(test)]
mod tests {
    use service_watch::Protocol;

    use super::*;

    fn name(name: &str) -> JobName {
        (Some(ObjectName::new("default", name)), PlanReason::Change)
    }

    fn address(last: u8) -> IpAddr {
        [10, 96, 0, last].into()
    }

    fn server(last: u8, port: u16) -> Key {
        Key::VirtualServer(FrontEnd { address: address(last), port, protocol: Protocol::Tcp })
    }

    fn wanted(keys: impl IntoIterator<Item = Key>) -> Vec<(Key, usize, bool)> {
        keys.into_iter().map(|key| (key, 1, true)).collect()
    }

    fn take(backlog: &mut Backlog, limit: usize) -> (Vec<Key>, Vec<IpAddr>) {
        let part = backlog.take(limit, |_| 1).unwrap();
        (part.keys.into_iter().collect(), part.unfinished_vips.into_iter().collect())
    }

    #[test]
    fn the_smallest_job_comes_first_and_an_urgent_one_before_it() {
        let mut backlog = Backlog::default();
        backlog.push(name("large"), false, wanted((1..=3).map(|port| server(1, port))));
        backlog.push(name("small"), false, wanted((1..=2).map(|port| server(2, port))));
        backlog.push(name("dns"), true, wanted((1..=4).map(|port| server(3, port))));
        assert_eq!(take(&mut backlog, 4).0, (1..=4).map(|port| server(3, port)).collect::<Vec<_>>());
        assert_eq!(take(&mut backlog, 1).0, [server(2, 1)]);
        assert_eq!(take(&mut backlog, 2).0, [server(1, 1), server(2, 2)], "small jobs share a part");
        assert!(backlog.has_job(&ObjectName::new("default", "large")));
        assert!(backlog.contains(&server(1, 2)) && !backlog.contains(&server(1, 1)), "one was taken");
        assert_eq!(take(&mut backlog, 9).0, [server(1, 2), server(1, 3)]);
        assert!(backlog.is_empty() && backlog.take(1, |_| 1).is_none());
        assert!(!backlog.has_job(&ObjectName::new("default", "large")));
    }

    #[test]
    fn a_vip_is_guarded_before_its_front_ends_and_bound_after_them() {
        let mut backlog = Backlog::default();
        let vip = Key::Vip(address(1));
        backlog.push(name("web"), false, wanted([vip.clone(), server(1, 1), server(1, 2)]));
        assert_eq!(take(&mut backlog, 2), (vec![server(1, 1), vip.clone()], vec![address(1)]));
        assert_eq!(take(&mut backlog, 1), (vec![server(1, 2)], vec![]));
        assert_eq!(take(&mut backlog, 1), (vec![vip.clone()], vec![]));
        backlog.push(name("web"), false, wanted([vip.clone(), server(1, 1)]));
        assert_eq!(take(&mut backlog, 3), (vec![server(1, 1), vip], vec![]), "all in one part");
    }

    #[test]
    fn a_vip_that_goes_is_unbound_before_its_front_ends() {
        let mut backlog = Backlog::default();
        let vip = Key::Vip(address(1));
        backlog.push(name("web"), false, [(server(1, 1), 1, false), (vip.clone(), 1, false)]);
        assert_eq!(take(&mut backlog, 1), (vec![vip], vec![address(1)]));
        assert_eq!(take(&mut backlog, 1), (vec![server(1, 1)], vec![]));
        assert!(backlog.is_empty());
    }

    #[test]
    fn a_key_is_held_once_however_often_it_changes() {
        let mut backlog = Backlog::default();
        for _ in 0..100 {
            backlog.push(name("web"), false, wanted([server(1, 1), server(1, 2)]));
        }
        assert_eq!((backlog.keys().count(), backlog.len()), (2, 2));
    }

    #[test]
    fn what_front_ends_refer_to_is_added_first_and_deleted_last() {
        let mut backlog = Backlog::default();
        let ranges = |service| Key::SourceRanges(ObjectName::new("default", service), ipvs_netlink::Family::Ipv4);
        let keys = [(ranges("old"), 1, false), (server(1, 1), 1, true), (ranges("new"), 1, true)];
        backlog.push(name("web"), false, keys);
        let order: Vec<Key> = (0..3).flat_map(|_| take(&mut backlog, 1).0).collect();
        assert_eq!(order, [ranges("new"), server(1, 1), ranges("old")]);
    }
}
