//! From the text of a file to the object, and what to say of it: fields nobody knows, fields that are there twice.

use std::cell::RefCell;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

use super::Problem;
use super::object::{API_VERSION, Configuration, KIND};

/// An object as it was read.
#[derive(Debug, PartialEq)]
pub(crate) struct Read {
    pub(crate) configuration: Configuration,
    /// What stands in the file and has no effect: kube-proxy too goes on without it.
    pub(crate) warnings: Vec<String>,
    /// Fields whose values are of another kind than they should be. They are left out of the object.
    pub(crate) problems: Vec<Problem>,
}

/// Reads YAML, of which JSON is a part.
pub(crate) fn read(text: &str) -> Result<Read, Vec<Problem>> {
    let duplicates = RefCell::new(Vec::new());
    let options = serde_saphyr::options! {
        duplicate_keys: serde_saphyr::options::DuplicateKeyPolicy::LastWins,
        with_snippet: false,
    };
    let root = Node { path: String::new(), duplicates: &duplicates };
    let tree = serde_saphyr::with_deserializer_from_str_with_options(text, options, |deserializer| {
        root.deserialize(deserializer)
    });
    let whole = |what: String| vec![Problem::new("", what)];
    let mut tree = match tree {
        Ok(Value::Object(tree)) => tree,
        Ok(_) => return Err(whole("this is no object: it must begin with apiVersion and kind".to_owned())),
        Err(error) => return Err(whole(format!("this is neither YAML nor JSON: {error}"))),
    };
    // Said apart, before anything else: what is another kind has other fields.
    let is = |field: &str, wanted: &str| tree.get(field).and_then(Value::as_str) == Some(wanted);
    if !is("apiVersion", API_VERSION) || !is("kind", KIND) {
        return Err(whole(format!("this is not of apiVersion {API_VERSION} and kind {KIND}")));
    }

    let mut warnings: Vec<String> = duplicates.into_inner();
    let mut problems = Vec::new();
    loop {
        let mut unknown = Vec::new();
        let mut tracked = serde_path_to_error::Track::new();
        let deserializer = serde_path_to_error::Deserializer::new(Value::Object(tree.clone()), &mut tracked);
        match serde_ignored::deserialize(deserializer, |path| unknown.push(path.to_string())) {
            Ok(configuration) => {
                warnings.extend(unknown.into_iter().map(|path| format!("unknown field {path:?}")));
                return Ok(Read { configuration, warnings, problems });
            }
            Err(error) => {
                let path = tracked.path();
                problems.push(Problem::new(path.to_string(), error.to_string()));
                // What is right beside it may be wrong too.
                if !remove(&mut tree, &path) {
                    return Err(problems);
                }
            }
        }
    }
}

/// Takes out the field at a path; an element of a list goes with its list. Whether there was one.
fn remove(tree: &mut Map<String, Value>, path: &serde_path_to_error::Path) -> bool {
    use serde_path_to_error::Segment;
    let keys: Vec<&str> = path
        .iter()
        .map_while(|segment| match segment {
            Segment::Map { key } => Some(key.as_str()),
            _ => None,
        })
        .collect();
    let Some((last, parents)) = keys.split_last() else { return false };
    let parent = parents.iter().try_fold(tree, |at, key| at.get_mut(*key)?.as_object_mut());
    parent.and_then(|parent| parent.remove(*last)).is_some()
}

/// A place in the file. Of fields that are there twice the last counts, and nulls are as if they were not there.
struct Node<'a> {
    path: String,
    duplicates: &'a RefCell<Vec<String>>,
}

impl<'de> DeserializeSeed<'de> for Node<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Node<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_none<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        self.deserialize(deserializer)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(value) =
            seq.next_element_seed(Node { path: format!("{}[{}]", self.path, list.len()), duplicates: self.duplicates })?
        {
            list.push(value);
        }
        Ok(Value::Array(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut object = Map::new();
        let mut seen = Vec::new();
        while let Some(key) = map.next_key::<String>()? {
            let path = if self.path.is_empty() { key.clone() } else { format!("{}.{key}", self.path) };
            if seen.contains(&key) {
                self.duplicates.borrow_mut().push(format!("field {path:?} is there more than once: the last counts"));
            }
            let value = map.next_value_seed(Node { path, duplicates: self.duplicates }).map_err(A::Error::custom)?;
            object.remove(&key);
            if !value.is_null() {
                object.insert(key.clone(), value);
            }
            seen.push(key);
        }
        Ok(Value::Object(object))
    }
}
