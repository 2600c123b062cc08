//! What a fuzz target sees of the inside: manifests, and what an API server sends.

use std::path::Path;

use kube::api::{ObjectList, WatchEvent};

use crate::convert::{Converter, Object};
use crate::manifests::read::read_text;
use crate::wire;

/// Reads a file of manifests, and says what was understood of it.
pub fn manifest(text: &str, is_json: bool) -> String {
    let path = Path::new(if is_json { "fuzz.json" } else { "fuzz.yaml" });
    format!("{:?}", read_text(text, path, &mut Converter::by_hand("node".into())))
}

/// Reads an object, a list, or an event of a watch, of each kind.
pub fn answer(json: &[u8]) {
    read::<wire::Service>(json);
    read::<wire::EndpointSlice>(json);
    read::<wire::Node>(json);
}

fn read<K: Object>(json: &[u8]) {
    let mut converter = Converter::new("node".into());
    let mut objects: Vec<K> = serde_json::from_slice(json).into_iter().collect();
    if let Ok(WatchEvent::Added(object) | WatchEvent::Modified(object) | WatchEvent::Deleted(object)) =
        serde_json::from_slice(json)
    {
        objects.push(object);
    }
    if let Ok(ObjectList::<K> { items, .. }) = serde_json::from_slice(json) {
        objects.extend(items);
    }
    for object in objects {
        if let Some(name) = Converter::name(object.meta()) {
            drop(format!("{:?}", object.convert(&name, &mut converter)));
        }
    }
}
