//! The socket that is awaited, on tokio.

use std::io;
use std::marker::PhantomData;

use netlink_packet_core::{NetlinkDeserializable, NetlinkSerializable};
use netlink_sys::Socket as RawSocket;
use tokio::io::unix::AsyncFd;

use crate::error::{Error, Refusal};
use crate::exchange::{DUMP_ATTEMPTS, Dumping, Outgoing, RECEIVE_BYTES, Request, Sent};
use crate::socket::{drop_queued, open, receive_queued, retry};

/// [`Socket`](crate::Socket) for tasks: the same requests and answers, awaited.
///
/// The kernel handles a request inside the system call that sends it, which takes the time it takes, awaited or not. What a
/// task gains is that others run between the datagrams of a dump and the parts of a batch. A future that is dropped leaves
/// the socket usable; whether what it has sent was carried out is not known then.
#[derive(Debug)]
pub struct AsyncSocket {
    raw: AsyncFd<RawSocket>,
    outgoing: Outgoing,
    incoming: Vec<u8>,
    /// As in the synchronous socket.
    is_dumping: bool,
}

impl AsyncSocket {
    /// Opens a socket of a protocol such as [`NETLINK_ROUTE`](crate::protocols::NETLINK_ROUTE), in the network namespace
    /// of the calling thread. It has to be called in a tokio runtime with I/O enabled, and panics elsewhere.
    pub fn open(protocol: isize) -> Result<Self, Error> {
        let raw = open(protocol)?;
        #[expect(
            deprecated,
            reason = "what takes its place is unsafe; this socket keeps its descriptor until it is dropped"
        )]
        let register = AsyncFd::new;
        let raw =
            raw.set_non_blocking(true).and_then(|()| register(raw)).map_err(|error| Error::Open { protocol, error })?;
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
            let length = receive(&self.raw, &mut self.incoming).await?;
            if asking.receive(&self.outgoing, &self.incoming[..length], &mut each)? {
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
        Ok(AsyncStream { socket: self, dumping, filled: 0, read: 0, of: PhantomData })
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
                let length = receive(&self.raw, &mut self.incoming).await?;
                if batching.receive(&self.outgoing, &self.incoming[..length], &mut results)? {
                    break;
                }
            }
        }
        Ok(results)
    }

    async fn send(&mut self) -> Result<(), Error> {
        if std::mem::take(&mut self.is_dumping) {
            drop_queued(self.raw.get_ref(), &mut self.incoming);
        }
        let send = |raw: &RawSocket| retry(|| raw.send(self.outgoing.datagram(), 0));
        let bytes = loop {
            let mut guard = self.raw.writable().await.map_err(Error::Send)?;
            if let Ok(result) = guard.try_io(|raw| send(raw.get_ref())) {
                break result.map_err(Error::Send)?;
            }
        };
        self.outgoing.count(bytes);
        Ok(())
    }
}

/// The messages of a dump as they come, awaited: see [`Stream`](crate::Stream).
#[derive(Debug)]
pub struct AsyncStream<'a, R> {
    socket: &'a mut AsyncSocket,
    dumping: Dumping,
    filled: usize,
    read: usize,
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
            let mut rest = &incoming[self.read..self.filled];
            let next = self.dumping.next(outgoing, &mut rest);
            self.read = self.filled - rest.len();
            *is_dumping = !self.dumping.is_done();
            match next {
                Ok(Some(message)) => return Some(Ok(message)),
                Ok(None) if self.dumping.is_done() => return None,
                Ok(None) => match receive(raw, incoming).await {
                    Ok(length) => (self.filled, self.read) = (length, 0),
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

/// Receives one datagram and returns its length.
async fn receive(raw: &AsyncFd<RawSocket>, buffer: &mut [u8]) -> Result<usize, Error> {
    loop {
        let mut guard = raw.readable().await.map_err(Error::Receive)?;
        let received = guard.try_io(|raw| match receive_queued(raw.get_ref(), buffer) {
            Ok(Some(datagram)) => Ok(datagram.len()),
            Ok(None) => Err(io::ErrorKind::WouldBlock.into()),
            Err(error) => Err(error),
        });
        if let Ok(result) = received {
            return result.map_err(Error::Receive);
        }
    }
}
