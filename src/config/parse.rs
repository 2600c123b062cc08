//! Parses the text of a configuration file into a [`Configuration`], with warnings about unknown and duplicate fields.

use std::cell::RefCell;
use std::fmt;

use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

use super::FieldError;
use super::object::{API_VERSION, Configuration, KIND};

/// A parsed file.
#[derive(Debug, PartialEq)]
pub(crate) struct ParsedFile {
    pub(crate) configuration: Configuration,
    /// Unknown and duplicate fields. They have no effect, as in kube-proxy.
    pub(crate) warnings: Vec<String>,
    /// Fields whose value has the wrong type. They are left out of the object.
    pub(crate) errors: Vec<FieldError>,
}

/// The version that kube-proxy may have next (KEP-784), with other fields.
const NEXT_API_VERSION: &str = "kubeproxy.config.k8s.io/v1alpha2";
/// Up to here a float has every whole number: 2⁵³.
const MAX_EXACT: f64 = 9_007_199_254_740_992.0;
/// How many documents after the first are named.
const MAX_IGNORED_DOCUMENTS: usize = 10;

/// Parses YAML, and so JSON, which is a subset of it.
pub(super) fn parse(text: &str) -> Result<ParsedFile, Vec<FieldError>> {
    let options = serde_saphyr::options! {
        duplicate_keys: serde_saphyr::options::DuplicateKeyPolicy::LastWins,
        with_snippet: false,
    };
    let mut bytes = text.as_bytes();
    let mut documents = serde_saphyr::read_with_options::<_, Document>(&mut bytes, options);
    // As for kube-proxy, the first document counts, and what follows it need not even be YAML.
    let first = documents.next();
    let others: Vec<Result<Document, _>> = documents.take(MAX_IGNORED_DOCUMENTS).collect();
    let whole_file = |message: String| vec![FieldError::new("", message)];
    let (mut tree, mut warnings) = match first {
        Some(Ok(Document { value: Value::Object(tree), duplicates })) => (tree, duplicates),
        None | Some(Ok(_)) => {
            return Err(whole_file("this is not an object: it must begin with apiVersion and kind".to_owned()));
        }
        Some(Err(error)) => return Err(whole_file(format!("this is neither YAML nor JSON: {error}"))),
    };
    warnings.extend(others.iter().filter_map(ignored_document));
    // Checked before the fields: another kind has other fields.
    let is = |field: &str, wanted: &str| tree.get(field).and_then(Value::as_str) == Some(wanted);
    if is("apiVersion", NEXT_API_VERSION) {
        return Err(whole_file(format!(
            "this is of apiVersion {NEXT_API_VERSION}, which is not read: write {API_VERSION} with its fields, such as ipvs.syncPeriod \
             for syncPeriod, conntrack and oomScoreAdj for those of linux, bindAddress for nodeIPOverride, and healthzBindAddress and \
             metricsBindAddress with a port"
        )));
    }
    if !is("apiVersion", API_VERSION) || !is("kind", KIND) {
        return Err(whole_file(format!("this is not of apiVersion {API_VERSION} and kind {KIND}")));
    }

    let mut errors = Vec::new();
    loop {
        let mut unknown = Vec::new();
        let mut tracked = serde_path_to_error::Track::new();
        let deserializer = serde_path_to_error::Deserializer::new(Value::Object(tree.clone()), &mut tracked);
        match serde_ignored::deserialize(deserializer, |path| unknown.push(path.to_string())) {
            Ok(configuration) => {
                warnings.extend(unknown.into_iter().map(|path| format!("unknown field {path:?}")));
                return Ok(ParsedFile { configuration, warnings, errors });
            }
            Err(error) => {
                let path = tracked.path();
                errors.push(FieldError::new(path.to_string(), error.to_string()));
                // Without this field the rest is parsed again, to find errors in it too.
                if !remove(&mut tree, &path) {
                    return Err(errors);
                }
            }
        }
    }
}

/// A document of the file.
struct Document {
    value: Value,
    /// Warnings about duplicate fields.
    duplicates: Vec<String>,
}

impl<'de> Deserialize<'de> for Document {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let duplicates = RefCell::default();
        let value = ValueSeed { path: String::new(), duplicates: &duplicates }.deserialize(deserializer)?;
        Ok(Self { value, duplicates: duplicates.into_inner() })
    }
}

/// The warning about a document after the first; `None` if it is empty.
fn ignored_document<E>(document: &Result<Document, E>) -> Option<String> {
    let what = match document {
        Ok(Document { value: Value::Null, .. }) => return None,
        Ok(Document { value, .. }) => value.get("kind").and_then(Value::as_str).map(|kind| format!(" ({kind})")),
        Err(_) => None,
    };
    Some(format!("only the first document counts: another{} after `---` is ignored", what.unwrap_or_default()))
}

/// Removes the field at a path, and returns whether it was there. An element of a list goes with its list.
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

/// Parses one value of the file into a tree. Of duplicate fields the last counts, and a null is as a field that is not
/// there.
struct ValueSeed<'a> {
    path: String,
    duplicates: &'a RefCell<Vec<String>>,
}

impl<'de> DeserializeSeed<'de> for ValueSeed<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for ValueSeed<'_> {
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

    /// Helm writes large numbers as `1.048576e+06`.
    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        #[expect(clippy::cast_possible_truncation, reason = "it is whole, and within the range of exact numbers")]
        let whole = (value.fract() == 0.0 && value.abs() < MAX_EXACT).then_some(value as i64);
        Ok(whole.map_or_else(|| value.into(), Value::from))
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
        while let Some(value) = seq.next_element_seed(ValueSeed {
            path: format!("{}[{}]", self.path, list.len()),
            duplicates: self.duplicates,
        })? {
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
                self.duplicates
                    .borrow_mut()
                    .push(format!("field {path:?} is given more than once: the last one counts"));
            }
            let value =
                map.next_value_seed(ValueSeed { path, duplicates: self.duplicates }).map_err(A::Error::custom)?;
            object.remove(&key);
            if !value.is_null() {
                object.insert(key.clone(), value);
            }
            seen.push(key);
        }
        Ok(Value::Object(object))
    }
}
