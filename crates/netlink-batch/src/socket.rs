//! The synchronous socket.

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use netlink_packet_core::{NetlinkDeserializable, NetlinkSerializable};
use netlink_sys::{Socket as RawSocket, SocketAddr};
use rustix::net::sockopt::{self, Timeout};

use crate::error::{Error, Refusal};
use crate::exchange::{
    BATCH_BYTES, BATCH_MESSAGES, DUMP_ATTEMPTS, Outgoing, PartialBatch, PendingBatch, PendingDump, RECEIVE_BYTES,
    RECEIVE_BYTES_PER_REPLY, Request, Sent,
};

/// A synchronous netlink socket, connected to the kernel: it receives messages of no other sender.
#[derive(Debug)]
pub struct Socket {
    raw: RawSocket,
    outgoing: Outgoing,
    incoming: Vec<u8>,
    /// The last reply to what was sent has not been read: a dump, a reply that cannot be decoded, a panic in between. What is
    /// queued would take the place of later replies, and the kernel refuses another dump (`EBUSY`).
    has_unread_replies: bool,
}

/// The receive timeout. Most families reply before `send` returns; in a few, such as audit, a kernel thread sends the
/// reply shortly after. A reply that has not arrived by then never arrives.
const RECEIVE_TIMEOUT: Duration = Duration::from_millis(100);

/// Opens a socket that is connected to the kernel.
pub(crate) fn open(protocol: isize) -> Result<RawSocket, Error> {
    let open = || {
        let mut socket = RawSocket::new(protocol)?;
        socket.bind_auto()?;
        // A connected netlink socket takes messages from its peer alone (netlink_getsockbyportid).
        socket.connect(&SocketAddr::new(0, 0))?;
        // Both since Linux 4.12. On an older kernel these fail, and refusals have no details.
        let _ = socket.set_ext_ack(true);
        let _ = socket.set_cap_ack(true);
        sockopt::set_socket_timeout(&socket, Timeout::Recv, Some(RECEIVE_TIMEOUT))?;
        grow_buffers(&socket);
        Ok(socket)
    };
    open().map_err(|error| Error::Open { protocol, error })
}

/// Grows buffers that are too small for a whole batch, where the system's default is low: by privilege, or up to the system's
/// limit. Batches adapt to what there is.
fn grow_buffers(raw: &RawSocket) {
    let receive = BATCH_MESSAGES * RECEIVE_BYTES_PER_REPLY;
    if receive_buffer(raw) < receive {
        // The kernel doubles the size.
        let _ = sockopt::set_socket_recv_buffer_size_force(raw, receive / 2)
            .or_else(|_| sockopt::set_socket_recv_buffer_size(raw, receive / 2));
    }
    let send = BATCH_BYTES * 2;
    if sockopt::socket_send_buffer_size(raw).is_ok_and(|size| size < send) {
        let _ = sockopt::set_socket_send_buffer_size_force(raw, send / 2)
            .or_else(|_| sockopt::set_socket_send_buffer_size(raw, send / 2));
    }
}

/// The size of the receive buffer in bytes, as the kernel counts them.
pub(crate) fn receive_buffer(raw: &RawSocket) -> usize {
    sockopt::socket_recv_buffer_size(raw).unwrap_or(0)
}

impl Socket {
    /// Opens a socket of a protocol such as [`NETLINK_ROUTE`](crate::protocols::NETLINK_ROUTE), in the network
    /// namespace of the calling thread.
    pub fn open(protocol: isize) -> Result<Self, Error> {
        open(protocol).map(Self::of)
    }

    fn of(raw: RawSocket) -> Self {
        let outgoing = Outgoing::new(receive_buffer(&raw));
        Self { raw, outgoing, incoming: vec![0; RECEIVE_BYTES], has_unread_replies: false }
    }

    /// Enables strict checking of dump requests (`NETLINK_GET_STRICT_CHK`): the kernel applies the filters in a request
    /// and refuses those it does not know. Since Linux 4.20; an older kernel ignores the filters and dumps everything.
    pub fn enable_strict_checking(&mut self) {
        let _ = self.raw.set_netlink_get_strict_chk(true);
    }

