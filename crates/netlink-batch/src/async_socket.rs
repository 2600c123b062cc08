//! The asynchronous socket, on tokio.

use std::io;
use std::marker::PhantomData;
use std::time::{Duration, Instant};

use netlink_packet_core::{NetlinkDeserializable, NetlinkSerializable};
use netlink_sys::Socket as RawSocket;
use tokio::task::coop::consume_budget;
use tokio::task::yield_now;

use crate::error::{Error, Refusal};
use crate::exchange::{DUMP_ATTEMPTS, Outgoing, PartialBatch, PendingBatch, PendingDump, RECEIVE_BYTES, Request, Sent};
use crate::socket::{drop_one, is_last, is_too_large, no_reply, open, receive_buffer, receive_queued, retry};

/// [`Socket`](crate::Socket) for async code: the same requests and replies.
///
/// The kernel handles a request inside the system call that sends it and has queued the reply when that returns, so
/// this socket never waits for readiness. It lets other tasks run after half a millisecond, and by tokio's cooperative
/// budget: between requests, the datagrams of a dump and the parts of a batch. One system call is not interrupted.
/// Dropping a future leaves the socket usable, but whether the kernel carried out what was sent is then unknown. The next
/// future first discards the replies that nobody read, such as the rest of a dump, which also lets other tasks run.
#[derive(Debug)]
pub struct AsyncSocket {
    raw: RawSocket,
    outgoing: Outgoing,
    incoming: Vec<u8>,
    /// As in [`Socket`](crate::Socket), and after a future was dropped between what it sent and the reply.
    has_unread_replies: bool,
    turn: Turn,
}

/// How long other tasks wait while system calls follow one another.
const TURN: Duration = Duration::from_micros(500);

/// When other tasks have last run.
#[derive(Debug)]
struct Turn(Instant);

impl Turn {
    /// Lets other tasks run if they have waited for long: the budget counts calls alone, of which some take milliseconds.
    async fn next(&mut self) {
        consume_budget().await;
        if self.0.elapsed() >= TURN {
            yield_now().await;
            self.0 = Instant::now();
        }
    }
}

/// How many messages of a dump are passed on before other tasks may run.
const DUMP_MESSAGES_PER_TURN: usize = 64;

impl AsyncSocket {
    /// Opens a socket of a protocol such as [`NETLINK_ROUTE`](crate::protocols::NETLINK_ROUTE), in the network
    /// namespace of the calling thread.
    pub fn open(protocol: isize) -> Result<Self, Error> {
        let raw = open(protocol)?;
        let outgoing = Outgoing::new(receive_buffer(&raw));
        Ok(Self {
            raw,
            outgoing,
            incoming: vec![0; RECEIVE_BYTES],
            has_unread_replies: false,
            turn: Turn(Instant::now()),
        })
    }

    /// Counters of what was sent so far.
    pub fn sent(&self) -> Sent {
        self.outgoing.sent()
    }

    /// The async form of [`Socket::request`](crate::Socket::request).
    pub async fn request<M, R>(&mut self, request: &Request<M>, mut each: impl FnMut(R)) -> Result<(), Error>
    where
        M: NetlinkSerializable,
        R: NetlinkDeserializable,
    {
        let pending = self.outgoing.request(request);
        self.send().await?;
        loop {
            let datagram = receive(&self.raw, &mut self.incoming, &mut self.turn).await?;
            let received = pending.receive(&self.outgoing, datagram, &mut each);
            self.has_unread_replies = !is_last(&received);
            if received? {
                return Ok(());
            }
        }
    }

    /// The async form of [`Socket::dump`](crate::Socket::dump).
    pub async fn dump<M, R>(&mut self, message: &M, mut each: impl FnMut(R)) -> Result<(), Error>
    where
        M: NetlinkSerializable,
        R: NetlinkDeserializable,
    {
        for _ in 0..DUMP_ATTEMPTS {
            let mut stream = self.stream(message).await?;
            let mut read = Vec::new();
            while let Some(message) = stream.next().await {
                read.push(message?);
            }
            if !stream.is_interrupted() {
                for (number, message) in read.into_iter().enumerate() {
                    each(message);
                    if number % DUMP_MESSAGES_PER_TURN == 0 {
                        self.turn.next().await;
                    }
                }
                return Ok(());
            }
        }
        Err(Error::Interrupted { attempts: DUMP_ATTEMPTS })
    }

    /// The async form of [`Socket::stream`](crate::Socket::stream).
    pub async fn stream<M, R>(&mut self, message: &M) -> Result<AsyncStream<'_, R>, Error>
    where
        M: NetlinkSerializable,
        R: NetlinkDeserializable,
    {
        let pending = self.outgoing.dump(message);
        self.send().await?;
        Ok(AsyncStream { socket: self, pending, of: PhantomData })
    }

