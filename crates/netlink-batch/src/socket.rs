//! The socket: numbering, sending, and matching answers to requests.

use std::io;

use netlink_packet_core::{
    Emitable, ErrorBuffer, NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR, NLMSG_NOOP, NLMSG_OVERRUN,
    NetlinkBuffer, NetlinkDeserializable, NetlinkHeader, NetlinkSerializable, parse_i32, parse_u32,
};
use netlink_sys::{Socket as RawSocket, SocketAddr};

use crate::error::{Error, Refusal};

/// How many messages go out in one `send`, at most.
///
/// Every refused request costs an answer of about 770 bytes of receive buffer, and the default buffer (212,992 bytes)
/// holds 256 of them on Linux 6.1 and 6.18; at twice that number answers are lost.
pub const BATCH_MESSAGES: usize = 128;

/// A datagram larger than the send buffer is refused with `EMSGSIZE`; the default takes 143 KB, so this is safe.
const BATCH_BYTES: usize = 64 * 1024;

/// The kernel fills at most 32 KiB a datagram of a dump, and fewer for a reader with a smaller buffer.
pub(crate) const RECEIVE_BYTES: usize = 64 * 1024;

const HEADER_BYTES: usize = 16;
const NLM_F_DUMP_INTR: u16 = 0x10;
const NLM_F_CAPPED: u16 = 0x100;
const NLM_F_ACK_TLVS: u16 = 0x200;

/// How often an interrupted dump is read again before giving up.
const DUMP_ATTEMPTS: u32 = 16;

/// A message with the flags it needs beside `NLM_F_REQUEST` and `NLM_F_ACK`, such as `NLM_F_CREATE | NLM_F_EXCL`.
#[derive(Clone, Copy, Debug)]
pub struct Request<M> {
    /// The message.
    pub message: M,
    /// Further flags of the netlink header.
    pub flags: u16,
}

impl<M> From<M> for Request<M> {
    fn from(message: M) -> Self {
        Self { message, flags: 0 }
    }
}

/// A synchronous netlink socket, connected to the kernel: nobody else's messages are received.
#[derive(Debug)]
pub struct Socket {
    raw: RawSocket,
    sequence: u32,
    outgoing: Vec<u8>,
    incoming: Vec<u8>,
    sent: Sent,
}

/// What a socket has sent since it was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sent {
    /// Datagrams: a request, a dump, a batch or a transaction each.
    pub datagrams: u64,
    /// Messages in them.
    pub messages: u64,
    /// Bytes in them.
    pub bytes: u64,
}

impl std::ops::Add for Sent {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            datagrams: self.datagrams + other.datagrams,
            messages: self.messages + other.messages,
            bytes: self.bytes + other.bytes,
        }
    }
}

impl std::ops::Sub for Sent {
    type Output = Self;

    fn sub(self, other: Self) -> Self {
        Self {
            datagrams: self.datagrams - other.datagrams,
            messages: self.messages - other.messages,
            bytes: self.bytes - other.bytes,
        }
    }
}

/// What a received message says about the request it answers.
enum Answer<'a> {
    Acknowledged,
    Refused(Refusal),
    Done,
    Data(&'a [u8]),
}

impl Socket {
    /// Opens a socket of a protocol such as [`NETLINK_ROUTE`](crate::protocols::NETLINK_ROUTE), in the network namespace
    /// of the calling thread.
    pub fn open(protocol: isize) -> Result<Self, Error> {
        let open = || {
            let mut socket = RawSocket::new(protocol)?;
            socket.bind_auto()?;
            // A connected netlink socket takes messages from its peer alone (netlink_getsockbyportid).
            socket.connect(&SocketAddr::new(0, 0))?;
            // Both since Linux 4.12; an older kernel says no, and errors come without details.
            let _ = socket.set_ext_ack(true);
            let _ = socket.set_cap_ack(true);
            Ok(socket)
        };
        let raw = open().map_err(|error| Error::Open { protocol, error })?;
        let (outgoing, incoming) = (Vec::new(), vec![0; RECEIVE_BYTES]);
        Ok(Self { raw, sequence: 0, outgoing, incoming, sent: Sent::default() })
    }

