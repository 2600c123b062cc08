//! Messages of a source, and the emitter that sends them.

use std::collections::HashMap;
use std::fmt;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tracing::{info, warn};

use crate::model::{Change, ObjectName};

/// A message of a source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// A change of an object, or of the state of the source.
    Change(Change),
    /// Changes that were read at once, and belong together.
    Changes(Vec<Change>),
    /// The problems of something have changed.
    Report(Report),
}

/// The problems of one subject; replaces the earlier report about it.
///
/// Sent when the problems change, not each time they are found again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// What the report is about.
    pub subject: Subject,
    /// Each says what was found, the effect, and what to do. Empty if all were resolved.
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
    /// The watch of a kind on the API server.
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
    /// Nodes: this agent's, or all.
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

/// Counters of a source since it was created.
#[derive(Debug, Default)]
pub struct Counters {
    changes: AtomicU64,
    problems: AtomicU64,
    errors: AtomicU64,
    lists: AtomicU64,
}

impl Counters {
    /// Changes sent.
    pub fn changes(&self) -> u64 {
        self.changes.load(Ordering::Relaxed)
    }

    /// Invalid objects and parts of objects, counted each time one was read.
    pub fn problems(&self) -> u64 {
        self.problems.load(Ordering::Relaxed)
    }

    /// Failed requests to the API server and files that could not be read, reported or not.
    pub fn errors(&self) -> u64 {
        self.errors.load(Ordering::Relaxed)
    }

    /// Complete lists: from an API server one for each kind at the start, then one for each relist; from a directory
    /// one for each reading of all files.
    pub fn lists(&self) -> u64 {
        self.lists.load(Ordering::Relaxed)
    }
}

/// Sends messages to the sink: counts, logs and deduplicates them.
pub(crate) struct Emitter<F> {
    sink: F,
    counters: Arc<Counters>,
    /// The current problems.
    reported: HashMap<Subject, Vec<String>>,
    /// The last value sent.
    incomplete: bool,
    is_closed: bool,
    /// Changes that are sent together once all of them are known.
    together: Option<Vec<Change>>,
}

impl<F: FnMut(Message) -> ControlFlow<()>> Emitter<F> {
    pub(crate) fn new(sink: F, counters: Arc<Counters>) -> Self {
        Self { sink, counters, reported: HashMap::new(), incomplete: false, is_closed: false, together: None }
    }

    /// Whether the sink has ended the run.
    pub(crate) fn is_closed(&self) -> bool {
        self.is_closed
    }

    pub(crate) fn change(&mut self, change: Change) {
        self.counters.changes.fetch_add(1, Ordering::Relaxed);
        match &mut self.together {
            Some(together) => together.push(change),
            None => self.emit(Message::Change(change)),
        }
    }

    /// Sends the changes that `emit` makes as one message.
    pub(crate) fn together(&mut self, emit: impl FnOnce(&mut Self)) {
        self.together = Some(Vec::new());
        emit(self);
        match self.together.take() {
            Some(changes) if !changes.is_empty() => self.emit(Message::Changes(changes)),
            _ => {}
        }
    }

    /// Sends [`Change::Incomplete`] if it changed.
    pub(crate) fn set_incomplete(&mut self, incomplete: bool) {
        if self.incomplete != incomplete {
            self.incomplete = incomplete;
            self.change(Change::Incomplete(incomplete));
        }
    }

    /// Reports the problems of an object if they changed.
    pub(crate) fn problems(&mut self, subject: Subject, problems: Vec<String>) {
        self.counters.problems.fetch_add(problems.len() as u64, Ordering::Relaxed);
        self.report(subject, problems);
    }

    /// Counts a failure to read something, and reports it if it changed.
    pub(crate) fn error(&mut self, subject: Subject, problem: String) {
        self.count_error();
        self.report(subject, vec![problem]);
    }

    /// Counts a failure to read something.
    pub(crate) fn count_error(&self) {
        self.counters.errors.fetch_add(1, Ordering::Relaxed);
    }

    /// Reports that `subject` has no problems, or no longer exists.
    pub(crate) fn resolve(&mut self, subject: Subject) {
        self.report(subject, Vec::new());
    }

    /// Resolves the subjects that `matches` selects.
    pub(crate) fn resolve_matching(&mut self, matches: impl Fn(&Subject) -> bool) {
        let subjects: Vec<Subject> = self.reported.keys().filter(|subject| matches(subject)).cloned().collect();
        for subject in subjects {
            self.resolve(subject);
        }
    }

    pub(crate) fn count_list(&self) {
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
            info!("{subject}: the problems are resolved, or the object was deleted");
            self.reported.remove(&subject);
        } else {
            self.reported.insert(subject.clone(), problems.clone());
        }
        self.emit(Message::Report(Report { subject, problems }));
    }

    fn emit(&mut self, message: Message) {
        if !self.is_closed && (self.sink)(message).is_break() {
            self.is_closed = true;
        }
    }
}
