//! What the files of a directory say, and which of them is believed.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::ffi::OsString;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;

use super::read::{FileRead, Found, Stamp, read_file};
use crate::convert::{Converter, Outcome, consequence};
use crate::model::Change;
use crate::report::{Message, Outlet, Subject};

/// All files, as far as they could be read.
#[derive(Debug)]
pub(super) struct Shelf {
    directory: PathBuf,
    converter: Converter,
    files: BTreeMap<OsString, File>,
    /// Who says what of an object. The file that sorts first is believed.
    claims: HashMap<Subject, BTreeMap<OsString, Claim>>,
    /// Files that could not be read even once: nobody knows what is in them.
    unread: BTreeSet<OsString>,
    /// Objects of which nobody knows what they are meant to be.
    obscure: HashSet<Subject>,
    /// What the last look found different, to be read when it has not changed any more by the next.
    differing: HashMap<OsString, Option<Stamp>>,
}

#[derive(Debug, Default)]
struct File {
    subjects: Vec<Subject>,
    /// What is wrong with the file itself.
    problems: Vec<String>,
    /// What it was like when it was read; `None` if it must be tried again.
    stamp: Option<Stamp>,
}

/// What a file says of an object.
#[derive(Debug)]
struct Claim {
    /// `None`: that a proxy does not serve it.
    fact: Option<Change>,
    /// It makes no sense, and never has in this file.
    obscure: bool,
    problems: Vec<String>,
}

impl Shelf {
    pub(super) fn new(directory: PathBuf, node: Arc<str>) -> Self {
        Self {
            directory,
            converter: Converter::by_hand(node),
            files: BTreeMap::new(),
            claims: HashMap::new(),
            unread: BTreeSet::new(),
            obscure: HashSet::new(),
            differing: HashMap::new(),
        }
    }

    /// Whether it has nothing of any file.
    pub(super) fn is_empty(&self) -> bool {
        self.files.is_empty()
    }

    /// The files it has something of.
    pub(super) fn names(&self) -> Vec<OsString> {
        self.files.keys().cloned().collect()
    }

    /// Which files are not what they were when they were read, given the names in the directory; and whether a look soon
    /// would find more. A file counts once two looks have found it the same: it may be in the middle of being written.
    pub(super) fn look(&mut self, names: &BTreeSet<OsString>) -> (BTreeSet<OsString>, bool) {
        let mut changed = BTreeSet::new();
        let mut differing = HashMap::new();
        for name in names.iter().chain(self.files.keys().filter(|name| !names.contains(*name))) {
            let stamp = Stamp::of(&self.directory.join(name));
            match self.files.get(name) {
                None if stamp.is_none() => continue,
                Some(file) if stamp.is_some() && file.stamp == stamp => continue,
                _ => {}
            }
            if self.differing.get(name) == Some(&stamp) {
                changed.insert(name.clone());
            } else {
                differing.insert(name.clone(), stamp);
            }
        }
        self.differing = differing;
        (changed, !self.differing.is_empty())
    }

    /// Reads these files and says what that changes.
    pub(super) fn read<F: FnMut(Message) -> ControlFlow<()>>(
        &mut self,
        names: BTreeSet<OsString>,
        outlet: &mut Outlet<F>,
    ) {
        let mut before = BTreeMap::new();
        for name in &names {
            let (read, stamp) = read_file(&self.directory.join(name), &mut self.converter);
            match read {
                FileRead::Absent => {
                    self.unread.remove(name);
                    self.replace(name, Vec::new(), None, &mut before);
                }
                FileRead::Objects(found, problems) => {
                    self.unread.remove(name);
                    let file = File { subjects: Vec::new(), problems, stamp };
                    self.replace(name, found, Some(file), &mut before);
                }
                FileRead::Failed(problem) => {
                    outlet.failed();
                    if !self.files.contains_key(name) {
                        self.unread.insert(name.clone());
                    }
                    let consequence = if self.unread.contains(name) {
                        "nothing it may have held is taken away until it is corrected"
                    } else {
                        "what it said before stays"
                    };
                    let file = self.files.entry(name.clone()).or_default();
                    file.problems = vec![format!("{problem}; {consequence}")];
                    file.stamp = stamp;
                }
            }
        }
        self.say(before, names, outlet);
    }