    /// What was sent so far.
    pub fn sent(&self) -> Sent {
        self.sent
    }

    /// Sends one request and hands each message of the answer to `each`, until the kernel acknowledges.
    pub fn request<M, R>(&mut self, request: &Request<M>, mut each: impl FnMut(R)) -> Result<(), Error>
    where
        M: NetlinkSerializable,
        R: NetlinkDeserializable,
    {
        self.outgoing.clear();
        let sequence = self.push(&request.message, request.flags | NLM_F_ACK);
        self.send()?;
        self.answers(|header, answer| {
            if header.sequence_number != sequence {
                return Ok(false);
            }
            match answer {
                Answer::Acknowledged | Answer::Done => Ok(true),
                Answer::Refused(refusal) => Err(refusal.into()),
                Answer::Data(payload) => {
                    each(decode(header, payload)?);
                    Ok(false)
                }
            }
        })
    }

    /// Asks for a dump and hands each message to `each`.
    ///
    /// Where the kernel says that the dump was interrupted by a change (`NLM_F_DUMP_INTR`), it is read again until one
    /// reading is consistent; `each` only ever sees that one.
    pub fn dump<M, R>(&mut self, message: &M, mut each: impl FnMut(R)) -> Result<(), Error>
    where
        M: NetlinkSerializable,
        R: NetlinkDeserializable,
    {
        for _ in 0..DUMP_ATTEMPTS {
            let mut read = Vec::new();
            if !self.dump_once(message, |answer| read.push(answer))? {
                read.into_iter().for_each(&mut each);
                return Ok(());
            }
        }
        Err(Error::Interrupted { attempts: DUMP_ATTEMPTS })
    }

    /// Asks for a dump and hands on each message as it comes, for lists that are too long to be held. Where the dump is
    /// interrupted some entries may be missing, or come twice.
    pub fn stream<M, R>(&mut self, message: &M, each: impl FnMut(R)) -> Result<(), Error>
    where
        M: NetlinkSerializable,
        R: NetlinkDeserializable,
    {
        self.dump_once(message, each).map(drop)
    }

    /// Returns whether the dump was interrupted.
    fn dump_once<M, R>(&mut self, message: &M, mut each: impl FnMut(R)) -> Result<bool, Error>
    where
        M: NetlinkSerializable,
        R: NetlinkDeserializable,
    {
        self.outgoing.clear();
        let sequence = self.push(message, NLM_F_DUMP);
        self.send()?;
        let mut interrupted = false;
        let mut failure = None;
        self.answers(|header, answer| {
            if header.sequence_number != sequence {
                return Ok(false);
            }
            // A change after the last entry shows in the end's flags alone.
            interrupted |= header.flags & NLM_F_DUMP_INTR != 0;
            match answer {
                Answer::Acknowledged => Ok(false),
                Answer::Done => Ok(true),
                Answer::Refused(refusal) => Err(refusal.into()),
                Answer::Data(payload) => {
                    // The kernel refuses the next dump (EBUSY) until this one is read to its end.
                    match decode(header, payload) {
                        Ok(message) => each(message),
                        Err(error) => failure = failure.take().or(Some(error)),
                    }
                    Ok(false)
                }
            }
        })?;
        failure.map_or(Ok(interrupted), Err)
    }

