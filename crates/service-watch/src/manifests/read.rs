//! Reading one file of manifests.

use std::fs::{self, Metadata};
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde_json::{Map, Value};
use tracing::debug;

use crate::convert::{Converted, Converter, Object, Outcome};
use crate::lenient::Short;
use crate::model::Change;
use crate::report::{Kind, Subject};
use crate::wire;

/// An object in a file.
#[derive(Debug)]
pub(crate) struct Found {
    pub(super) subject: Subject,
    pub(super) outcome: Outcome<Change>,
    pub(super) problems: Vec<String>,
}

/// A file, read.
#[derive(Debug)]
pub(crate) enum FileRead {
    /// There is no such file (any more), or it is a directory or the like.
    Absent,
    /// It cannot be read or does not parse; why.
    Failed(String),
    /// Its objects in their order, and what in it is no usable object.
    Objects(Vec<Found>, Vec<String>),
}

/// What changes when a file's content does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stamp {
    modified: (i64, i64),
    /// Also tells of an edit that restores the time of modification, and of permissions.
    changed: (i64, i64),
    size: u64,
    inode: u64,
    device: u64,
}

impl Stamp {
    /// That of the file a path leads to; `None` if there is none, or only a directory or the like.
    pub(super) fn of(path: &Path) -> Option<Self> {
        fs::metadata(path).ok().filter(Metadata::is_file).map(|meta| Self::new(&meta))
    }

    fn new(meta: &Metadata) -> Self {
        Self {
            modified: (meta.mtime(), meta.mtime_nsec()),
            changed: (meta.ctime(), meta.ctime_nsec()),
            size: meta.size(),
            inode: meta.ino(),
            device: meta.dev(),
        }
    }
}

/// Reads a file. The stamp is that of before it was read; `None` if it could not be, for that may pass unseen.
pub(super) fn read_file(path: &Path, converter: &mut Converter) -> (FileRead, Option<Stamp>) {
    let stamp = match fs::metadata(path) {
        Ok(meta) if meta.is_file() => Stamp::new(&meta),
        Ok(_) => return (FileRead::Absent, None),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            let read = match fs::symlink_metadata(path) {
                Ok(_) => FileRead::Failed("is a link to a file that does not exist; mend or remove the link".into()),
                Err(_) => FileRead::Absent,
            };
            return (read, None);
        }
        Err(error) => return (FileRead::Failed(format!("cannot be read: {error}; check its permissions")), None),
    };
    match fs::read_to_string(path) {
        Ok(text) => (read_text(&text, path, converter), Some(stamp)),
        Err(error) if error.kind() == ErrorKind::NotFound => (FileRead::Absent, None),
        Err(error) => (FileRead::Failed(format!("cannot be read: {error}; check its permissions and encoding")), None),
    }
}

pub(crate) fn read_text(text: &str, path: &Path, converter: &mut Converter) -> FileRead {
    let documents = match parse(text, path.extension().is_some_and(|extension| extension == "json")) {
        Ok(documents) => documents,
        Err(problem) => return FileRead::Failed(format!("does not parse: {problem}; correct the file")),
    };
    let mut reader = Reader { converter, found: Vec::new(), problems: Vec::new() };
    for (index, document) in documents.into_iter().enumerate() {
        reader.object(document, &format!("document {}", index + 1), None);
    }
    FileRead::Objects(reader.found, reader.problems)
}

fn parse(text: &str, json: bool) -> Result<Vec<Value>, String> {
    if json {
        let documents = serde_json::Deserializer::from_str(text).into_iter::<Value>();
        return documents.collect::<Result<_, _>>().map_err(|error| error.to_string());
    }
    // Whoever may write here decides what this node does: no limit on size. A snippet of the file has no place in a
    // message of one line.
    // A port may be called `y` or `no`: only true and false are booleans, as in YAML 1.2.
    let options = serde_saphyr::options! { budget: None, with_snippet: false, strict_booleans: true };
    serde_saphyr::from_multiple_with_options(text, options).map_err(|error| error.to_string().replace('\n', " "))
}

struct Reader<'a> {
    converter: &'a mut Converter,
    found: Vec<Found>,
    problems: Vec<String>,
}

impl Reader<'_> {
    /// Takes in an object or a list of them. `item_of` is the kind that a typed list gives its items.
    fn object(&mut self, value: Value, place: &str, item_of: Option<Kind>) {
        let mut object = match value {
            Value::Object(object) => object,
            Value::Null => return,
            _ => {
                self.problems.push(format!("{place} is no object: skipped; give it apiVersion, kind and metadata"));
                return;
            }
        };
        let text = |key: &str| object.get(key).and_then(Value::as_str).unwrap_or("");
        let (version, kind) = (text("apiVersion"), text("kind"));
        let kind = match (version, kind, item_of) {
            ("v1", "List", _) => return self.items(&mut object, place, None),
            ("v1", "ServiceList", _) => return self.items(&mut object, place, Some(Kind::Service)),
            ("v1", "NodeList", _) => return self.items(&mut object, place, Some(Kind::Node)),
            ("discovery.k8s.io/v1", "EndpointSliceList", _) => {
                return self.items(&mut object, place, Some(Kind::EndpointSlice));
            }
            ("v1", "Service", _) => Kind::Service,
            ("v1", "Node", _) => Kind::Node,
            ("discovery.k8s.io/v1", "EndpointSlice", _) => Kind::EndpointSlice,
            ("", "", Some(kind)) => kind,
            ("", _, _) | (_, "", _) => {
                self.problems.push(format!("{place} has no apiVersion or no kind: skipped; give it both"));
                return;
            }
            (version, kind, _) => {
                debug!("{place}: {} {}: not of a kind that is read", Short(version), Short(kind));
                return;
            }
        };
        let read = match kind {
            Kind::Service => self.keep::<wire::Service>(object),
            Kind::EndpointSlice => self.keep::<wire::EndpointSlice>(object),
            Kind::Node => self.keep::<wire::Node>(object),
        };
        if let Err(problem) = read {
            self.problems.push(format!("{place}: {problem}"));
        }
    }

    fn items(&mut self, list: &mut Map<String, Value>, place: &str, item_of: Option<Kind>) {
        match list.remove("items") {
            Some(Value::Array(items)) => {
                for (index, item) in items.into_iter().enumerate() {
                    self.object(item, &format!("{place}, items[{index}]"), item_of);
                }
            }
            None | Some(Value::Null) => {}
            Some(_) => self.problems.push(format!("{place}: items is no list: skipped; correct it")),
        }
    }

    fn keep<K: Object>(&mut self, object: Map<String, Value>) -> Result<(), String> {
        let object: K = serde_json::from_value(object.into()).map_err(|error| error.to_string())?;
        let Some(name) = Converter::name(object.meta()) else {
            return Err("has no usable metadata.name: skipped; give it one of letters, digits, - and .".into());
        };
        let Converted { outcome, problems } = object.convert(&name, self.converter);
        self.found.push(Found { subject: Subject::object(K::KIND, name), outcome, problems });
        Ok(())
    }
}
