//! The socket that is awaited, on tokio.

use std::io;
use std::marker::PhantomData;

use netlink_packet_core::{NetlinkDeserializable, NetlinkSerializable};
use netlink_sys::Socket as RawSocket;
use tokio::task::coop::consume_budget;

use crate::error::{Error, Refusal};
use crate::exchange::{DUMP_ATTEMPTS, Dumping, Outgoing, RECEIVE_BYTES, Request, Sent};
use crate::socket::{drop_queued, no_answer, open, receive_queued, retry};

/// [`Socket`](crate::Socket) for tasks: the same requests and answers, awaited.
///
/// The kernel handles a request inside the system call that sends it, and has answered when that returns: there is nothing
/// to wait for. What a task gains is that others get their turn, by tokio's rules, between the datagrams of a dump and the
/// parts of a batch. A future that is dropped leaves the socket usable; whether what it has sent was carried out is not
/// known then.
#[derive(Debug)]
pub struct AsyncSocket {
    raw: RawSocket,
    outgoing: Outgoing,
    incoming: Vec<u8>,
    /// As in the synchronous socket.
    is_dumping: bool,
}

impl AsyncSocket {
    /// Opens a socket of a protocol such as [`NETLINK_ROUTE`](crate::protocols::NETLINK_ROUTE), in the network namespace
    /// of the calling thread.
    pub fn open(protocol: isize) -> Result<Self, Error> {
        let raw = open(protocol)?;
        Ok(Self { raw, outgoing: Outgoing::default(), incoming: vec![0; RECEIVE_BYTES], is_dumping: false })
    }

    /// What was sent so far.
    pub fn sent(&self) -> Sent {
        self.outgoing.sent()
    }

    /// [`Socket::request`](crate::Socket::request), awaited.
    pub async fn request<M, R>(&mut self, request: &Request<M>, mut each: impl FnMut(R)) -> Result<(), Error>
    where
        M: NetlinkSerializable,
        R: NetlinkDeserializable,
    {
        let asking = self.outgoing.request(request);
        self.send().await?;
        loop {
            let datagram = receive(&self.raw, &mut self.incoming).await?;
            if asking.receive(&self.outgoing, datagram, &mut each)? {
                return Ok(());
            }
        }
    }

    /// [`Socket::dump`](crate::Socket::dump), awaited.
    pub async fn dump<M, R>(&mut self, message: &M, each: impl FnMut(R)) -> Result<(), Error>
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
                read.into_iter().for_each(each);
                return Ok(());
            }
        }
        Err(Error::Interrupted { attempts: DUMP_ATTEMPTS })
    }

    /// [`Socket::stream`](crate::Socket::stream), awaited.
    pub async fn stream<M, R>(&mut self, message: &M) -> Result<AsyncStream<'_, R>, Error>
    where
        M: NetlinkSerializable,
        R: NetlinkDeserializable,
    {
        let dumping = self.outgoing.dump(message);
        self.send().await?;
        self.is_dumping = true;
        Ok(AsyncStream { socket: self, dumping, of: PhantomData })
    }

    /// [`Socket::batch`](crate::Socket::batch), awaited.
    pub async fn batch<M>(
        &mut self,
        requests: impl IntoIterator<Item = Request<M>>,
    ) -> Result<Vec<Result<(), Refusal>>, Error>
    where
        M: NetlinkSerializable,
    {
        let mut requests = requests.into_iter();
        let mut results = Vec::with_capacity(requests.size_hint().0);
        while let Some(batching) = self.outgoing.batch(&mut requests, &mut results) {
            self.send().await?;
            loop {
                match receive(&self.raw, &mut self.incoming).await {
                    Ok(datagram) if batching.receive(&self.outgoing, datagram, &mut results)? => break,
                    Ok(_) => {}
                    Err(Error::Refused(refusal)) => {
                        batching.refuse_last(refusal, &mut results);
                        break;
                    }
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(results)
    }

    async fn send(&mut self) -> Result<(), Error> {
        consume_budget().await;
        if std::mem::take(&mut self.is_dumping) {
            drop_queued(&self.raw, &mut self.incoming);
        }
        let bytes = retry(|| self.raw.send(self.outgoing.datagram(), 0)).map_err(Error::Send)?;
        self.outgoing.count(bytes);
        Ok(())
    }
}

/// The messages of a dump as they come, awaited: see [`Stream`](crate::Stream).
#[derive(Debug)]
pub struct AsyncStream<'a, R> {
    socket: &'a mut AsyncSocket,
    dumping: Dumping,
    of: PhantomData<fn() -> R>,
}

impl<R: NetlinkDeserializable> AsyncStream<'_, R> {
    /// Whether the kernel has said so far that what it lists changed meanwhile.
    #[must_use]
    pub fn is_interrupted(&self) -> bool {
        self.dumping.is_interrupted()
    }

    /// The next message; `None` after the last. After a message that cannot be decoded the rest follows.
    pub async fn next(&mut self) -> Option<Result<R, Error>> {
        loop {
            let AsyncSocket { raw, outgoing, incoming, is_dumping } = &mut *self.socket;
            let next = self.dumping.next(outgoing, incoming);
            *is_dumping = !self.dumping.is_done();
            match next {
                Ok(Some(message)) => return Some(Ok(message)),
                Ok(None) if self.dumping.is_done() => return None,
                Ok(None) => match receive(raw, incoming).await {
                    Ok(datagram) => self.dumping.received(datagram.len()),
                    Err(error) => {
                        self.dumping.give_up();
                        return Some(Err(error));
                    }
                },
                Err(error) => return Some(Err(error)),
            }
        }
    }
}

/// Receives one datagram.
async fn receive<'a>(raw: &RawSocket, buffer: &'a mut [u8]) -> Result<&'a [u8], Error> {
    consume_budget().await;
    match receive_queued(raw, buffer) {
        Ok(Some(datagram)) => Ok(datagram),
        Ok(None) => Err(no_answer(io::ErrorKind::WouldBlock.into())),
        Err(error) => Err(no_answer(error)),
    }
}