    /// Sends many requests in few `send`s and returns one result each, in order.
    ///
    /// A batch is plain messages one after another in one datagram, at most [`BATCH_MESSAGES`] of them. The kernel handles
    /// them one by one and goes on after a refusal: a batch is not atomic. Only the last message asks to be
    /// acknowledged, since refusals always come back by themselves; its answer also says that all others are queued.
    /// In a user-mode Linux 6.1 this takes 0.8–3.4 µs for a new IPVS service, against 15 µs one request at a time.
    ///
    /// An `Err` of the whole means that the socket failed: requests may or may not have been handled.
    pub fn batch<M>(
        &mut self,
        requests: impl IntoIterator<Item = Request<M>>,
    ) -> Result<Vec<Result<(), Refusal>>, Error>
    where
        M: NetlinkSerializable,
    {
        let mut requests = requests.into_iter().peekable();
        let mut results = Vec::with_capacity(requests.size_hint().0);
        while requests.peek().is_some() {
            self.outgoing.clear();
            let first = results.len();
            let first_sequence = self.sequence.wrapping_add(1);
            let mut last_start = 0;
            while results.len() - first < BATCH_MESSAGES && self.outgoing.len() < BATCH_BYTES {
                let Some(request) = requests.next() else { break };
                last_start = self.outgoing.len();
                self.push(&request.message, request.flags);
                results.push(Ok(()));
            }
            self.acknowledge(last_start);
            self.send()?;
            let count = results.len() - first;
            self.answers(|header, answer| {
                let index = header.sequence_number.wrapping_sub(first_sequence) as usize;
                if index >= count {
                    return Ok(false);
                }
                match answer {
                    Answer::Refused(refusal) => results[first + index] = Err(refusal),
                    // A request that has an answer beside the ACK is none for a batch; its data is not wanted.
                    Answer::Data(_) => return Ok(false),
                    Answer::Acknowledged | Answer::Done => {}
                }
                Ok(index + 1 == count)
            })?;
        }
        Ok(results)
    }

    /// Sends requests as one transaction, in one datagram between two messages that say where it begins and ends: the
    /// way of nfnetlink, where either all of it takes effect at one instant or nothing does.
    ///
    /// The inner result is the first request that was refused, by its place, and why; nothing of the transaction took
    /// effect then. A refusal of the transaction as a whole stands for its first request.
    ///
    /// The send buffer grows to what the datagram needs, which takes `CAP_NET_ADMIN` beyond the system's limit.
    pub fn transaction<M>(
        &mut self,
        begin: &M,
        requests: impl IntoIterator<Item = Request<M>>,
        end: &M,
    ) -> Result<Result<(), (usize, Refusal)>, Error>
    where
        M: NetlinkSerializable,
    {
        self.outgoing.clear();
        let begin_sequence = self.push(begin, 0);
        let mut count = 0;
        let mut last_start = 0;
        for request in requests {
            last_start = self.outgoing.len();
            self.push(&request.message, request.flags);
            count += 1;
        }
        if count == 0 {
            return Ok(Ok(()));
        }
        self.acknowledge(last_start);
        self.push(end, 0);
        self.make_room()?;
        match self.send() {
            Err(Error::Send(error)) if error.raw_os_error() == Some(libc::EMSGSIZE) => {
                return Ok(Err((0, Refusal::new(libc::EMSGSIZE))));
            }
            sent => sent?,
        }
        let mut refused = None;
        let mut is_acknowledged = false;
        // All answers are queued by now, and which of them is the last one cannot be told: of a transaction that is refused
        // as a whole the kernel says nothing more.
        loop {
            let mut rest = match receive_queued(&self.raw, &mut self.incoming) {
                Ok(Some(datagram)) => datagram,
                Ok(None) => break,
                // Only refusals come in such numbers.
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {
                    is_acknowledged = false;
                    break;
                }
                Err(error) => return Err(Error::Receive(error)),
            };
            while let Some((header, payload)) = next_message(&mut rest)? {
                let index = header.sequence_number.wrapping_sub(begin_sequence) as usize;
                match answer(&header, payload, &self.outgoing)? {
                    Some(Answer::Refused(refusal)) if index <= count => {
                        refused.get_or_insert((index.saturating_sub(1), refusal));
                    }
                    Some(Answer::Acknowledged) => is_acknowledged |= index == count,
                    _ => {}
                }
            }
        }
        Ok(match refused {
            Some(refused) => Err(refused),
            None if is_acknowledged => Ok(()),
            None => Err((0, Refusal::new(libc::ENOBUFS))),
        })
    }

