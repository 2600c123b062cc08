//! What the files of a directory say, and which of them is believed.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ffi::OsString;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;

use super::read::{FileRead, Found, read_file};
use crate::convert::{Converter, Outcome};
use crate::model::Change;
use crate::report::{Message, Outlet, Subject};

/// All files, as far as they could be read.
#[derive(Debug)]
pub(super) struct Shelf {
    directory: PathBuf,
    node: Arc<str>,
    converter: Converter,
    files: BTreeMap<OsString, File>,
    /// Who says what of an object. The file that sorts first is believed.
    claims: HashMap<Subject, BTreeMap<OsString, Claim>>,
}

#[derive(Debug, Default)]
struct File {
    subjects: Vec<Subject>,
    /// What is wrong with the file itself.
    problems: Vec<String>,
}

/// What a file says of an object.
#[derive(Debug)]
struct Claim {
    /// `None`: that a proxy does not serve it.
    fact: Option<Change>,
    problems: Vec<String>,
}

impl Shelf {
    pub(super) fn new(directory: PathBuf, node: Arc<str>) -> Self {
        Self { directory, node, converter: Converter::default(), files: BTreeMap::new(), claims: HashMap::new() }
    }

    /// The files it has something of.
    pub(super) fn names(&self) -> Vec<OsString> {
        self.files.keys().cloned().collect()
    }

    /// Reads these files and says what that changes.
    pub(super) fn read<F: FnMut(Message) -> ControlFlow<()>>(
        &mut self,
        names: BTreeSet<OsString>,
        outlet: &mut Outlet<F>,
    ) {
        let mut before = BTreeMap::new();
        for name in &names {
            match read_file(&self.directory.join(name), &self.node, &mut self.converter) {
                FileRead::Absent => self.replace(name, Vec::new(), None, &mut before),
                FileRead::Objects(found, problems) => self.replace(name, found, Some(problems), &mut before),
                FileRead::Failed(problem) => {
                    outlet.failed();
                    let file = self.files.entry(name.clone()).or_default();
                    file.problems = vec![format!("{problem}; what it said before stays")];
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
        problems: Option<Vec<String>>,
        before: &mut BTreeMap<Subject, Option<Change>>,
    ) {
        let mut old = HashMap::new();
        for subject in self.files.remove(name).unwrap_or_default().subjects {
            before.entry(subject.clone()).or_insert_with(|| believed(&self.claims, &subject));
            if let Some(claim) = self.claims.get_mut(&subject).and_then(|claims| claims.remove(name)) {
                old.insert(subject, claim);
            }
        }
        let Some(problems) = problems else { return };
        let mut file = File { subjects: Vec::new(), problems };
        for Found { subject, outcome, problems } in found {
            before.entry(subject.clone()).or_insert_with(|| believed(&self.claims, &subject));
            let claims = self.claims.entry(subject.clone()).or_default();
            if claims.contains_key(name) {
                file.problems.push(format!("has {subject} more than once: only the first counts; remove the others"));
                continue;
            }
            let fact = match outcome {
                Outcome::Serve(fact) => Some(fact),
                Outcome::Ignore => None,
                Outcome::Broken => old.remove(&subject).and_then(|claim| claim.fact),
            };
            claims.insert(name.clone(), Claim { fact, problems });
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
        let mut arrived = Vec::new();
        for (subject, was) in before {
            let claims = self.claims.get(&subject);
            let claim = claims.and_then(|claims| claims.values().next());
            let fact = claim.and_then(|claim| claim.fact.clone());
            if fact != was {
                if let Some(fact) = fact {
                    arrived.push(fact);
                } else if let Some(gone) = subject.clone().gone() {
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
