//! The queue between a source and the main loop. It holds one change for each object, the last: however often an object changes while
//! the kernel is being programmed, the queue grows no further, and only the last version is computed.
//!
//! That loses nothing, since what is programmed follows from the objects and not from their history. A deletion that is followed by an
//! addition becomes the addition, which replaces the object that was known.

use std::collections::VecDeque;
use std::mem;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use foldhash::HashMap;
use service_watch::{Change, ObjectName};

use crate::run::Input;

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
    /// Inputs that are no changes of objects: one of each kind.
    others: Vec<Input>,
    senders: usize,
    is_receiver_gone: bool,
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
        let mut queue = self.0.lock();
        if queue.is_receiver_gone {
            return Err(Closed);
        }
        let Queue { inputs, indices, others, .. } = &mut *queue;
        match input {
            Input::Change(change, since) => {
                let index = *indices.entry(Subject::of(&change)).or_insert(inputs.len());
                if let Some(Received { input: Input::Change(held, _), count }) = inputs.get_mut(index) {
                    *held = change;
                    *count += 1;
                } else {
                    inputs.push_back(Received { input: Input::Change(change, since), count: 1 });
                }
            }
            other => {
                let is_same = |held: &&mut Input| mem::discriminant(*held) == mem::discriminant(&other);
                match (others.iter_mut().find(is_same), other) {
                    (Some(Input::AddressesDeleted(held)), Input::AddressesDeleted(mut more)) => held.append(&mut more),
                    (Some(Input::RoutesDeleted(held)), Input::RoutesDeleted(mut more)) => held.append(&mut more),
                    (Some(_), _) => {}
                    (None, other) => others.push(other),
                }
            }
        }
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
    /// Waits for inputs and takes all of them. Without a timeout it waits as long as there are senders.
    pub fn receive(&self, timeout: Option<Duration>) -> Result<impl Iterator<Item = Received>, Nothing> {
        let deadline = timeout.map(|timeout| Instant::now() + timeout);
        let mut queue = self.0.lock();
        while queue.inputs.is_empty() && queue.others.is_empty() {
            if queue.senders == 0 {
                return Err(Nothing::Disconnected);
            }
            queue = match deadline.map(|deadline| deadline.saturating_duration_since(Instant::now())) {
                None => self.0.has_changed.wait(queue).unwrap_or_else(PoisonError::into_inner),
                Some(Duration::ZERO) => return Err(Nothing::Timeout),
                Some(rest) => self.0.has_changed.wait_timeout(queue, rest).unwrap_or_else(PoisonError::into_inner).0,
            };
        }
        queue.indices.clear();
        let others = mem::take(&mut queue.others).into_iter().map(|input| Received { input, count: 1 });
        Ok(mem::take(&mut queue.inputs).into_iter().chain(others))
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
}