    /// The port id of this socket (`nl_pid`). Many notifications have the requester's in `nlmsg_pid`; see netlink(7).
    pub fn port_id(&self) -> u32 {
        let mut address = SocketAddr::new(0, 0);
        // Cannot fail: the socket is open and bound. 0 is the kernel's own.
        self.raw.get_address(&mut address).map_or(0, |()| address.port_number())
    }

    /// Counters of what was sent so far.
    pub fn sent(&self) -> Sent {
        self.outgoing.sent()
    }

    /// Sends one request and passes each message of the reply to `each`, until the kernel acknowledges.
    pub fn request<M, R>(&mut self, request: &Request<M>, mut each: impl FnMut(R)) -> Result<(), Error>
    where
        M: NetlinkSerializable,
        R: NetlinkDeserializable,
    {
        #[cfg(feature = "fault-points")]
        // A kernel never answers ENOENT for an object that exists, so that is not injected.
        if let Some(refusal) = crate::fault::refusal().filter(|refusal| refusal.errno != libc::ENOENT) {
            return Err(refusal.into());
        }
        let pending = self.outgoing.request(request);
        self.send()?;
        loop {
            let datagram = receive(&self.raw, &mut self.incoming).map_err(no_reply)?;
            let received = pending.receive(&self.outgoing, datagram, &mut each);
            self.has_unread_replies = !is_last(&received);
            if received? {
                return Ok(());
            }
        }
    }

    /// Requests a dump and passes each message to `each`.
    ///
    /// If the kernel marks the dump as interrupted by a change (`NLM_F_DUMP_INTR`), it is repeated until one is
    /// consistent; `each` only sees the messages of that one.
    pub fn dump<M, R>(&mut self, message: &M, each: impl FnMut(R)) -> Result<(), Error>
    where
        M: NetlinkSerializable,
        R: NetlinkDeserializable,
    {
        for _ in 0..DUMP_ATTEMPTS {
            let mut stream = self.stream(message)?;
            let read = stream.by_ref().collect::<Result<Vec<_>, _>>()?;
            if !stream.is_interrupted() {
                read.into_iter().for_each(each);
                return Ok(());
            }
        }
        Err(Error::Interrupted { attempts: DUMP_ATTEMPTS })
    }

    /// Requests a dump and returns each message as it arrives, for dumps that are too large to hold in memory. If the
    /// dump is interrupted, entries may be missing or repeated: see [`Stream::is_interrupted`].
    pub fn stream<M, R>(&mut self, message: &M) -> Result<Stream<'_, R>, Error>
    where
        M: NetlinkSerializable,
        R: NetlinkDeserializable,
    {
        let pending = self.outgoing.dump(message);
        self.send()?;
        Ok(Stream { socket: self, pending, of: PhantomData })
    }

    /// Sends many requests in few `send`s and returns one result each, in order.
    ///
    /// A batch consists of plain messages, up to [`BATCH_MESSAGES`](crate::BATCH_MESSAGES) in one datagram. The kernel
    /// handles them one by one and continues after a refusal: a batch is not atomic. Only the last message requests an
    /// ACK, since the kernel always reports refusals; once that reply arrives, all others are queued. The kernel sends
    /// no reply to a request that fails with `EINTR`: this is detected for the last request of a datagram, while any
    /// other appears to have succeeded. In a user-mode Linux 6.1 this takes 0.8–3.4 µs for a new IPVS service, against
    /// 15 µs one request at a time.
    ///
    /// A datagram has fewer messages where the socket's buffers are small. The outer `Err` means that the socket failed:
    /// requests may or may not have been handled. [`Socket::batch_partial`] tells what is known of them.
    pub fn batch<M>(
        &mut self,
        requests: impl IntoIterator<Item = Request<M>>,
    ) -> Result<Vec<Result<(), Refusal>>, Error>
    where
        M: NetlinkSerializable,
    {
        self.batch_partial(requests).map_err(|partial| partial.error)
    }

