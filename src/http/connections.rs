//! Accepts connections, and sees to it that clients which connect often, say nothing or read nothing keep no other from being
//! answered.
//!
//! * When as many connections are open as may be, none is accepted: the others wait in the kernel's queue. A connection that has
//!   made no progress for a second then makes room. So whoever sends a request is answered, unless more clients connect each
//!   second than connections may be open.
//! * A connection counts until its socket is closed, so that there are never more descriptors than this.
//! * A port needs room only when a client waits: there may be more ports than connections.
//! * The rate of accepting is bounded, since it takes processor time beside the reconciler's.
//! * What a connection needs in memory is small until its client has sent something.

use std::collections::VecDeque;
use std::io;
use std::net::TcpListener;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use rustix::process::{Resource, getrlimit};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tracing::debug;

use super::{Handler, respond};

/// How long a connection may last, from accepting it to the end of the response.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a connection without progress is safe when there is no room.
const IDLE_TIMEOUT: Duration = Duration::from_secs(1);
/// So many connections are accepted in each interval, of all ports with one limit.
const ACCEPTS: usize = 50;
const ACCEPT_INTERVAL: Duration = Duration::from_millis(10);
/// How long to wait after an error, such as too many open files in the whole system.
const ERROR_DELAY: Duration = Duration::from_millis(100);

/// Limits the connections of one or several ports.
#[derive(Clone)]
pub(crate) struct ConnectionLimit {
    free: Arc<Semaphore>,
    open: Arc<Mutex<Open>>,
    max: usize,
}

#[derive(Default)]
struct Open {
    /// How many connections were accepted in the interval that ends then.
    accepted: (Option<Instant>, usize),
    /// Those from which no request was known when they were last looked at, in the order of accepting.
    silent: VecDeque<Connection>,
    /// Those of `silent` that turned out to have a request, in the order of that.
    answered: VecDeque<Connection>,
}

struct Connection {
    task: AbortHandle,
    /// When it was accepted, or found to have a request.
    since: Instant,
    has_request: Arc<AtomicBool>,
}

impl ConnectionLimit {
    /// Allows `max` connections at a time, and at most a quarter of the files that the process may open.
    pub(crate) fn new(max: usize) -> Self {
        let files =
            getrlimit(Resource::Nofile).current.map_or(usize::MAX, |files| files.try_into().unwrap_or(usize::MAX));
        let max = max.min(files / 4).max(1);
        Self { free: Arc::new(Semaphore::new(max)), open: Arc::default(), max }
    }

    /// Waits until there is room for one more connection, if need be by ending one without progress.
    async fn room(&self) -> OwnedSemaphorePermit {
        loop {
            if let Ok(permit) = self.free.clone().try_acquire_owned() {
                return permit;
            }
            let next = self.lock().end_idle(Instant::now());
            // The permit of a connection that was ended comes back when its task is dropped.
            if let Ok(Ok(permit)) = timeout(next, self.free.clone().acquire_owned()).await {
                return permit;
            }
        }
    }

    /// Waits until one more connection may be accepted.
    async fn pace(&self) {
        loop {
            let now = Instant::now();
            let wait = {
                let (end, accepted) = &mut self.lock().accepted;
                match *end {
                    Some(end) if now < end && *accepted >= ACCEPTS => Some(end),
                    Some(end) if now < end => None,
                    _ => {
                        (*end, *accepted) = (Some(now + ACCEPT_INTERVAL), 0);
                        None
                    }
                }
            };
            match wait {
                Some(end) => sleep_until(end).await,
                None => return,
            }
        }
    }

    fn add(&self, task: AbortHandle, has_request: Arc<AtomicBool>) {
        let mut open = self.lock();
        open.accepted.1 += 1;
        if open.silent.len() > 2 * self.max {
            open.silent.retain(|connection| !connection.task.is_finished());
        }
        open.silent.push_back(Connection { task, since: Instant::now(), has_request });
    }

