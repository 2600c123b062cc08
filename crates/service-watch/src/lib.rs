//! Services, EndpointSlices and Nodes as compact [`Change`]s, from an API server or a directory of manifests.
//!
//! The vocabulary ([`Change`] and what it holds) is plain values and always there. The sources are behind the feature
//! `sources` (on by default):
//!
//! - [`ApiServer`] watches a Kubernetes API server and survives whatever it does; it also posts [`Events`];
//! - [`Manifests`] reads the YAML and JSON files of a directory and follows their changes.
//!
//! Both say the same things to whoever listens, as [`Message`]s: changes, one [`Change::Synced`] once all that existed
//! at the start was said, and [`Report`]s about what could not be used. What they cannot understand they skip, as small
//! a part as possible, and keep what was good before; an error is never taken for an empty cluster.
//!
//! ```text
//!  API server ─ watcher ─┐
//!                        ├─ wire (slim, total) ─ convert (checked) ─ Outlet (told once) ─▶ Message
//!  directory ─ inotify ──┘
//! ```

#![forbid(unsafe_code)]

mod model;
mod reserved;

#[cfg(feature = "sources")]
mod address;
#[cfg(feature = "sources")]
mod api_server;
#[cfg(feature = "sources")]
mod convert;
#[cfg(feature = "sources")]
mod error;
#[cfg(all(fuzzing, feature = "sources"))]
pub mod fuzzing;
#[cfg(feature = "sources")]
mod lenient;
#[cfg(feature = "sources")]
mod manifests;
#[cfg(feature = "sources")]
mod report;
#[cfg(feature = "sources")]
mod wire;

pub use model::{
    Change, Endpoint, EndpointSlice, Hints, Node, ObjectName, Protocol, Service, ServiceKind, ServicePort, SlicePort,
    TrafficPolicy,
};
pub use reserved::RESERVED;

#[cfg(feature = "sources")]
pub use self::{
    address::{parse_ip, parse_range},
    api_server::{ApiServer, Connection, Event, EventKind, EventSubject, Events, Serving},
    error::Error,
    manifests::Manifests,
    report::{Counters, Kind, Message, Report, Subject},
};

/// Where Services come from.
#[cfg(feature = "sources")]
#[derive(Debug)]
pub enum Source {
    /// A Kubernetes API server.
    ApiServer(ApiServer),
    /// A directory of manifests.
    Manifests(Manifests),
}

#[cfg(feature = "sources")]
impl Source {
    /// Tells `sink` all there is and then every change, until `sink` breaks off: that is `Ok`. An error is one that
    /// no waiting mends; everything else is told as a [`Report`] and tried again.
    ///
    /// Runs on a tokio runtime with timers and I/O; one thread is enough. `sink` must not block.
    pub async fn run(self, sink: impl FnMut(Message) -> std::ops::ControlFlow<()>) -> Result<(), Error> {
        match self {
            Self::ApiServer(source) => source.run(sink).await,
            Self::Manifests(source) => source.run(sink).await,
        }
    }

    /// What has been counted so far; stays readable while the source runs.
    pub fn counters(&self) -> std::sync::Arc<Counters> {
        match self {
            Self::ApiServer(source) => source.counters(),
            Self::Manifests(source) => source.counters(),
        }
    }
}
