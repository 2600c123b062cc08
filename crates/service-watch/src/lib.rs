//! Watches Services, EndpointSlices and Nodes on an API server or in a directory of manifests, as compact [`Change`]s.
//!
//! The data model ([`Change`] and its parts) is plain values and always compiled. The sources are behind the feature
//! `sources` (on by default):
//!
//! - [`ApiServer`] lists and watches with a Kubernetes API server, and recovers from its failures; its
//!   [`EventRecorder`] posts Kubernetes Events;
//! - [`Manifests`] reads the YAML and JSON files of a directory and watches them for changes.
//!
//! Both send [`Message`]s to a sink: changes, one [`Change::Synced`] after the initial list, and [`Report`]s about
//! invalid objects and failures. They skip as small a part of an object as possible, and keep the last valid version of
//! an object that is invalid as a whole. An error is never treated as an empty cluster.
//!
//! ```text
//!  API server ─ Reflector ─────┐
//!                              ├─ wire (lenient decoding) ─ convert (validation) ─ Emitter (deduplication) ─▶ Message
//!  directory ─ DirectoryWatch ─┘
//! ```

#![forbid(unsafe_code)]

mod model;
pub mod panics;
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
    api_server::{ApiServer, Connection, Event, EventObject, EventRecorder, EventType, ExistingState},
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
    /// Sends all existing objects to `sink` and then every change, until `sink` breaks: that is `Ok`. Only an error
    /// that no retry can fix is returned; any other is sent as a [`Report`] and retried.
    ///
    /// Runs on a tokio runtime with timers and I/O; one thread is enough. `sink` must not block.
    pub async fn run(self, sink: impl FnMut(Message) -> std::ops::ControlFlow<()>) -> Result<(), Error> {
        match self {
            Self::ApiServer(source) => source.run(sink).await,
            Self::Manifests(source) => source.run(sink).await,
        }
    }

    /// The counters of this source; they stay readable while it runs.
    pub fn counters(&self) -> std::sync::Arc<Counters> {
        match self {
            Self::ApiServer(source) => source.counters(),
            Self::Manifests(source) => source.counters(),
        }
    }
}
