//! The queue between a source and the main loop. It holds one change for each object, the last: however often an object changes while
//! the kernel is being programmed, the queue grows no further, and only the last version is computed.
//!
//! That loses nothing, since what is programmed follows from the objects and not from their history. A deletion that is followed by an
//! addition becomes the addition, which replaces the object that was known.
//!
//! Changes that belong together often come one by one: a Service and its EndpointSlices are watched separately, and an endpoint that
//! moves to another slice is deleted in one and added in the other. So changes are [gathered](GATHERING) before they are received, and
//! those of one reading of manifests are sent and received together.

use std::collections::VecDeque;
use std::mem;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use foldhash::HashMap;
use service_watch::{Change, ObjectName};

use crate::run::Input;

/// For how long no change must have come before those that wait are received.
pub const GATHERING: Duration = Duration::from_millis(20);

/// How long a change waits at most while others keep coming.
pub const GATHERING_MAX: Duration = Duration::from_millis(40);

/// What a change is about.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Subject {
    Service(ObjectName),
    Slice(ObjectName),
    Node,
    PeerNode(Arc<str>),
    ApiServerAddresses,
    Incomplete,
    Synced,
}

impl Subject {
    fn of(change: &Change) -> Self {
        match change {
            Change::Service(service) => Self::Service(service.name.clone()),
            Change::ServiceDeleted(name) => Self::Service(name.clone()),
            Change::Slice(slice) => Self::Slice(slice.name.clone()),
            Change::SliceDeleted(name) => Self::Slice(name.clone()),
            Change::Node(_) | Change::NodeDeleted => Self::Node,
            Change::PeerNode(name, _) | Change::PeerNodeDeleted(name) => Self::PeerNode(name.clone()),
            Change::ApiServerAddresses(_) => Self::ApiServerAddresses,
            Change::Incomplete(_) => Self::Incomplete,
            Change::Synced => Self::Synced,
        }
    }
}

/// An input as it is received.
#[derive(Clone, Debug)]
pub struct Received {
    /// The input. Of a change, the time is that of the first one that this one stands for.
    pub input: Input,
    /// How many inputs it stands for.
    pub count: usize,
}

#[derive(Debug, Default)]
struct Queue {
    inputs: VecDeque<Received>,
    /// Where the change of each subject is in `inputs`.
    indices: HashMap<Subject, usize>,
    /// When the first and the last of the changes in `inputs` came; `None` if there are none.
    gathering: Option<Gathering>,
    /// Inputs that are no changes of objects: one of each kind. They do not wait.
    others: Vec<Input>,
    senders: usize,
    is_receiver_gone: bool,
}

/// The changes that wait for others that belong to them. It reads no clock: the caller passes the time.
#[derive(Clone, Copy, Debug)]
struct Gathering {
    first: Instant,
    last: Instant,
    /// Whether nothing that belongs to them is to come: the initial list is complete.
    is_complete: bool,
}

impl Gathering {
    /// When the changes are received.
    fn end(&self) -> Instant {
        if self.is_complete { self.first } else { (self.last + GATHERING).min(self.first + GATHERING_MAX) }
    }
}

impl Queue {
    /// Adds a change, or replaces a change of the same object at its place.
    fn add(&mut self, change: Change, since: Instant) {
        let is_complete = matches!(change, Change::Synced);
        let gathering = self.gathering.get_or_insert(Gathering { first: since, last: since, is_complete });
        gathering.last = gathering.last.max(since);
        gathering.is_complete |= is_complete;
        let index = *self.indices.entry(Subject::of(&change)).or_insert(self.inputs.len());
        if let Some(Received { input: Input::Change(held, _), count }) = self.inputs.get_mut(index) {
            *held = change;
            *count += 1;
        } else {
            self.inputs.push_back(Received { input: Input::Change(change, since), count: 1 });
        }
    }

    /// When something can be received, if nothing more comes; `None` if nothing waits.
    fn due(&self, now: Instant) -> Option<Instant> {
        let gathered = self.gathering.map(|gathering| gathering.end());
        if !self.others.is_empty() || (self.senders == 0 && gathered.is_some()) { Some(now) } else { gathered }
    }