    /// [`Socket::batch`], whose error has the results that are known.
    pub fn batch_partial<M>(
        &mut self,
        requests: impl IntoIterator<Item = Request<M>>,
    ) -> Result<Vec<Result<(), Refusal>>, Box<PartialBatch>>
    where
        M: NetlinkSerializable,
    {
        #[cfg(feature = "fault-points")]
        let (requests, refused) = crate::fault::take_refused(requests);
        let mut requests = requests.into_iter();
        let mut results = Vec::with_capacity(requests.size_hint().0);
        let mut parts = Vec::new();
        while let Some(mut part) = parts.pop().or_else(|| self.outgoing.batch(&mut requests, &mut results)) {
            match self.send_part(Some(&part)) {
                Err(error) if is_too_large(&error) => match self.outgoing.halve(part) {
                    Ok([first, second]) => parts.extend([second, first]),
                    Err(part) => part.refuse_last(Refusal::new(libc::EMSGSIZE), &mut results),
                },
                Err(error) => return Err(Box::new(part.end(results, error))),
                Ok(()) => {
                    if let Err(error) = self.receive_part(&mut part, &mut results) {
                        return Err(Box::new(part.end(results, error)));
                    }
                }
            }
        }
        #[cfg(feature = "fault-points")]
        for (index, refusal) in refused {
            results.insert(index, Err(refusal));
        }
        Ok(results)
    }

    fn receive_part(&mut self, part: &mut PendingBatch, results: &mut [Result<(), Refusal>]) -> Result<(), Error> {
        loop {
            match receive(&self.raw, &mut self.incoming).map_err(no_reply) {
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

    /// Sends requests as one transaction: one datagram between a begin message and an end message, as nfnetlink has it.
    /// The transaction is atomic: either all of it takes effect or nothing does.
    ///
    /// The inner `Err` is the index of the first refused request and its refusal; nothing took effect then. A refusal
    /// of the transaction as a whole has the index 0.
    ///
    /// The send buffer grows to the size of the datagram, which needs `CAP_NET_ADMIN` above the system's limit.
    pub fn transaction<M>(
        &mut self,
        begin: &M,
        requests: impl IntoIterator<Item = Request<M>>,
        end: &M,
    ) -> Result<Result<(), (usize, Refusal)>, Error>
    where
        M: NetlinkSerializable,
    {
        let Some(mut transaction) = self.outgoing.transaction(begin, requests, end) else { return Ok(Ok(())) };
        #[cfg(feature = "fault-points")]
        if let Some(refusal) = crate::fault::refusal() {
            return Ok(Err((0, refusal)));
        }
        self.grow_send_buffer()?;
        match self.send() {
            Err(error) if is_too_large(&error) => return Ok(Err((0, Refusal::new(libc::EMSGSIZE)))),
            sent => sent?,
        }
        // All replies are queued by now.
        loop {
            match receive_queued(&self.raw, &mut self.incoming) {
                Ok(Some(datagram)) => transaction.receive(&self.outgoing, datagram)?,
                Ok(None) => {
                    self.has_unread_replies = false;
                    return Ok(transaction.result(true));
                }
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => return Ok(transaction.result(false)),
                Err(error) => return Err(Error::Receive(error)),
            }
        }
    }

    /// Grows the send buffer for the current datagram: the kernel refuses one that is larger than the buffer.
    fn grow_send_buffer(&self) -> Result<(), Error> {
        let needed = self.outgoing.datagram().len() * 2;
        if needed <= BATCH_BYTES * 2 || sockopt::socket_send_buffer_size(&self.raw).is_ok_and(|size| size >= needed) {
            return Ok(());
        }
        sockopt::set_socket_send_buffer_size_force(&self.raw, needed)
            .or_else(|_| sockopt::set_socket_send_buffer_size(&self.raw, needed))
            .map_err(|errno| Error::Send(errno.into()))
    }

    fn send(&mut self) -> Result<(), Error> {
        self.send_part(None)
    }

    /// Sends a part of the datagram, or all of it.
    fn send_part(&mut self, part: Option<&PendingBatch>) -> Result<(), Error> {
        // The kernel produces the rest of a dump as fast as it is received.
        if std::mem::replace(&mut self.has_unread_replies, true) {
            drop_queued(&self.raw, &mut self.incoming);
        }
        #[cfg(feature = "fault-points")]
        let number = crate::fault::begin().map_err(Error::Send)?;
        let datagram = part.map_or(self.outgoing.datagram(), |part| self.outgoing.part(part));
        let bytes = retry(|| self.raw.send(datagram, 0)).map_err(Error::Send)?;
        #[cfg(feature = "fault-points")]
        crate::fault::end(number);
        self.outgoing.count(bytes);
        Ok(())
    }
}

/// To duplicate the socket, which keeps what the kernel bound to it, such as a table of `nf_tables` with an owner.
impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.raw.as_fd()
    }
}

/// The messages of a dump as they arrive. One that cannot be decoded is an error and does not end the dump. Messages
/// that are unread when this is dropped are discarded.
#[derive(Debug)]
pub struct Stream<'a, R> {
    socket: &'a mut Socket,
    pending: PendingDump,
    of: PhantomData<fn() -> R>,
}

