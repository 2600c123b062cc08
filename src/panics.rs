//! Panics, of this program or of a library: each is logged and counted, and one that ends a thread or task which the agent
//! cannot be without makes the agent execute itself again, since its state in memory is not to be trusted any more. The
//! kernel keeps everything meanwhile, as at any restart.
//!
//! [`service_watch::panics`] catches what concerns a single object or request before it comes to that.

use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use service_watch::panics::{Panic, caught};
use tokio::runtime::Runtime;
use tokio::sync::mpsc;
use tracing::error;

static COUNT: AtomicU64 = AtomicU64::new(0);

/// How many panics there were.
pub(crate) fn count() -> u64 {
    COUNT.load(Ordering::Relaxed)
}

/// Has each panic logged and counted.
pub(crate) fn install_hook() {
    std::panic::set_hook(Box::new(|info| {
        COUNT.fetch_add(1, Ordering::Relaxed);
        let panic = Panic::from_payload(info.payload());
        let thread = thread::current();
        let location = info.location().map(tracing::field::display);
        error!(thread = thread.name(), location, "{panic}");
    }));
}

/// Tells of the end of threads and tasks that should not end.
#[derive(Clone, Debug)]
pub(crate) struct Supervisor(mpsc::UnboundedSender<&'static str>);

impl Supervisor {
    /// The receiver gets the names of what has ended by a panic.
    pub(crate) fn new() -> (Self, mpsc::UnboundedReceiver<&'static str>) {
        let (sender, receiver) = mpsc::unbounded_channel();
        (Self(sender), receiver)
    }

    /// Runs a task, with a name for messages: "the task of the ports".
    pub(crate) fn spawn(&self, runtime: &Runtime, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        let (task, ended) = (runtime.spawn(task), self.0.clone());
        runtime.spawn(async move {
            if task.await.is_err_and(|error| error.is_panic()) {
                // Fails if the agent is already exiting.
                let _ = ended.send(name);
            }
        });
    }

    /// Runs the function of a thread to its end.
    pub(crate) fn run(&self, name: &'static str, function: impl FnOnce()) {
        if caught(function).is_err() {
            let _ = self.0.send(name);
        }
    }
}
