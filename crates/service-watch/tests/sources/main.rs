//! Both sources against what they read from: a directory, and a test API server.
#![cfg(test)]

mod api_server;
mod common;
mod connect;
mod doubt;
mod events;
mod manifests;
mod misbehaviour;