    /// Takes what can be received.
    fn take(&mut self, now: Instant) -> impl Iterator<Item = Received> + use<> {
        let is_gathered = self.gathering.is_some_and(|gathering| self.senders == 0 || gathering.end() <= now);
        let inputs = if is_gathered {
            self.indices.clear();
            self.gathering = None;
            mem::take(&mut self.inputs)
        } else {
            VecDeque::new()
        };
        let others = mem::take(&mut self.others).into_iter().map(|input| Received { input, count: 1 });
        inputs.into_iter().chain(others)
    }
}

#[derive(Debug, Default)]
struct Shared {
    queue: Mutex<Queue>,
    has_changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The receiver is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the reconciler has ended")]
pub struct Closed;

/// Why nothing was received.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Nothing {
    /// The time is over.
    Timeout,
    /// All senders are gone.
    Disconnected,
}

/// Sends inputs. It never blocks.
#[derive(Debug)]
pub struct Sender(Arc<Shared>);

/// Receives inputs.
#[derive(Debug)]
pub struct Inbox(Arc<Shared>);

/// Creates a queue.
pub fn channel() -> (Sender, Inbox) {
    let shared = Arc::new(Shared::default());
    shared.lock().senders = 1;
    (Sender(shared.clone()), Inbox(shared))
}

impl Sender {
    /// Adds an input to the queue. A change replaces a change of the same object, at its place.
    pub fn send(&self, input: Input) -> Result<(), Closed> {
        self.update(|queue| match input {
            Input::Change(change, since) => queue.add(change, since),
            other => {
                let is_same = |held: &&mut Input| mem::discriminant(*held) == mem::discriminant(&other);
                match (queue.others.iter_mut().find(is_same), other) {
                    (Some(Input::AddressesDeleted(held)), Input::AddressesDeleted(mut more)) => held.append(&mut more),
                    (Some(Input::RoutesDeleted(held)), Input::RoutesDeleted(mut more)) => held.append(&mut more),
                    (Some(_), _) => {}
                    (None, other) => queue.others.push(other),
                }
            }
        })
    }

    /// Adds changes that were read together at this time. They are received together.
    pub fn send_changes(&self, changes: impl IntoIterator<Item = Change>, since: Instant) -> Result<(), Closed> {
        self.update(|queue| changes.into_iter().for_each(|change| queue.add(change, since)))
    }

    fn update(&self, update: impl FnOnce(&mut Queue)) -> Result<(), Closed> {
        let mut queue = self.0.lock();
        if queue.is_receiver_gone {
            return Err(Closed);
        }
        update(&mut queue);
        drop(queue);
        self.0.has_changed.notify_one();
        Ok(())
    }
}

impl Clone for Sender {
    fn clone(&self) -> Self {
        self.0.lock().senders += 1;
        Self(self.0.clone())
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        self.0.lock().senders -= 1;
        self.0.has_changed.notify_one();
    }
}