    /// Puts what a file says now in place of what it said. `before` keeps what was believed of each object touched.
    fn replace(
        &mut self,
        name: &OsString,
        found: Vec<Found>,
        file: Option<File>,
        before: &mut BTreeMap<Subject, Option<Change>>,
    ) {
        let mut old = HashMap::new();
        for subject in self.files.remove(name).unwrap_or_default().subjects {
            before.entry(subject.clone()).or_insert_with(|| believed(&self.claims, &subject));
            if let Some(claim) = self.claims.get_mut(&subject).and_then(|claims| claims.remove(name)) {
                old.insert(subject, claim);
            }
        }
        let Some(mut file) = file else { return };
        for Found { subject, outcome, mut problems } in found {
            before.entry(subject.clone()).or_insert_with(|| believed(&self.claims, &subject));
            let claims = self.claims.entry(subject.clone()).or_default();
            if claims.contains_key(name) {
                file.problems.push(format!("has {subject} more than once: only the first counts; remove the others"));
                continue;
            }
            let (fact, obscure) = match outcome {
                Outcome::Serve(fact) => (Some(fact), false),
                Outcome::Ignore => (None, false),
                Outcome::Broken => {
                    let old = old.remove(&subject).filter(|claim| !claim.obscure);
                    problems.push(consequence(old.is_some()));
                    (old.as_ref().and_then(|claim| claim.fact.clone()), old.is_none())
                }
            };
            claims.insert(name.clone(), Claim { fact, obscure, problems });
            file.subjects.push(subject);
        }
        self.files.insert(name.clone(), file);
    }

    /// Says how what is believed differs from `before`, what went first, and what is wrong with it.
    fn say<F: FnMut(Message) -> ControlFlow<()>>(
        &mut self,
        before: BTreeMap<Subject, Option<Change>>,
        mut files: BTreeSet<OsString>,
        outlet: &mut Outlet<F>,
    ) {
        for subject in before.keys() {
            if self.claims.get(subject).and_then(|claims| claims.values().next()).is_some_and(|claim| claim.obscure) {
                self.obscure.insert(subject.clone());
            } else {
                self.obscure.remove(subject);
            }
        }
        let incomplete = !self.unread.is_empty() || !self.obscure.is_empty();
        if incomplete {
            // Before anything is said to be gone: it may be in what is not understood.
            outlet.incomplete(true);
        }
        let mut arrived = Vec::new();
        for (subject, was) in before {
            let claims = self.claims.get(&subject);
            let claim = claims.and_then(|claims| claims.values().next());
            let fact = claim.and_then(|claim| claim.fact.clone());
            if fact != was {
                if let Some(fact) = fact {
                    arrived.push(fact);
                } else if let Some(gone) = self.converter.gone(subject.clone()) {
                    outlet.change(gone);
                }
            }
            outlet.problems(subject.clone(), claim.map(|claim| claim.problems.clone()).unwrap_or_default());
            // What is wrong with the other files that have it depends on which is the first.
            files.extend(claims.into_iter().flat_map(BTreeMap::keys).cloned());
            if claim.is_none() {
                self.claims.remove(&subject);
            }
        }
        for change in arrived {
            outlet.change(change);
        }
        if !incomplete {
            outlet.incomplete(false);
        }
        for name in files {
            let problems = self.problems(&name);
            outlet.problems(Subject::File(self.directory.join(&name)), problems);
        }
    }

    /// All that is wrong with a file.
    fn problems(&self, name: &OsString) -> Vec<String> {
        let Some(file) = self.files.get(name) else { return Vec::new() };
        let mut problems = file.problems.clone();
        for subject in &file.subjects {
            if let Some(first) = self.claims.get(subject).and_then(|claims| claims.keys().next())
                && first != name
            {
                let first = first.display();
                problems.push(format!("has {subject}, which {first} has too and sorts first: not used; remove one"));
            }
        }
        problems
    }
}

fn believed(claims: &HashMap<Subject, BTreeMap<OsString, Claim>>, subject: &Subject) -> Option<Change> {
    claims.get(subject)?.values().next()?.fact.clone()
}