    fn lock(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Open {
    /// Ends a connection that has made no progress for a while. Returns how long to wait before the next attempt.
    fn end_idle(&mut self, now: Instant) -> Duration {
        let mut next = ACCEPT_INTERVAL;
        while let Some(mut oldest) = self.silent.pop_front() {
            if oldest.task.is_finished() {
                continue;
            }
            let idle_at = oldest.since + IDLE_TIMEOUT;
            if now < idle_at {
                next = next.max(idle_at - now);
                self.silent.push_front(oldest);
                break;
            }
            if oldest.has_request.load(Ordering::Relaxed) {
                oldest.since = now;
                self.answered.push_back(oldest);
                continue;
            }
            oldest.task.abort();
            return ACCEPT_INTERVAL;
        }
        while self.answered.front().is_some_and(|oldest| oldest.task.is_finished()) {
            self.answered.pop_front();
        }
        match self.answered.front() {
            Some(oldest) if now >= oldest.since + IDLE_TIMEOUT => {
                oldest.task.abort();
                self.answered.pop_front();
                ACCEPT_INTERVAL
            }
            Some(oldest) => next.min(oldest.since + IDLE_TIMEOUT - now).max(ACCEPT_INTERVAL),
            None => next,
        }
    }
}

/// Serves until the task is dropped. Returns only an error.
pub(crate) async fn serve(listener: TcpListener, connections: ConnectionLimit, handler: Handler) -> io::Error {
    #[expect(deprecated, reason = "sound for a TcpListener, whose descriptor never changes; its successor is unsafe")]
    let listener = AsyncFd::with_interest(listener, Interest::READABLE);
    let listener = match listener {
        Ok(listener) => listener,
        Err(error) => return error,
    };
    // Connections are closed together with the port.
    let mut tasks = JoinSet::new();
    loop {
        let mut ready = match listener.readable().await {
            Ok(ready) => ready,
            Err(error) => return error,
        };
        let permit = connections.room().await;
        connections.pace().await;
        let stream = match ready.try_io(|listener| listener.get_ref().accept()) {
            Ok(accepted) => accepted.and_then(|(stream, _)| {
                stream.set_nonblocking(true)?;
                TcpStream::from_std(stream)
            }),
            // The client is gone.
            Err(_) => continue,
        };
        let stream = match stream {
            Ok(stream) => stream,
            Err(error) => {
                // Too many open files, or a client that closed the connection: neither is permanent.
                debug!("cannot accept a connection: {error}");
                sleep(ERROR_DELAY).await;
                continue;
            }
        };
        while tasks.try_join_next().is_some() {}
        let (handler, has_request) = (handler.clone(), Arc::new(AtomicBool::new(false)));
        let progress = has_request.clone();
        let task = async move {
            if timeout(CONNECTION_TIMEOUT, connection(stream, &handler, &progress)).await.is_err() {
                debug!("a connection took too long");
            }
            drop(permit);
        };
        connections.add(tasks.spawn(task), has_request);
    }
}

async fn connection(stream: TcpStream, handler: &Handler, has_request: &AtomicBool) {
    if stream.readable().await.is_err() {
        return;
    }
    let service = service_fn(|request| {
        has_request.store(true, Ordering::Relaxed);
        respond(request, handler)
    });
    // One request for each connection: clients are few, and idle connections would use up the limit. On the heap, since most of a
    // flood never comes to this.
    let connection = Box::pin(http1::Builder::new().keep_alive(false).serve_connection(TokioIo::new(stream), service));
    if let Err(error) = connection.await {
        debug!("a connection ended: {error}");
    }
}

#[cfg(test)]
mod tests {
    use tokio::runtime::Runtime;

    use super::*;

    /// Connections that were accepted so many milliseconds ago, and whether they have a request.
    fn open(runtime: &Runtime, now: Instant, ages: &[(u64, bool)]) -> (Open, Vec<AbortHandle>) {
        let mut open = Open::default();
        for (age, has_request) in ages {
            let task = runtime.spawn(std::future::pending::<()>()).abort_handle();
            let (since, has_request) = (now - Duration::from_millis(*age), Arc::new(AtomicBool::new(*has_request)));
            open.silent.push_back(Connection { task, since, has_request });
        }
        let tasks = open.silent.iter().map(|connection| connection.task.clone()).collect();
        (open, tasks)
    }

    /// Which of them are ended by so many attempts.
    fn ended(ages: &[(u64, bool)], attempts: usize) -> Vec<usize> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let now = Instant::now();
        let (mut open, tasks) = open(&runtime, now, ages);
        for _ in 0..attempts {
            open.end_idle(now);
        }
        // An aborted task is finished once its runtime has dropped it.
        let is_ended = |task: &AbortHandle| {
            (0..100).any(|_| {
                std::thread::sleep(Duration::from_millis(1));
                task.is_finished()
            })
        };
        (0..tasks.len()).filter(|index| is_ended(&tasks[*index])).collect()
    }

    #[test]
    fn only_connections_idle_for_a_second_make_room_the_oldest_first() {
        assert_eq!(ended(&[(999, false), (0, false)], 9), [0; 0]);
        assert_eq!(ended(&[(1200, false), (1100, false), (900, false)], 1), [0]);
        assert_eq!(ended(&[(1200, false), (1100, false), (900, false)], 9), [0, 1]);
        // A request that is being answered is given another second.
        assert_eq!(ended(&[(1200, true), (1100, false)], 9), [1]);
    }
}
