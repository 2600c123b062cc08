//! The store: objects, their history, and selectors.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::fail_test;

/// The plural name, the kind and the apiVersion of what is served.
const SERVED: [(&str, &str, &str); 3] = [
    ("services", "Service", "v1"),
    ("endpointslices", "EndpointSlice", "discovery.k8s.io/v1"),
    ("nodes", "Node", "v1"),
];

/// Resource, namespace and name.
type Key = (&'static str, String, String);

#[derive(Debug, Default)]
pub(crate) struct Store {
    objects: BTreeMap<Key, Object>,
    history: Vec<Change>,
    version: u64,
    compacted: u64,
}

/// An object and its JSON.
#[derive(Debug)]
struct Object {
    value: Value,
    text: String,
}

/// A change of one object.
#[derive(Clone, Debug)]
pub(crate) struct Change {
    pub(crate) version: u64,
    pub(crate) resource: &'static str,
    pub(crate) before: Option<Value>,
    pub(crate) after: Option<Value>,
}

/// A page of a list.
pub(crate) struct Page {
    pub(crate) items: Vec<Value>,
    pub(crate) next: Option<String>,
}

impl Store {
    pub(crate) fn version(&self) -> u64 {
        self.version
    }

    pub(crate) fn apply(&mut self, mut object: Value) -> Change {
        let kind = object["kind"].as_str().unwrap_or_default();
        let Some(&(resource, _, _)) = SERVED.iter().find(|(_, served, _)| *served == kind) else {
            fail_test(&format!("kind {kind:?} is not served"));
        };
        let key = key(resource, &object);
        if key.2.is_empty() {
            fail_test("an object without metadata.name");
        }
        self.version += 1;
        object["metadata"]["resourceVersion"] = json!(self.version.to_string());
        let stored = Object { text: object.to_string(), value: object.clone() };
        let before = self.objects.insert(key, stored).map(|before| before.value);
        self.record(resource, before, Some(object))
    }

    pub(crate) fn delete(&mut self, kind: &str, namespace: &str, name: &str) -> Change {
        let resource = SERVED.iter().find(|(_, served, _)| *served == kind).map_or("", |served| served.0);
        let key = (resource, namespace.to_owned(), name.to_owned());
        let Some(mut before) = self.objects.remove(&key).map(|before| before.value) else {
            fail_test(&format!("there is no {kind} {namespace}/{name} to delete"));
        };
        self.version += 1;
        before["metadata"]["resourceVersion"] = json!(self.version.to_string());
        self.record(resource, Some(before), None)
    }

    fn record(&mut self, resource: &'static str, before: Option<Value>, after: Option<Value>) -> Change {
        let change = Change { version: self.version, resource, before, after };
        self.history.push(change.clone());
        change
    }

    /// The change of the same object before this one.
    pub(crate) fn before(&self, change: &Change) -> Option<Change> {
        let name = |change: &Change| {
            let object = change.after.as_ref().or(change.before.as_ref());
            object.map(|it| (it["metadata"]["namespace"].clone(), it["metadata"]["name"].clone()))
        };
        let is_earlier =
            |it: &&Change| it.version < change.version && it.resource == change.resource && name(it) == name(change);
        self.history.iter().rfind(is_earlier).cloned()
    }

    /// The state of so many changes ago, as far as the history has it.
    pub(crate) fn as_of(&self, changes: u64) -> Self {
        let version = self.version.saturating_sub(changes).max(self.compacted);
        let mut past = Self { version: self.compacted, compacted: self.compacted, ..Self::default() };
        for object in self.objects.values() {
            past.put(&object.value);
        }
        for change in self.history.iter().rev().filter(|change| change.version > version) {
            if let Some(object) = &change.after {
                past.objects.remove(&key(change.resource, object));
            }
            if let Some(object) = &change.before {
                past.put(object);
            }
        }
        past.version = version;
        past
    }

    fn put(&mut self, object: &Value) {
        let kind = object["kind"].as_str().unwrap_or_default();
        if let Some((resource, ..)) = SERVED.iter().find(|(_, served, _)| *served == kind) {
            let stored = Object { text: object.to_string(), value: object.clone() };
            self.objects.insert(key(resource, object), stored);
        }
    }

    pub(crate) fn compact(&mut self) {
        self.history.clear();
        self.compacted = self.version;
    }

    /// Passes the changes after `version` to `each`; `false` if the history no longer has them.
    pub(crate) fn since(&self, version: u64, each: impl FnMut(&Change)) -> bool {
        let known = version >= self.compacted;
        if known {
            self.history.iter().filter(|change| change.version > version).for_each(each);
        }
        known
    }

    /// The JSON of all matching objects.
    pub(crate) fn texts(&self, resource: &str, wanted: &Selector) -> impl Iterator<Item = &str> {
        let matching = self.objects.iter().filter(move |(key, it)| key.0 == resource && wanted.matches(&it.value));
        matching.map(|(_, object)| object.text.as_str())
    }

    /// Up to `limit` objects, going on after `token`; `None` if the token is too old.
    pub(crate) fn page(&self, resource: &str, wanted: &Selector, limit: usize, token: Option<&str>) -> Option<Page> {
        let after = match token.and_then(|token| token.split_once('~')) {
            Some((version, _)) if version.parse().is_ok_and(|version: u64| version < self.compacted) => return None,
            Some((_, after)) => Some(after),
            None => None,
        };
        let position = |key: &Key| format!("{}/{}", key.1, key.2);
        let mut matching = self
            .objects
            .iter()
            .filter(|(key, object)| key.0 == resource && wanted.matches(&object.value))
            .filter(|(key, _)| after.is_none_or(|after| position(key).as_str() > after))
            .peekable();
        let mut items = Vec::new();
        let mut last = String::new();
        while let Some((key, object)) = matching.next_if(|_| limit == 0 || items.len() < limit) {
            last = position(key);
            items.push(object.value.clone());
        }
        let next = matching.peek().map(|_| format!("{}~{last}", self.version));
        Some(Page { items, next })
    }
}

fn key(resource: &'static str, object: &Value) -> Key {
    let text = |key: &str| object["metadata"][key].as_str().unwrap_or_default().to_owned();
    (resource, text("namespace"), text("name"))
}

/// The plural name for a path's last part, with its kind and apiVersion.
pub(crate) fn served(resource: &str) -> Option<(&'static str, &'static str, &'static str)> {
    SERVED.iter().find(|served| served.0 == resource).copied()
}

/// Label and field selectors: `key`, `!key`, `key=value`, `key!=value`, with commas between.
#[derive(Clone, Debug, Default)]
pub(crate) struct Selector {
    pub(crate) labels: String,
    pub(crate) fields: String,
}

impl Selector {
    pub(crate) fn matches(&self, object: &Value) -> bool {
        let label = |key: &str| object["metadata"]["labels"][key].as_str();
        let field = |path: &str| path.split('.').fold(object, |value, part| &value[part]).as_str();
        self.labels.split(',').all(|term| term_matches(term, label))
            && self.fields.split(',').all(|term| term_matches(term, field))
    }
}

fn term_matches<'a>(term: &str, value: impl Fn(&str) -> Option<&'a str>) -> bool {
    if let Some((key, wanted)) = term.split_once("!=") {
        value(key) != Some(wanted)
    } else if let Some((key, wanted)) = term.split_once('=') {
        value(key) == Some(wanted.trim_start_matches('='))
    } else if let Some(key) = term.strip_prefix('!') {
        value(key).is_none()
    } else {
        term.is_empty() || value(term).is_some()
    }
}