impl<R> Stream<'_, R> {
    /// Whether the kernel has marked the dump as inconsistent so far (`NLM_F_DUMP_INTR`).
    #[must_use]
    pub fn is_interrupted(&self) -> bool {
        self.pending.is_interrupted()
    }
}

impl<R: NetlinkDeserializable> Iterator for Stream<'_, R> {
    type Item = Result<R, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let Socket { raw, outgoing, incoming, has_unread_replies } = &mut *self.socket;
            let next = self.pending.next(outgoing, incoming);
            *has_unread_replies = !self.pending.is_done();
            match next {
                Ok(Some(message)) => return Some(Ok(message)),
                Ok(None) if self.pending.is_done() => return None,
                Ok(None) => match receive(raw, incoming) {
                    Ok(datagram) => self.pending.received(datagram.len()),
                    Err(error) => {
                        self.pending.abort();
                        return Some(Err(no_reply(error)));
                    }
                },
                Err(error) => return Some(Err(error)),
            }
        }
    }
}

/// Whether the kernel refuses a datagram for its size: none of its requests was handled.
pub(crate) fn is_too_large(error: &Error) -> bool {
    matches!(error, Error::Send(error) if error.raw_os_error() == Some(libc::EMSGSIZE))
}

/// Whether this datagram of the reply to a request had the last reply in it.
pub(crate) fn is_last(received: &Result<bool, Error>) -> bool {
    matches!(received, Ok(true) | Err(Error::Refused(_)))
}

/// The error for a missing reply. The kernel sends none to a request that failed with `EINTR` (`netlink_rcv_skb`).
pub(crate) fn no_reply(error: io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::WouldBlock => Refusal::new(libc::EINTR).into(),
        _ => Error::Receive(error),
    }
}

/// Receives one datagram.
///
/// After an overrun (`ENOBUFS`) the queued datagrams are discarded too: until the queue is empty the kernel drops what
/// follows without reporting it again.
pub(crate) fn receive<'a>(raw: &RawSocket, buffer: &'a mut [u8]) -> io::Result<&'a [u8]> {
    let received = retry(|| raw.recv(&mut &mut buffer[..], 0));
    if is_overrun(&received) {
        drop_queued(raw, buffer);
    }
    received.map(|length| &buffer[..length.min(buffer.len())])
}

/// Receives one datagram if one is queued.
pub(crate) fn receive_queued<'a>(raw: &RawSocket, buffer: &'a mut [u8]) -> io::Result<Option<&'a [u8]>> {
    let received = retry(|| raw.recv(&mut &mut buffer[..], libc::MSG_DONTWAIT));
    if is_overrun(&received) {
        drop_queued(raw, buffer);
    }
    match received {
        Ok(length) => Ok(Some(&buffer[..length.min(buffer.len())])),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
        Err(error) => Err(error),
    }
}

/// Discards all queued datagrams.
pub(crate) fn drop_queued(raw: &RawSocket, buffer: &mut [u8]) {
    while drop_one(raw, buffer) {}
}

/// Discards one queued datagram, and returns whether there may be more.
pub(crate) fn drop_one(raw: &RawSocket, buffer: &mut [u8]) -> bool {
    let dropped = retry(|| raw.recv(&mut &mut buffer[..], libc::MSG_DONTWAIT));
    dropped.is_ok() || is_overrun(&dropped)
}

fn is_overrun(received: &io::Result<usize>) -> bool {
    received.as_ref().is_err_and(|error| error.raw_os_error() == Some(libc::ENOBUFS))
}

pub(crate) fn retry<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

#[cfg(test)]
mod tests;
