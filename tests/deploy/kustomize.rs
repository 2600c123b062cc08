//! As much of kustomize as deploy/ uses: resources, strategic merges, components. (A test compares with kubectl's, where there
//! is one.)

use std::fs;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::{Map, Value};

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct Kustomization {
    pub(crate) api_version: String,
    pub(crate) kind: String,
    #[serde(default)]
    pub(crate) resources: Vec<String>,
    #[serde(default)]
    pub(crate) components: Vec<String>,
    #[serde(default)]
    pub(crate) patches: Vec<Patch>,
    /// Our names and tags are put in the place of themselves.
    #[serde(default)]
    pub(crate) images: Vec<Value>,
    /// What all our objects have anyway.
    #[serde(default)]
    pub(crate) namespace: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Patch {
    pub(crate) path: Option<String>,
    pub(crate) patch: Option<String>,
}

/// The documents of a file.
pub(crate) fn documents(path: &Path) -> Vec<Value> {
    parse(&fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display())))
}

fn parse(text: &str) -> Vec<Value> {
    serde_saphyr::from_multiple(text).unwrap_or_else(|error| panic!("{error} in {text}"))
}

pub(crate) fn kustomization(dir: &Path) -> Kustomization {
    let mut documents = documents(&dir.join("kustomization.yaml"));
    assert_eq!(documents.len(), 1, "{}", dir.display());
    serde_json::from_value(documents.remove(0)).unwrap_or_else(|error| panic!("{}: {error}", dir.display()))
}

/// The objects that `kubectl kustomize` makes of a directory, and of components on top.
pub(crate) fn build(dir: &Path, components: &[PathBuf]) -> Vec<Value> {
    let own = kustomization(dir);
    let mut objects = Vec::new();
    for resource in &own.resources {
        let path = dir.join(resource);
        objects.extend(if path.is_dir() { build(&path, &[]) } else { documents(&path) });
    }
    for patch in own.patches_in(dir) {
        apply(&mut objects, patch);
    }
    let used = own.components.iter().map(|component| dir.join(component));
    for component in used.chain(components.iter().cloned()) {
        for patch in kustomization(&component).patches_in(&component) {
            apply(&mut objects, patch);
        }
    }
    objects
}

impl Kustomization {
    /// The patches, from files and in line.
    pub(crate) fn patches_in(&self, dir: &Path) -> Vec<Value> {
        let texts = self.patches.iter().map(|patch| match (&patch.path, &patch.patch) {
            (Some(path), None) => documents(&dir.join(path)),
            (None, Some(text)) => parse(text),
            _ => panic!("{}: a patch is either a file or a text", dir.display()),
        });
        texts.flatten().collect()
    }
}

/// The object of a kind and name.
pub(crate) fn find<'a>(objects: &'a [Value], kind: &str, name: &str) -> &'a Value {
    objects.iter().find(|object| identity(object) == (kind, name)).unwrap_or_else(|| panic!("no {kind} {name}"))
}

fn identity(object: &Value) -> (&str, &str) {
    (object["kind"].as_str().unwrap_or_default(), object["metadata"]["name"].as_str().unwrap_or_default())
}

fn apply(objects: &mut Vec<Value>, patch: Value) {
    let target = objects.iter().position(|object| identity(object) == identity(&patch));
    let target = target.unwrap_or_else(|| panic!("nothing to patch for {:?}", identity(&patch)));
    if patch["$patch"] == "delete" {
        objects.remove(target);
    } else {
        merge(&mut objects[target], patch, "");
    }
}

/// Merges strategically: what is named is merged by its name, as the API's types say.
pub(crate) fn merge(into: &mut Value, patch: Value, field: &str) {
    match (into, patch) {
        (Value::Object(into), Value::Object(patch)) => {
            for (name, value) in patch {
                match into.get_mut(&name) {
                    Some(_) if value.is_null() => drop(into.remove(&name)),
                    Some(old) => merge(old, value, &name),
                    None => drop(into.insert(name, without_directives(value))),
                }
            }
        }
        (Value::Array(into), Value::Array(patch)) if key(field).is_some() => {
            let key = key(field).unwrap_or_default();
            for item in patch {
                let old = into.iter().position(|old| old[key] == item[key]);
                match (old, item["$patch"] == "delete") {
                    (Some(old), true) => drop(into.remove(old)),
                    (None, true) => {}
                    (Some(old), false) => merge(&mut into[old], item, ""),
                    (None, false) => into.push(without_directives(item)),
                }
            }
        }
        (into, patch) => *into = patch,
    }
}

/// What the items of a list are known by.
fn key(field: &str) -> Option<&'static str> {
    match field {
        "containers" | "initContainers" | "env" | "volumes" => Some("name"),
        "volumeMounts" => Some("mountPath"),
        _ => None,
    }
}

/// New lists have nothing that could be deleted from them.
pub(crate) fn without_directives(value: Value) -> Value {
    match value {
        Value::Object(map) => {
            let fields = map.into_iter().filter(|(name, _)| name != "$patch");
            Value::Object(fields.map(|(name, value)| (name, without_directives(value))).collect::<Map<_, _>>())
        }
        Value::Array(items) => {
            let kept = items.into_iter().filter(|item| item["$patch"] != "delete");
            Value::Array(kept.map(without_directives).collect())
        }
        other => other,
    }
}
