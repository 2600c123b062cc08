//! Reads one file of manifests.

use std::fs::{self, Metadata};
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde_json::{Map, Value};
use tracing::debug;

use crate::convert::{Conversion, Converted, Converter, Object};
use crate::lenient::Truncated;
use crate::model::Change;
use crate::panics::{caught, point};
use crate::report::{Kind, Subject};
use crate::wire;

/// An object of a file.
#[derive(Debug)]
pub(crate) struct ManifestObject {
    pub(super) subject: Subject,
    pub(super) conversion: Conversion<Change>,
    pub(super) problems: Vec<String>,
}

/// The result of reading a file.
#[derive(Debug)]
pub(crate) enum FileContent {
    /// The file does not exist, or is not a regular file.
    Absent,
    /// It cannot be read or parsed, and why.
    Failed(String),
    /// Its objects in order, and the problems of documents that are not usable objects.
    Objects(Vec<ManifestObject>, Vec<String>),
}

/// File metadata that changes with the content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stamp {
    modified: (i64, i64),
    /// Also changes with permissions, and when an edit restores the modification time.
    changed: (i64, i64),
    size: u64,
    inode: u64,
    device: u64,
}

impl Stamp {
    /// The stamp of the file at a path; `None` unless it is a regular file.
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

/// Reads a file. The stamp is from before reading it; `None` if it could not be read, so that it is tried again.
pub(super) fn read_file(path: &Path, converter: &mut Converter) -> (FileContent, Option<Stamp>) {
    let stamp = match fs::metadata(path) {
        Ok(meta) if meta.is_file() => Stamp::new(&meta),
        Ok(_) => return (FileContent::Absent, None),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            let read = match fs::symlink_metadata(path) {
                Ok(_) => {
                    FileContent::Failed("is a link to a file that does not exist; correct or remove the link".into())
                }
                Err(_) => FileContent::Absent,
            };
            return (read, None);
        }
        Err(error) => return (FileContent::Failed(format!("cannot be read: {error}; check its permissions")), None),
    };
    match fs::read_to_string(path) {
        Ok(text) => {
            let content = caught(|| {
                point("parse", &path.display());
                read_text(&text, path, converter)
            });
            (content.unwrap_or_else(|panic| FileContent::Failed(format!("cannot be parsed: {panic}"))), Some(stamp))
        }
        Err(error) if error.kind() == ErrorKind::NotFound => (FileContent::Absent, None),
        Err(error) => {
            (FileContent::Failed(format!("cannot be read: {error}; check its permissions and encoding")), None)
        }
    }
}

pub(crate) fn read_text(text: &str, path: &Path, converter: &mut Converter) -> FileContent {
    let documents = match parse(text, path.extension().is_some_and(|extension| extension == "json")) {
        Ok(documents) => documents,
        Err(problem) => return FileContent::Failed(format!("does not parse: {problem}; correct the file")),
    };
    let mut reader = Reader { converter, objects: Vec::new(), problems: Vec::new() };
    for (index, document) in documents.into_iter().enumerate() {
        reader.object(document, &format!("document {}", index + 1), None);
    }
    FileContent::Objects(reader.objects, reader.problems)
}

fn parse(text: &str, json: bool) -> Result<Vec<Value>, String> {
    if json {
        let documents = serde_json::Deserializer::from_str(text).into_iter::<Value>();
        return documents.collect::<Result<_, _>>().map_err(|error| error.to_string());
    }
    // Who may write here controls this node, so there is no size limit. Messages have one line, so no snippets.
    // A port may be named `y` or `no`: only true and false are booleans, as in YAML 1.2.
    let options = serde_saphyr::options! { budget: None, with_snippet: false, strict_booleans: true };
    serde_saphyr::from_multiple_with_options(text, options).map_err(|error| error.to_string().replace('\n', " "))
}

struct Reader<'a> {
    converter: &'a mut Converter,
    objects: Vec<ManifestObject>,
    problems: Vec<String>,
}

impl Reader<'_> {
    /// Reads an object or a list. `item_of` is the kind of the items of a typed list.
    fn object(&mut self, value: Value, location: &str, item_of: Option<Kind>) {
        let mut object = match value {
            Value::Object(object) => object,
            Value::Null => return,
            _ => {
                self.problems
                    .push(format!("{location} is not an object: skipped; give it apiVersion, kind and metadata"));
                return;
            }
        };
        let text = |key: &str| object.get(key).and_then(Value::as_str).unwrap_or("");
        let (version, kind) = (text("apiVersion"), text("kind"));
        let kind = match (version, kind, item_of) {
            ("v1", "List", _) => return self.items(&mut object, location, None),
            ("v1", "ServiceList", _) => return self.items(&mut object, location, Some(Kind::Service)),
            ("v1", "NodeList", _) => return self.items(&mut object, location, Some(Kind::Node)),
            ("discovery.k8s.io/v1", "EndpointSliceList", _) => {
                return self.items(&mut object, location, Some(Kind::EndpointSlice));
            }
            ("v1", "Service", _) => Kind::Service,
            ("v1", "Node", _) => Kind::Node,
            ("discovery.k8s.io/v1", "EndpointSlice", _) => Kind::EndpointSlice,
            ("", "", Some(kind)) => kind,
            ("", _, _) | (_, "", _) => {
                self.problems.push(format!("{location} has no apiVersion or no kind: skipped; give it both"));
                return;
            }
            (version, kind, _) => {
                debug!("{location}: {} {}: skipped, since the kind is not read", Truncated(version), Truncated(kind));
                return;
            }
        };
        let read = match kind {
            Kind::Service => self.push::<wire::Service>(object),
            Kind::EndpointSlice => self.push::<wire::EndpointSlice>(object),
            Kind::Node => self.push::<wire::Node>(object),
        };
        if let Err(problem) = read {
            self.problems.push(format!("{location}: {problem}"));
        }
    }

    fn items(&mut self, list: &mut Map<String, Value>, location: &str, item_of: Option<Kind>) {
        match list.remove("items") {
            Some(Value::Array(items)) => {
                for (index, item) in items.into_iter().enumerate() {
                    self.object(item, &format!("{location}, items[{index}]"), item_of);
                }
            }
            None | Some(Value::Null) => {}
            Some(_) => self.problems.push(format!("{location}: items is not a list: skipped; correct it")),
        }
    }

    fn push<K: Object>(&mut self, object: Map<String, Value>) -> Result<(), String> {
        let object: K = serde_json::from_value(object.into()).map_err(|error| error.to_string())?;
        let Some(name) = Converter::object_name(object.meta()) else {
            return Err("has no usable metadata.name: skipped; give it one of letters, digits, - and .".into());
        };
        let Converted { conversion, problems } = object.convert(&name, self.converter);
        self.objects.push(ManifestObject { subject: Subject::object(K::KIND, name), conversion, problems });
        Ok(())
    }
}
