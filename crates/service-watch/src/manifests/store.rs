//! The objects of all files of a directory; where files conflict, the one that sorts first wins.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::ffi::OsString;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;

use super::read::{FileContent, ManifestObject, Stamp, read_file};
use crate::convert::{Conversion, Converter, invalid_object};
use crate::model::Change;
use crate::report::{Emitter, Message, Subject};

/// The content of all files.
#[derive(Debug)]
pub(super) struct ManifestStore {
    directory: PathBuf,
    converter: Converter,
    files: BTreeMap<OsString, File>,
    /// The definitions of each object by file. The file that sorts first is effective.
    definitions: HashMap<Subject, BTreeMap<OsString, Definition>>,
    /// Files that could never be read: their content is unknown.
    unreadable: BTreeSet<OsString>,
    /// Objects whose effective definition is invalid and has no earlier valid version.
    invalid: HashSet<Subject>,
    /// Files that the last poll found changed; they are read once the next poll finds them unchanged.
    unsettled: HashMap<OsString, Option<Stamp>>,
}

#[derive(Debug, Default)]
struct File {
    subjects: Vec<Subject>,
    /// The problems of the file itself.
    problems: Vec<String>,
    /// Its stamp when it was read; `None` if reading it must be retried.
    stamp: Option<Stamp>,
}

/// The definition of an object in a file.
#[derive(Debug)]
struct Definition {
    /// `None` if this proxy does not serve it.
    change: Option<Change>,
    /// It is invalid, and never was valid in this file.
    invalid: bool,
    problems: Vec<String>,
}

impl ManifestStore {
    pub(super) fn new(directory: PathBuf, node: Arc<str>) -> Self {
        Self {
            directory,
            converter: Converter::for_manifests(node),
            files: BTreeMap::new(),
            definitions: HashMap::new(),
            unreadable: BTreeSet::new(),
            invalid: HashSet::new(),
            unsettled: HashMap::new(),
        }
    }

    /// Whether no file is known.
    pub(super) fn is_empty(&self) -> bool {
        self.files.is_empty()
    }

    /// The names of the known files.
    pub(super) fn names(&self) -> Vec<OsString> {
        self.files.keys().cloned().collect()
    }

    /// Polls for files that changed since they were read, given the names in the directory; also returns whether
    /// another poll is needed soon. A changed file is returned once two polls find it the same, as it may still be
    /// being written.
    pub(super) fn changed_files(&mut self, names: &BTreeSet<OsString>) -> (BTreeSet<OsString>, bool) {
        let mut changed = BTreeSet::new();
        let mut unsettled = HashMap::new();
        for name in names.iter().chain(self.files.keys().filter(|name| !names.contains(*name))) {
            let stamp = Stamp::of(&self.directory.join(name));
            match self.files.get(name) {
                None if stamp.is_none() => continue,
                Some(file) if stamp.is_some() && file.stamp == stamp => continue,
                _ => {}
            }
            if self.unsettled.get(name) == Some(&stamp) {
                changed.insert(name.clone());
            } else {
                unsettled.insert(name.clone(), stamp);
            }
        }
        self.unsettled = unsettled;
        (changed, !self.unsettled.is_empty())
    }

    /// Reads these files and emits what that changes, as one message.
    pub(super) fn read<F: FnMut(Message) -> ControlFlow<()>>(
        &mut self,
        names: BTreeSet<OsString>,
        emitter: &mut Emitter<F>,
    ) {
        let mut before = BTreeMap::new();
        for name in &names {
            let (read, stamp) = read_file(&self.directory.join(name), &mut self.converter);
            match read {
                FileContent::Absent => {
                    self.unreadable.remove(name);
                    self.replace(name, Vec::new(), None, &mut before);
                }
                FileContent::Objects(objects, problems) => {
                    self.unreadable.remove(name);
                    let file = File { subjects: Vec::new(), problems, stamp };
                    self.replace(name, objects, Some(file), &mut before);
                }
                FileContent::Failed(problem) => {
                    emitter.count_error();
                    if !self.files.contains_key(name) {
                        self.unreadable.insert(name.clone());
                    }
                    let invalid_object = if self.unreadable.contains(name) {
                        "nothing is removed until it is corrected"
                    } else {
                        "its last valid content stays in use"
                    };
                    let file = self.files.entry(name.clone()).or_default();
                    file.problems = vec![format!("{problem}; {invalid_object}")];
                    file.stamp = stamp;
                }
            }
        }
        emitter.together(|emitter| self.emit_changes(before, names, emitter));
    }