impl Inbox {
    /// Waits for inputs and takes all of them; changes once they are [gathered](GATHERING). Without a timeout it waits as long as
    /// there are senders.
    pub fn receive(&self, timeout: Option<Duration>) -> Result<impl Iterator<Item = Received> + use<>, Nothing> {
        let deadline = timeout.map(|timeout| Instant::now() + timeout);
        let mut queue = self.0.lock();
        loop {
            let now = Instant::now();
            let due = queue.due(now);
            if due.is_some_and(|due| due <= now) {
                return Ok(queue.take(now));
            }
            if due.is_none() && queue.senders == 0 {
                return Err(Nothing::Disconnected);
            }
            if deadline.is_some_and(|deadline| deadline <= now) {
                return Err(Nothing::Timeout);
            }
            let has_changed = &self.0.has_changed;
            queue = match due.into_iter().chain(deadline).min() {
                None => has_changed.wait(queue).unwrap_or_else(PoisonError::into_inner),
                Some(until) => {
                    let wait = until.saturating_duration_since(now);
                    has_changed.wait_timeout(queue, wait).unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }
}

impl Drop for Inbox {
    fn drop(&mut self) {
        self.0.lock().is_receiver_gone = true;
    }
}

#[cfg(test)]
mod tests {
    use service_watch::Node;

    use super::*;

    fn service(service: &str, port: Option<u16>) -> Change {
        let name = ObjectName::new("default", service);
        let Some(port) = port else { return Change::ServiceDeleted(name) };
        Change::Service(service_watch::Service {
            name,
            created: None,
            kind: service_watch::ServiceKind::ClusterIp,
            cluster_ips: vec![[10, 96, 0, 1].into()],
            external_ips: vec![],
            load_balancer_ips: vec![],
            ports: vec![service_watch::ServicePort {
                name: "".into(),
                protocol: service_watch::Protocol::Tcp,
                port: port.try_into().unwrap(),
                node_port: None,
            }],
            affinity_seconds: None,
            internal_policy: service_watch::TrafficPolicy::Cluster,
            external_policy: service_watch::TrafficPolicy::Cluster,
            source_ranges: None,
            health_check_node_port: None,
        })
    }

    fn slice_deleted(name: &str) -> Change {
        Change::SliceDeleted(ObjectName::new("default", name))
    }

    /// What is received after these changes, each with its count.
    fn received(changes: Vec<Change>) -> Vec<(Change, usize)> {
        let (sender, inbox) = channel();
        for change in changes {
            sender.send(Input::Change(change, Instant::now())).unwrap();
        }
        drop(sender);
        let received = inbox.receive(Some(Duration::ZERO)).into_iter().flatten();
        received
            .filter_map(|it| match it.input {
                Input::Change(change, _) => Some((change, it.count)),
                _ => None,
            })
            .collect()
    }

    #[test]
    fn an_object_that_changes_a_thousand_times_is_one_change() {
        let changes = (1..=1000).map(|port| service("web", Some(port))).collect();
        assert_eq!(received(changes), [(service("web", Some(1000)), 1000)]);
    }

    #[test]
    fn the_last_of_deletion_and_addition_is_received() {
        let (added, again, deleted) = (service("web", Some(1)), service("web", Some(2)), service("web", None));
        for (changes, expected) in [
            (vec![deleted.clone(), added.clone()], (added.clone(), 2)),
            (vec![added.clone(), deleted.clone()], (deleted.clone(), 2)),
            (vec![added.clone(), deleted.clone(), again.clone()], (again.clone(), 3)),
            (vec![deleted.clone(), again.clone(), deleted.clone()], (deleted.clone(), 3)),
        ] {
            assert_eq!(received(changes), [expected]);
        }
    }

    #[test]
    fn objects_of_different_kinds_with_one_name_are_different() {
        let changes = vec![service("web", None), slice_deleted("web"), Change::PeerNodeDeleted("web".into())];
        assert_eq!(received(changes.clone()), changes.into_iter().map(|it| (it, 1)).collect::<Vec<_>>());
        let node = Change::Node(Node::default());
        assert_eq!(received(vec![Change::NodeDeleted, node.clone()]), [(node, 2)]);
    }

    #[test]
    fn what_came_before_the_end_of_the_list_stays_before_it() {
        let changes = vec![service("web", Some(1)), Change::Synced, service("web", Some(2)), service("late", Some(3))];
        let expected = [(service("web", Some(2)), 2), (Change::Synced, 1), (service("late", Some(3)), 1)];
        assert_eq!(received(changes), expected);
    }

    #[test]
    fn other_inputs_are_held_once() {
        let (sender, inbox) = channel();
        for _ in 0..100 {
            sender.send(Input::InterfacesChanged).unwrap();
            sender.send(Input::DeviceLost).unwrap();
        }
        assert_eq!(inbox.receive(None).unwrap().count(), 2);
        for last in 1..=3 {
            sender.send(Input::AddressesDeleted(vec![[10, 96, 0, last].into()])).unwrap();
        }
        let received: Vec<_> = inbox.receive(None).unwrap().collect();
        let [Received { input: Input::AddressesDeleted(addresses), .. }] = received.as_slice() else {
            panic!("{received:?}")
        };
        assert_eq!(addresses.len(), 3);
        assert_eq!(inbox.receive(Some(Duration::ZERO)).err(), Some(Nothing::Timeout));
    }

    #[test]
    fn both_ends_notice_that_the_other_is_gone() {
        let (sender, inbox) = channel();
        let other = sender.clone();
        drop(sender);
        other.send(Input::DeviceLost).unwrap();
        drop(other);
        assert_eq!(inbox.receive(None).unwrap().count(), 1, "what was sent is received");
        assert_eq!(inbox.receive(None).err(), Some(Nothing::Disconnected));
        let (sender, inbox) = channel();
        drop(inbox);
        assert_eq!(sender.send(Input::DeviceLost), Err(Closed));
    }

    #[test]
    fn a_receiver_that_waits_is_woken() {
        let (sender, inbox) = channel();
        let waiting = std::thread::spawn(move || inbox.receive(None).map(Iterator::count));
        sender.send(Input::InterfacesChanged).unwrap();
        assert_eq!(waiting.join().unwrap(), Ok(1));
    }

    #[test]
    fn gathering_ends_after_a_silence_or_its_limit() {
        let start = Instant::now();
        let after = |millis| start + Duration::from_millis(millis);
        // When changes come, in ms, and when they are received.
        for (times, end) in [
            (vec![0], 20),
            (vec![0, 10], 30),
            (vec![0, 10, 19], 39),
            (vec![0, 10, 20, 30], 40),
            (vec![0, 15, 30, 39], 40),
        ] {
            let mut queue = Queue { senders: 1, ..Queue::default() };
            for (number, time) in (1..).zip(&times) {
                queue.add(service("web", Some(number)), after(*time));
            }
            assert_eq!(queue.due(start), Some(after(end)), "{times:?}");
            assert_eq!(queue.take(after(end - 1)).count(), 0, "{times:?}");
            assert_eq!(queue.take(after(end)).count(), 1, "{times:?}");
            assert_eq!(queue.due(start), None, "{times:?}");
        }
    }

    #[test]
    fn the_end_of_the_list_and_other_inputs_do_not_wait() {
        let (sender, inbox) = channel();
        let now = Instant::now() + Duration::from_secs(3600);
        sender.send(Input::Change(service("web", Some(1)), now)).unwrap();
        sender.send(Input::DeviceLost).unwrap();
        let kinds = |received: Vec<Received>| -> Vec<bool> {
            received.iter().map(|it| matches!(it.input, Input::Change(..))).collect()
        };
        assert_eq!(kinds(inbox.receive(None).unwrap().collect()), [false], "changes are still gathered");
        assert_eq!(inbox.receive(Some(Duration::ZERO)).err(), Some(Nothing::Timeout));
        sender.send(Input::Change(Change::Synced, Instant::now())).unwrap();
        let queue = &mut *inbox.0.lock();
        assert_eq!(queue.due(now), Some(now));
        assert_eq!(kinds(queue.take(now).collect()), [true, true]);
    }

    #[test]
    fn changes_that_were_read_together_are_received_together() {
        let (sender, inbox) = channel();
        let changes = |number| (0..100).map(move |it| service(&format!("s{it}"), Some(number)));
        let sending = std::thread::spawn(move || {
            for number in 1..=50 {
                sender.send_changes(changes(number), Instant::now()).unwrap();
            }
        });
        let mut all = 0;
        while let Ok(received) = inbox.receive(None) {
            let ports: std::collections::BTreeSet<_> = received
                .filter_map(|it| match it.input {
                    Input::Change(Change::Service(service), _) => Some(service.ports[0].port),
                    _ => None,
                })
                .collect();
            assert_eq!(ports.len(), 1, "all of one reading");
            all += 1;
        }
        sending.join().unwrap();
        assert!(all > 0);
    }
}
