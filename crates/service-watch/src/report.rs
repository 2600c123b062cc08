//! What a source says, and the one place it says it through.

use std::collections::HashMap;
use std::fmt;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tracing::{info, warn};

use crate::model::{Change, ObjectName};

/// What a source says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// Something is new, changed or gone; or all that existed at the start has been said.
    Change(Change),
    /// What is wrong with something has changed.
    Report(Report),
}

/// All that is wrong with one thing, in place of what an earlier report said of it.
///
/// Said when it changes, not each time it is met again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// With what.
    pub subject: Subject,
    /// Each says what was found, what follows, and what to do. Empty: all is well again.
    pub problems: Vec<String>,
}

/// What a [`Report`] is about.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Subject {
    /// A Service.
    Service(ObjectName),
    /// An EndpointSlice.
    EndpointSlice(ObjectName),
    /// A Node.
    Node(Arc<str>),
    /// A file of manifests, or their directory.
    File(PathBuf),
    /// Reading objects of a kind from the API server.
    Watch(Kind),
}

impl Subject {
    /// An object of a kind.
    pub(crate) fn object(kind: Kind, name: ObjectName) -> Self {
        match kind {
            Kind::Service => Self::Service(name),
            Kind::EndpointSlice => Self::EndpointSlice(name),
            Kind::Node => Self::Node(name.name().into()),
        }
    }
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Service(name) => write!(f, "Service {name}"),
            Self::EndpointSlice(name) => write!(f, "EndpointSlice {name}"),
            Self::Node(name) => write!(f, "Node {name}"),
            Self::File(path) => write!(f, "{}", path.display()),
            Self::Watch(kind) => write!(f, "watch of {}", kind.plural()),
        }
    }
}

/// The kinds of objects a source reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// Services.
    Service,
    /// EndpointSlices.
    EndpointSlice,
    /// Nodes: the agent's own, or all.
    Node,
}

impl Kind {
    /// The name of the resource, as in an RBAC rule.
    pub fn plural(self) -> &'static str {
        match self {
            Self::Service => "services",
            Self::EndpointSlice => "endpointslices",
            Self::Node => "nodes",
        }
    }
}

/// What a source has counted since it was made.
#[derive(Debug, Default)]
pub struct Counters {
    changes: AtomicU64,
    problems: AtomicU64,
    errors: AtomicU64,
    lists: AtomicU64,
}

impl Counters {
    /// Changes said.
    pub fn changes(&self) -> u64 {
        self.changes.load(Ordering::Relaxed)
    }

    /// Objects and parts of objects that could not be used, each time one was read.
    pub fn problems(&self) -> u64 {
        self.problems.load(Ordering::Relaxed)
    }

    /// Failed requests to the API server and files that could not be read, reported or not.
    pub fn errors(&self) -> u64 {
        self.errors.load(Ordering::Relaxed)
    }

    /// Complete lists read: one per kind from an API server at the start, one per reading of the whole directory. More
    /// say how often the source had to begin anew.
    pub fn lists(&self) -> u64 {
        self.lists.load(Ordering::Relaxed)
    }
}

/// Where a source says what it has to say: counts, logs, and does not repeat itself.
pub(crate) struct Outlet<F> {
    sink: F,
    counters: Arc<Counters>,
    /// Only what is wrong now.
    reported: HashMap<Subject, Vec<String>>,
    /// What was last said of it.
    incomplete: bool,
    closed: bool,
}

impl<F: FnMut(Message) -> ControlFlow<()>> Outlet<F> {
    pub(crate) fn new(sink: F, counters: Arc<Counters>) -> Self {
        Self { sink, counters, reported: HashMap::new(), incomplete: false, closed: false }
    }

    /// Whether the sink has broken off.
    pub(crate) fn closed(&self) -> bool {
        self.closed
    }

    pub(crate) fn change(&mut self, change: Change) {
        self.counters.changes.fetch_add(1, Ordering::Relaxed);
        self.say(Message::Change(change));
    }

    /// Says whether there is something that could not be understood even once, if that is news.
    pub(crate) fn incomplete(&mut self, incomplete: bool) {
        if self.incomplete != incomplete {
            self.incomplete = incomplete;
            self.change(Change::Incomplete(incomplete));
        }
    }

    /// Says what is wrong with an object, if that is news.
    pub(crate) fn problems(&mut self, subject: Subject, problems: Vec<String>) {
        self.counters.problems.fetch_add(problems.len() as u64, Ordering::Relaxed);
        self.report(subject, problems);
    }

    /// Says why something could not be read, if that is news.
    pub(crate) fn error(&mut self, subject: Subject, problem: String) {
        self.failed();
        self.report(subject, vec![problem]);
    }

    /// Counts something that could not be read.
    pub(crate) fn failed(&self) {
        self.counters.errors.fetch_add(1, Ordering::Relaxed);
    }

    /// All is well with `subject`, or it is gone.
    pub(crate) fn well(&mut self, subject: Subject) {
        self.report(subject, Vec::new());
    }

    /// All is well with those that `gone` says are gone.
    pub(crate) fn forget(&mut self, gone: impl Fn(&Subject) -> bool) {
        let gone: Vec<Subject> = self.reported.keys().filter(|subject| gone(subject)).cloned().collect();
        for subject in gone {
            self.well(subject);
        }
    }

    pub(crate) fn listed(&self) {
        self.counters.lists.fetch_add(1, Ordering::Relaxed);
    }

    fn report(&mut self, subject: Subject, problems: Vec<String>) {
        let before = self.reported.get(&subject).map_or(&[][..], Vec::as_slice);
        if before == problems {
            return;
        }
        for problem in problems.iter().filter(|problem| !before.contains(problem)) {
            warn!("{subject}: {problem}");
        }
        if problems.is_empty() {
            info!("{subject}: well again, or gone");
            self.reported.remove(&subject);
        } else {
            self.reported.insert(subject.clone(), problems.clone());
        }
        self.say(Message::Report(Report { subject, problems }));
    }

    fn say(&mut self, message: Message) {
        if !self.closed && (self.sink)(message).is_break() {
            self.closed = true;
        }
    }
}
