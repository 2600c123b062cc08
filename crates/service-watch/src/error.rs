//! Errors that keep a source from starting.

use std::io;
use std::path::PathBuf;

/// Why a source could not start. Later errors are sent as a [`Report`](crate::Report) and retried.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The kubeconfig cannot be read or used.
    #[error("cannot use the kubeconfig {}: {problem}; check that the file exists, can be read by this user, and has a current-context whose cluster and user are in it", path.display())]
    Kubeconfig {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// No kubeconfig was given, and this is not a pod with a service account.
    #[error(
        "cannot find the API server from inside a pod: {problem}; give a kubeconfig, or run in a pod with a service account token"
    )]
    InCluster {
        /// What is missing.
        problem: String,
    },
    /// The address that overrides the server is not a URL.
    #[error("cannot use {url:?} as address of the API server: {problem}; give a URL such as https://192.0.2.1:6443")]
    Master {
        /// The given address.
        url: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The client could not be created, for example because of invalid certificates or keys.
    #[error(
        "cannot set up the connection to the API server {server}: {problem}; check the certificates, key and token that the kubeconfig names"
    )]
    Client {
        /// The server's address.
        server: String,
        /// What is wrong.
        problem: String,
    },
    /// The client stopped for good while it ran.
    #[error(
        "the client of the API server {server} has stopped: {problem}; start this program again, and please report it"
    )]
    ClientGone {
        /// The server's address.
        server: String,
        /// What is wrong.
        problem: String,
    },
    /// The directory of manifests cannot be read.
    #[error("cannot read the directory of manifests {}: {source}; check that it exists, is a directory, and can be read by this user", path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// The directory cannot be watched for changes.
    #[error("cannot watch the directory {} for changes: {source}; if the limit of watches is reached, raise the sysctls fs.inotify.max_user_instances and fs.inotify.max_user_watches", path.display())]
    Watch {
        /// The directory.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
}

/// An error with its causes, in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        let inner_text = inner.to_string();
        // Many errors repeat their cause in their own text.
        if !text.contains(&inner_text) {
            text.push_str(": ");
            text.push_str(&inner_text);
        }
        cause = inner.source();
    }
    text
}
