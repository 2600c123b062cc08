//! Whoever writes hostile objects to the API server: one Service after the other, some of them made anew, some that flip.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::thread;
use std::time::Duration;

use fastrand::Rng;
use lab::objects;
use serde_json::{Value, json};
use test_apiserver::Server;

use super::AttackOptions;
use super::objects::{Kind, Slot, Weight, flipping};
use super::record::Recorder;
use crate::bench::load::NODE;
use crate::workload::record::lock;

/// Hostile Services that there are at once.
const LIGHT: u16 = 24;
/// The same of those that are large.
const HEAVY: u16 = 2;
/// How long a Service flips, each 100 ms.
const FLIPS: u32 = 30;
const FLIP_INTERVAL: Duration = Duration::from_millis(100);

/// Kind, namespace and name.
type Name = (String, String, String);

/// The hostile objects that there are.
#[derive(Debug)]
pub(crate) struct Objects<'a> {
    server: &'a Server,
    slots: Mutex<BTreeMap<u16, Vec<Name>>>,
}

impl<'a> Objects<'a> {
    pub(crate) fn new(server: &'a Server) -> Self {
        Self { server, slots: Mutex::default() }
    }

    /// Puts these objects in the place of those that were in a slot.
    fn replace(&self, slot: Slot, new: Vec<Value>, remakes: bool) {
        let names: Vec<Name> = new.iter().map(name).collect();
        let old = lock(&self.slots).insert(slot.0, names.clone()).unwrap_or_default();
        // Deleted and made again at once, or changed.
        for (kind, namespace, name) in old.iter().filter(|it| remakes || !names.contains(it)) {
            self.server.delete(kind, namespace, name);
        }
        for object in new {
            self.server.apply(object);
        }
        // The history is of no use to an agent that keeps its watches, and large.
        self.server.compact();
    }

    /// Deletes them all.
    pub(crate) fn clear(&self) {
        for (kind, namespace, name) in std::mem::take(&mut *lock(&self.slots)).into_values().flatten() {
            self.server.delete(&kind, &namespace, &name);
        }
    }
}

fn name(object: &Value) -> Name {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    (text(&object["kind"]), text(&object["metadata"]["namespace"]), text(&object["metadata"]["name"]))
}

/// Writes one hostile Service after the other until it is over: either the small ones or the large ones.
pub(crate) fn write_objects(
    weight: Weight,
    objects: &Objects<'_>,
    options: &AttackOptions,
    recorder: &Recorder,
    is_over: impl Fn() -> bool,
) {
    let (seed, slots, pauses) = match weight {
        Weight::Light => (options.seed, 0..LIGHT, 50..400),
        Weight::Heavy => (options.seed.wrapping_add(5), LIGHT..LIGHT + HEAVY, 4000..10_000),
    };
    let mut rng = Rng::with_seed(seed);
    let kinds: Vec<Kind> =
        Kind::all().into_iter().filter(|it| it.weight() == weight && options.wants(&it.name())).collect();
    while !is_over() && !kinds.is_empty() {
        thread::sleep(Duration::from_millis(rng.u64(pauses.clone())));
        let kind = &kinds[rng.usize(..kinds.len())];
        let slot = Slot(rng.u16(slots.clone()));
        let new = kind.objects(slot, &mut rng);
        recorder.attacked(&kind.name());
        objects.replace(slot, new, rng.bool());
    }
}

/// Changes a Service as a whole each 100 ms, deletes it, and goes on with another, until it is over.
pub(crate) fn flip_services(
    objects: &Objects<'_>,
    options: &AttackOptions,
    recorder: &Recorder,
    is_over: impl Fn() -> bool,
) {
    let kind = "a Service that flips each 100 ms";
    let mut rng = Rng::with_seed(options.seed.wrapping_add(1));
    while options.wants(kind) && !is_over() {
        recorder.attacked(kind);
        let slot = Slot(LIGHT + HEAVY + rng.u16(..2));
        for _ in 0..FLIPS {
            if !is_over() {
                objects.replace(slot, flipping(slot, &mut rng), rng.u8(..4) == 0);
                thread::sleep(FLIP_INTERVAL);
            }
        }
        objects.replace(slot, Vec::new(), false);
        thread::sleep(Duration::from_millis(rng.u64(500..5000)));
    }
}

/// The own Node, and the other one. The client outside the cluster has the other's address.
pub(crate) fn nodes() -> [Value; 2] {
    let pods = json!({"spec": {"podCIDR": "10.244.0.0/16", "podCIDRs": ["10.244.0.0/16"]}});
    [objects::with(objects::node(NODE, &["192.168.1.1"]), pods), objects::node("node-0002", &["192.168.1.2"])]
}

/// Nodes come and go, and the own Node is gone for a moment, as when somebody deletes it and kubelet registers again.
pub(crate) fn change_nodes(server: &Server, options: &AttackOptions, recorder: &Recorder, is_over: impl Fn() -> bool) {
    let mut rng = Rng::with_seed(options.seed.wrapping_add(2));
    let (deleted, others) = ("the own Node is deleted for a moment", "Nodes made and deleted");
    while !is_over() {
        thread::sleep(Duration::from_millis(rng.u64(1000..6000)));
        if rng.u8(..3) == 0 && options.wants(deleted) {
            recorder.attacked(deleted);
            server.delete("Node", "", NODE);
            thread::sleep(Duration::from_millis(rng.u64(..4000)));
            let [own, _] = nodes();
            server.apply(own);
        } else if options.wants(others) {
            recorder.attacked(others);
            let names: Vec<String> = (0..rng.usize(1..50)).map(|it| format!("made-{it}")).collect();
            for (name, number) in names.iter().zip(1_u16..) {
                let addresses: Vec<String> = (0..10).map(|it| format!("192.168.{}.{number}", 2 + it)).collect();
                server.apply(objects::node(name, &addresses.iter().map(String::as_str).collect::<Vec<_>>()));
            }
            for name in names {
                server.delete("Node", "", &name);
            }
        }
    }
}
