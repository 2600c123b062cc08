//! An API server for the agent as a process.

use std::path::PathBuf;

use serde_json::Value;
use tempfile::TempDir;
use test_apiserver::Server;

use super::{Agent, node, service, slice};

/// An API server on the loopback device of this thread's namespace, and a kubeconfig for it.
pub struct Cluster {
    pub server: Server,
    pub dir: TempDir,
    /// Whether its agents take a tenth of the usual time for that of a watch, and for an outage. They need fault points.
    pub is_impatient: bool,
}

impl Cluster {
    pub fn new() -> Self {
        let (server, dir) = (Server::new(), TempDir::new().unwrap());
        let address = server.listen_in_thread().unwrap();
        Server::write_kubeconfig(&dir.path().join("kubeconfig"), address);
        Self { server, dir, is_impatient: false }
    }

    /// One with the Service `web` of two endpoints.
    pub fn with_web() -> Self {
        let cluster = Self::new();
        cluster.apply(node()).apply(service("web", "10.96.0.10"));
        cluster.apply(slice("web-1", "web", &["10.0.0.1", "10.0.0.2"]));
        cluster
    }

    pub fn apply(&self, object: Value) -> &Self {
        self.server.apply(object);
        self
    }

    pub fn kubeconfig(&self) -> PathBuf {
        self.dir.path().join("kubeconfig")
    }

    pub fn agent(&self, flags: &[&str]) -> Agent {
        let kubeconfig = format!("--kubeconfig={}", self.kubeconfig().display());
        let mut command = Agent::command();
        command.args([&kubeconfig, "--ipvs-min-sync-period=0s"]).args(flags);
        if self.is_impatient {
            command.env("API_SERVER_PERIODS_DIVIDED_BY", "10");
        }
        Agent::start_command(&mut command)
    }
}
