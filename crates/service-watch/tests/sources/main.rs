//! Both sources: the API server source against a test server, the manifest source on a directory.
#![cfg(test)]

mod api_server;
mod common;
mod connect;
mod events;
mod kubeconfigs;
mod manifests;
mod mass_deletion;
mod misbehaviour;