    /// Lets the send buffer take the datagram at hand: the kernel refuses one that is larger than the buffer.
    fn make_room(&self) -> Result<(), Error> {
        let needed = self.outgoing.len() * 2;
        if self.outgoing.len() <= BATCH_BYTES
            || rustix::net::sockopt::socket_send_buffer_size(&self.raw).is_ok_and(|size| size >= needed)
        {
            return Ok(());
        }
        rustix::net::sockopt::set_socket_send_buffer_size_force(&self.raw, needed)
            .or_else(|_| rustix::net::sockopt::set_socket_send_buffer_size(&self.raw, needed))
            .map_err(|errno| Error::Send(errno.into()))
    }

    /// Appends a message to the datagram and returns its sequence number.
    fn push<M: NetlinkSerializable>(&mut self, message: &M, flags: u16) -> u32 {
        self.sequence = self.sequence.wrapping_add(1);
        self.sent.messages += 1;
        let start = self.outgoing.len();
        let length = HEADER_BYTES + message.buffer_len();
        self.outgoing.resize(start + length.next_multiple_of(4), 0);
        let mut header = NetlinkHeader::default();
        header.length = u32::try_from(length).unwrap_or(u32::MAX);
        header.message_type = message.message_type();
        header.flags = NLM_F_REQUEST | flags;
        header.sequence_number = self.sequence;
        header.emit(&mut self.outgoing[start..start + HEADER_BYTES]);
        message.serialize(&mut self.outgoing[start + HEADER_BYTES..start + length]);
        self.sequence
    }

    /// Sets `NLM_F_ACK` on the message that starts at `start`.
    fn acknowledge(&mut self, start: usize) {
        if let Some(message) = self.outgoing.get_mut(start..start + HEADER_BYTES) {
            let mut buffer = NetlinkBuffer::new(message);
            let flags = buffer.flags() | NLM_F_ACK;
            buffer.set_flags(flags);
        }
    }

    fn send(&mut self) -> Result<(), Error> {
        let bytes = retry(|| self.raw.send(&self.outgoing, 0)).map_err(Error::Send)?;
        self.sent.datagrams += 1;
        self.sent.bytes += bytes as u64;
        Ok(())
    }

    /// Receives until `handle`, called with the header and the content of each message, says it has all.
    fn answers(
        &mut self,
        mut handle: impl FnMut(&NetlinkHeader, Answer<'_>) -> Result<bool, Error>,
    ) -> Result<(), Error> {
        loop {
            let mut rest = receive(&self.raw, &mut self.incoming).map_err(Error::Receive)?;
            while let Some((header, payload)) = next_message(&mut rest)? {
                if let Some(answer) = answer(&header, payload, &self.outgoing)?
                    && handle(&header, answer)?
                {
                    return Ok(());
                }
            }
        }
    }
}

/// Receives one datagram.
///
/// Where the kernel says that it had to drop some (`ENOBUFS`), those it has still queued are dropped too: until the queue
/// is empty the kernel drops all that follows, and does not say so again.
pub(crate) fn receive<'a>(raw: &RawSocket, buffer: &'a mut [u8]) -> io::Result<&'a [u8]> {
    let received = retry(|| raw.recv(&mut &mut buffer[..], 0));
    if is_overrun(&received) {
        drop_queued(raw, buffer);
    }
    received.map(|length| &buffer[..length.min(buffer.len())])
}

/// Receives one datagram if one is queued.
fn receive_queued<'a>(raw: &RawSocket, buffer: &'a mut [u8]) -> io::Result<Option<&'a [u8]>> {
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