    /// Replaces the objects of a file. `before` collects what was effective before for each object touched.
    fn replace(
        &mut self,
        name: &OsString,
        objects: Vec<ManifestObject>,
        file: Option<File>,
        before: &mut BTreeMap<Subject, Option<Change>>,
    ) {
        let mut old = HashMap::new();
        for subject in self.files.remove(name).unwrap_or_default().subjects {
            before.entry(subject.clone()).or_insert_with(|| effective(&self.definitions, &subject));
            if let Some(definition) =
                self.definitions.get_mut(&subject).and_then(|definitions| definitions.remove(name))
            {
                old.insert(subject, definition);
            }
        }
        let Some(mut file) = file else { return };
        for ManifestObject { subject, conversion, mut problems } in objects {
            before.entry(subject.clone()).or_insert_with(|| effective(&self.definitions, &subject));
            let definitions = self.definitions.entry(subject.clone()).or_default();
            if definitions.contains_key(name) {
                file.problems.push(format!("has {subject} more than once: only the first is used; remove the others"));
                continue;
            }
            let (change, invalid) = match conversion {
                Conversion::Serve(change) => (Some(change), false),
                Conversion::Ignore => (None, false),
                Conversion::Invalid => {
                    let old = old.remove(&subject).filter(|definition| !definition.invalid);
                    problems.push(invalid_object(old.is_some()));
                    (old.as_ref().and_then(|definition| definition.change.clone()), old.is_none())
                }
            };
            definitions.insert(name.clone(), Definition { change, invalid, problems });
            file.subjects.push(subject);
        }
        self.files.insert(name.clone(), file);
    }

    /// Emits how the effective objects differ from `before`, deletions first, and the problems.
    fn emit_changes<F: FnMut(Message) -> ControlFlow<()>>(
        &mut self,
        before: BTreeMap<Subject, Option<Change>>,
        mut files: BTreeSet<OsString>,
        emitter: &mut Emitter<F>,
    ) {
        for subject in before.keys() {
            if self
                .definitions
                .get(subject)
                .and_then(|definitions| definitions.values().next())
                .is_some_and(|definition| definition.invalid)
            {
                self.invalid.insert(subject.clone());
            } else {
                self.invalid.remove(subject);
            }
        }
        let incomplete = !self.unreadable.is_empty() || !self.invalid.is_empty();
        if incomplete {
            // Before any deletion: the object may be in an unreadable file.
            emitter.set_incomplete(true);
        }
        let mut arrived = Vec::new();
        for (subject, was) in before {
            let definitions = self.definitions.get(&subject);
            let definition = definitions.and_then(|definitions| definitions.values().next());
            let change = definition.and_then(|definition| definition.change.clone());
            if change != was {
                if let Some(change) = change {
                    arrived.push(change);
                } else if let Some(deletion) = self.converter.deletion(subject.clone()) {
                    emitter.change(deletion);
                }
            }
            emitter.problems(
                subject.clone(),
                definition.map(|definition| definition.problems.clone()).unwrap_or_default(),
            );
            // The problems of the other files that define it depend on which is first.
            files.extend(definitions.into_iter().flat_map(BTreeMap::keys).cloned());
            if definition.is_none() {
                self.definitions.remove(&subject);
            }
        }
        for change in arrived {
            emitter.change(change);
        }
        if !incomplete {
            emitter.set_incomplete(false);
        }
        for name in files {
            let problems = self.problems(&name);
            emitter.problems(Subject::File(self.directory.join(&name)), problems);
        }
    }

    /// All problems of a file.
    fn problems(&self, name: &OsString) -> Vec<String> {
        let Some(file) = self.files.get(name) else { return Vec::new() };
        let mut problems = file.problems.clone();
        for subject in &file.subjects {
            if let Some(first) = self.definitions.get(subject).and_then(|definitions| definitions.keys().next())
                && first != name
            {
                let first = first.display();
                problems.push(format!("has {subject}, but {first} has it too and sorts first: not used; remove one"));
            }
        }
        problems
    }
}

fn effective(definitions: &HashMap<Subject, BTreeMap<OsString, Definition>>, subject: &Subject) -> Option<Change> {
    definitions.get(subject)?.values().next()?.change.clone()
}