    /// The async form of [`Socket::batch`](crate::Socket::batch).
    pub async fn batch<M>(
        &mut self,
        requests: impl IntoIterator<Item = Request<M>>,
    ) -> Result<Vec<Result<(), Refusal>>, Error>
    where
        M: NetlinkSerializable,
    {
        self.batch_partial(requests).await.map_err(|partial| partial.error)
    }

    /// The async form of [`Socket::batch_partial`](crate::Socket::batch_partial).
    pub async fn batch_partial<M>(
        &mut self,
        requests: impl IntoIterator<Item = Request<M>>,
    ) -> Result<Vec<Result<(), Refusal>>, Box<PartialBatch>>
    where
        M: NetlinkSerializable,
    {
        let mut requests = requests.into_iter();
        let mut results = Vec::with_capacity(requests.size_hint().0);
        let mut parts = Vec::new();
        while let Some(mut part) = parts.pop().or_else(|| self.outgoing.batch(&mut requests, &mut results)) {
            match self.send_part(Some(&part)).await {
                Err(error) if is_too_large(&error) => match self.outgoing.halve(part) {
                    Ok([first, second]) => parts.extend([second, first]),
                    Err(part) => part.refuse_last(Refusal::new(libc::EMSGSIZE), &mut results),
                },
                Err(error) => return Err(Box::new(part.end(results, error))),
                Ok(()) => {
                    if let Err(error) = self.receive_part(&mut part, &mut results).await {
                        return Err(Box::new(part.end(results, error)));
                    }
                }
            }
        }
        Ok(results)
    }

    async fn receive_part(
        &mut self,
        part: &mut PendingBatch,
        results: &mut [Result<(), Refusal>],
    ) -> Result<(), Error> {
        loop {
            match receive(&self.raw, &mut self.incoming, &mut self.turn).await {
                Ok(datagram) if part.receive(&self.outgoing, datagram, results)? => break,
                Ok(_) => {}
                Err(Error::Refused(refusal)) => {
                    part.refuse_last(refusal, results);
                    break;
                }
                Err(error) => return Err(error),
            }
        }
        self.has_unread_replies = false;
        Ok(())
    }

    async fn send(&mut self) -> Result<(), Error> {
        self.send_part(None).await
    }

    /// Sends a part of the datagram, or all of it.
    async fn send_part(&mut self, part: Option<&PendingBatch>) -> Result<(), Error> {
        self.turn.next().await;
        if self.has_unread_replies {
            while drop_one(&self.raw, &mut self.incoming) {
                self.turn.next().await;
            }
        }
        self.has_unread_replies = true;
        let datagram = part.map_or(self.outgoing.datagram(), |part| self.outgoing.part(part));
        let bytes = retry(|| self.raw.send(datagram, 0)).map_err(Error::Send)?;
        self.outgoing.count(bytes);
        Ok(())
    }
}

/// The messages of a dump as they arrive: the async form of [`Stream`](crate::Stream).
#[derive(Debug)]
pub struct AsyncStream<'a, R> {
    socket: &'a mut AsyncSocket,
    pending: PendingDump,
    of: PhantomData<fn() -> R>,
}

impl<R: NetlinkDeserializable> AsyncStream<'_, R> {
    /// Whether the kernel has marked the dump as inconsistent so far (`NLM_F_DUMP_INTR`).
    #[must_use]
    pub fn is_interrupted(&self) -> bool {
        self.pending.is_interrupted()
    }

    /// The next message; `None` after the last. A message that cannot be decoded is an error and does not end the dump.
    pub async fn next(&mut self) -> Option<Result<R, Error>> {
        loop {
            let AsyncSocket { raw, outgoing, incoming, has_unread_replies, turn } = &mut *self.socket;
            let next = self.pending.next(outgoing, incoming);
            *has_unread_replies = !self.pending.is_done();
            match next {
                Ok(Some(message)) => return Some(Ok(message)),
                Ok(None) if self.pending.is_done() => return None,
                Ok(None) => match receive(raw, incoming, turn).await {
                    Ok(datagram) => self.pending.received(datagram.len()),
                    Err(error) => {
                        self.pending.abort();
                        return Some(Err(error));
                    }
                },
                Err(error) => return Some(Err(error)),
            }
        }
    }
}

/// Receives one datagram.
async fn receive<'a>(raw: &RawSocket, buffer: &'a mut [u8], turn: &mut Turn) -> Result<&'a [u8], Error> {
    turn.next().await;
    match receive_queued(raw, buffer) {
        Ok(Some(datagram)) => Ok(datagram),
        Ok(None) => Err(no_reply(io::ErrorKind::WouldBlock.into())),
        Err(error) => Err(no_reply(error)),
    }
}