/// Empties the queue.
fn drop_queued(raw: &RawSocket, buffer: &mut [u8]) {
    loop {
        let dropped = retry(|| raw.recv(&mut &mut buffer[..], libc::MSG_DONTWAIT));
        if dropped.is_err() && !is_overrun(&dropped) {
            break;
        }
    }
}

fn is_overrun(received: &io::Result<usize>) -> bool {
    received.as_ref().is_err_and(|error| error.raw_os_error() == Some(libc::ENOBUFS))
}

/// Takes the first message off a datagram.
pub(crate) fn next_message<'a>(datagram: &mut &'a [u8]) -> Result<Option<(NetlinkHeader, &'a [u8])>, Error> {
    if datagram.is_empty() {
        return Ok(None);
    }
    let buffer = NetlinkBuffer::new_checked(*datagram)?;
    let length = buffer.length() as usize;
    let mut header = NetlinkHeader::default();
    header.length = buffer.length();
    header.message_type = buffer.message_type();
    header.flags = buffer.flags();
    header.sequence_number = buffer.sequence_number();
    header.port_number = buffer.port_number();
    let payload = &datagram[HEADER_BYTES..length];
    *datagram = datagram.get(length.next_multiple_of(4)..).unwrap_or_default();
    Ok(Some((header, payload)))
}

/// Reads one message; `None` is one that says nothing.
fn answer<'a>(header: &NetlinkHeader, payload: &'a [u8], sent: &[u8]) -> Result<Option<Answer<'a>>, Error> {
    Ok(Some(match header.message_type {
        NLMSG_NOOP => return Ok(None),
        NLMSG_OVERRUN => return Err(Error::Receive(io::Error::from_raw_os_error(libc::ENOBUFS))),
        NLMSG_ERROR => match ErrorBuffer::new_checked(payload)?.code() {
            None => Answer::Acknowledged,
            Some(code) => {
                let refusal = Refusal::new(code.get().saturating_neg());
                if header.flags & NLM_F_ACK_TLVS == 0 {
                    return Ok(Some(Answer::Refused(refusal)));
                }
                // The request's header is echoed, and its payload too unless the ACK is capped; then come the TLVs.
                let echo = &payload[4..];
                let skip = match echo.get(..4).and_then(|length| parse_u32(length).ok()) {
                    Some(length) if header.flags & NLM_F_CAPPED == 0 => (length as usize).checked_next_multiple_of(4),
                    _ => Some(HEADER_BYTES),
                };
                let tlvs = skip.and_then(|skip| echo.get(skip..)).unwrap_or_default();
                Answer::Refused(refusal.with_extended_ack(tlvs, request_in(sent, header.sequence_number)))
            }
        },
        // A dump that fails half-way says so here.
        NLMSG_DONE => match payload.get(..4).and_then(|code| parse_i32(code).ok()) {
            Some(code) if code < 0 => {
                Answer::Refused(Refusal::new(code.saturating_neg()).with_extended_ack(&payload[4..], None))
            }
            _ => Answer::Done,
        },
        _ => Answer::Data(payload),
    }))
}

/// The message of a datagram that bears a sequence number.
fn request_in(mut datagram: &[u8], sequence: u32) -> Option<&[u8]> {
    loop {
        let buffer = NetlinkBuffer::new_checked(&datagram).ok()?;
        let length = buffer.length() as usize;
        if buffer.sequence_number() == sequence {
            return datagram.get(..length);
        }
        datagram = datagram.get(length.next_multiple_of(4)..)?;
    }
}

pub(crate) fn decode<R: NetlinkDeserializable>(header: &NetlinkHeader, payload: &[u8]) -> Result<R, Error> {
    R::deserialize(header, payload).map_err(|error| Error::Decode(error.to_string().into()))
}

fn retry<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

#[cfg(test)]
mod tests;
