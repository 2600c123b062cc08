//! Entry points for fuzz targets: manifests, and responses of an API server.

use std::path::Path;

use kube::api::{ObjectList, WatchEvent};

use crate::convert::{Converter, Object};
use crate::manifests::read::read_text;
use crate::wire;

/// Parses a file of manifests; returns the result in its debug format.
pub fn manifest_file(text: &str, is_json: bool) -> String {
    let path = Path::new(if is_json { "fuzz.json" } else { "fuzz.yaml" });
    format!("{:?}", read_text(text, path, &mut Converter::for_manifests("node".into())))
}

/// Decodes and converts an object, a list, or a watch event, of each kind.
pub fn api_response(json: &[u8]) {
    convert_all::<wire::Service>(json);
    convert_all::<wire::EndpointSlice>(json);
    convert_all::<wire::Node>(json);
}

fn convert_all<K: Object>(json: &[u8]) {
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
        if let Some(name) = Converter::object_name(object.meta()) {
            drop(format!("{:?}", object.convert(&name, &mut converter)));
        }
    }
}
