//! The queue between whoever logs and standard error, which a thread of its own writes: a pipe that nobody reads blocks that
//! thread alone. What finds the queue full is dropped and counted.
//!
//! `tracing-appender` has such a queue, but it is bounded by the number of lines, not by their length, counts what is dropped
//! only for who holds it, and brings files that are rotated along.

use std::io::{self, Write};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

/// How much may wait to be written, in bytes. As much again may be with the thread.
const CAPACITY: usize = 256 * 1024;

/// Lines that are to be written.
#[derive(Debug, Default)]
pub(super) struct LogQueue {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    waiting: Vec<u8>,
    /// How many lines those are.
    waiting_lines: u64,
    /// Whether the thread is writing what it took before.
    is_writing: bool,
    /// The lines that were dropped so far.
    dropped: u64,
}

impl LogQueue {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a line with its end, or drops it. Never blocks.
    pub(super) fn push(&self, line: &[u8]) {
        let mut state = self.state();
        if state.waiting.len() + line.len() > CAPACITY {
            state.dropped += 1;
            return;
        }
        state.waiting.extend_from_slice(line);
        state.waiting_lines += 1;
        drop(state);
        self.changed.notify_all();
    }

    /// How many lines were dropped so far.
    pub(super) fn dropped(&self) -> u64 {
        self.state().dropped
    }

    /// Waits until everything is written, but no longer than this.
    pub(super) fn flush(&self, timeout: Duration) {
        let is_busy = |state: &mut State| state.is_writing || !state.waiting.is_empty();
        let waited = self.changed.wait_timeout_while(self.state(), timeout, is_busy);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }

    /// Starts the thread that writes. `report` is called with the number of lines that were dropped since it was last
    /// called, once there is room again.
    pub(super) fn write_to(
        &'static self,
        mut writer: impl Write + Send + 'static,
        report: impl Fn(u64) + Send + 'static,
    ) -> io::Result<()> {
        let write = move || {
            let mut reported = 0;
            loop {
                let mut state = self
                    .changed
                    .wait_while(self.state(), |state| state.waiting.is_empty())
                    .unwrap_or_else(PoisonError::into_inner);
                let (lines, count) = (std::mem::take(&mut state.waiting), std::mem::take(&mut state.waiting_lines));
                state.is_writing = true;
                drop(state);
                let is_written = writer.write_all(&lines).and_then(|()| writer.flush()).is_ok();
                let mut state = self.state();
                state.is_writing = false;
                if !is_written {
                    // Closed, or its disk is full.
                    state.dropped += count;
                }
                let dropped = state.dropped;
                drop(state);
                self.changed.notify_all();
                if is_written && dropped > reported {
                    report(dropped - reported);
                    reported = dropped;
                }
            }
        };
        thread::Builder::new().name("log".to_owned()).spawn(write).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    /// Blocks until it is told to go on.
    struct Pipe {
        go_on: mpsc::Receiver<()>,
        written: mpsc::Sender<Vec<u8>>,
    }

    impl Write for Pipe {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            if self.go_on.recv().is_err() {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            let _ = self.written.send(bytes.to_vec());
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_pipe_that_nobody_reads_drops_lines_and_blocks_nobody() {
        let queue: &'static LogQueue = Box::leak(Box::default());
        let (go_on, gone_on) = mpsc::channel();
        let (written, lines) = mpsc::channel();
        let (report, reports) = mpsc::channel();
        queue.write_to(Pipe { go_on: gone_on, written }, move |count| report.send(count).unwrap()).unwrap();
        let line = [&[b'x'; 1023][..], b"\n"].concat();
        let count = 10 * CAPACITY / line.len();
        for _ in 0..count {
            queue.push(&line);
        }
        queue.flush(Duration::from_millis(1));
        let dropped = usize::try_from(queue.dropped()).unwrap();
        assert!(dropped >= count - 2 * CAPACITY / line.len() && dropped < count, "{dropped}");
        // Whatever waited is written once it is read, and what was lost is told.
        for _ in 0..2 {
            go_on.send(()).unwrap();
        }
        let mut bytes = lines.recv().unwrap().len();
        if bytes < (count - dropped) * line.len() {
            bytes += lines.recv().unwrap().len();
        }
        assert_eq!(bytes, (count - dropped) * line.len());
        assert_eq!(reports.recv().unwrap(), queue.dropped());
        queue.flush(Duration::from_secs(60));
        // A pipe whose reader is gone.
        drop(go_on);
        queue.push(b"one\n");
        queue.flush(Duration::from_secs(60));
    }

    #[test]
    fn a_line_longer_than_the_queue_is_dropped() {
        let queue = LogQueue::default();
        queue.push(&vec![b'x'; CAPACITY + 1]);
        queue.push(b"short\n");
        assert_eq!((queue.dropped(), queue.state().waiting.as_slice()), (1, &b"short\n"[..]));
    }
}
