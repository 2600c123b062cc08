//! What is in deploy/: that it says what it is meant to say, and that the agent runs under it as a pod, with the rights that the
//! manifests give it and no others.

#![expect(clippy::panic, clippy::unwrap_used, reason = "a test that cannot go on fails")]

#[path = "../common/mod.rs"]
mod common;
#[path = "../../crates/takeover/tests/kube_proxy/mod.rs"]
mod kube_proxy;
mod kustomize;
mod pod;

mod contained;
mod flags;
mod monitoring;
mod strict;

use std::path::PathBuf;

/// The directory.
fn deploy() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("deploy")
}

/// What kubeadm makes for kube-proxy in mode ipvs, field by field.
fn kubeadm() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/deploy/kubeadm")
}
