//! The netlink protocol without I/O: encodes requests into datagrams and decodes the kernel's replies. The synchronous
//! and the asynchronous socket only move bytes between this module and the kernel.

use std::io;
use std::ops::Range;

use netlink_packet_core::{
    Emitable, ErrorBuffer, NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR, NLMSG_NOOP, NLMSG_OVERRUN,
    NetlinkBuffer, NetlinkDeserializable, NetlinkHeader, NetlinkSerializable, parse_i32, parse_u32,
};

use crate::error::{Error, Refusal};

/// The maximum number of messages in one `send`.
///
/// The reply to a refused request takes about 770 bytes of receive buffer, and the default buffer (212,992 bytes) holds
/// 256 of them on Linux 6.1 and 6.18. With twice that number, replies are lost.
pub const BATCH_MESSAGES: usize = 128;

/// What a socket's receive buffer has for each reply to a batch: twice what a refusal takes.
pub(crate) const RECEIVE_BYTES_PER_REPLY: usize = 1664;

/// The kernel refuses a datagram larger than the send buffer with `EMSGSIZE`. The default buffer takes 143 KB.
pub(crate) const BATCH_BYTES: usize = 64 * 1024;

/// A datagram of a dump has at most 32 KiB, and less for a reader with a smaller buffer.
pub(crate) const RECEIVE_BYTES: usize = 64 * 1024;

pub(crate) const HEADER_BYTES: usize = 16;
pub(crate) const NLM_F_DUMP_INTR: u16 = 0x10;
pub(crate) const NLM_F_CAPPED: u16 = 0x100;
pub(crate) const NLM_F_ACK_TLVS: u16 = 0x200;

/// How often a dump is attempted while changes interrupt it.
pub(crate) const DUMP_ATTEMPTS: u32 = 16;

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

/// Counters of what a socket has sent since it was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Sent {
    /// Datagrams: one for each request, dump, part of a batch, or transaction.
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

/// Encodes datagrams and keeps the last one, since refusals refer to its content.
#[derive(Debug)]
pub(crate) struct Outgoing {
    pub(crate) sequence: u32,
    datagram: Vec<u8>,
    sent: Sent,
    /// How many messages of a batch go into one datagram, at most.
    batch_messages: usize,
}

impl Outgoing {
    /// For a socket with a receive buffer of this size.
    pub(crate) fn new(receive_buffer: usize) -> Self {
        let batch_messages = (receive_buffer / RECEIVE_BYTES_PER_REPLY).clamp(1, BATCH_MESSAGES);
        Self { sequence: 0, datagram: Vec::new(), sent: Sent::default(), batch_messages }
    }

    /// The datagram to send.
    pub(crate) fn datagram(&self) -> &[u8] {
        &self.datagram
    }

    /// Counters of what was sent so far.
    pub(crate) fn sent(&self) -> Sent {
        self.sent
    }

    /// Counts the datagram as sent.
    pub(crate) fn count(&mut self, bytes: usize) {
        self.sent.datagrams += 1;
        self.sent.bytes += bytes as u64;
    }

    /// Encodes one request.
    pub(crate) fn request<M: NetlinkSerializable>(&mut self, request: &Request<M>) -> PendingRequest {
        self.datagram.clear();
        PendingRequest { sequence: self.push(&request.message, request.flags | NLM_F_ACK) }
    }

    /// Encodes a request for a dump.
    pub(crate) fn dump<M: NetlinkSerializable>(&mut self, message: &M) -> PendingDump {
        self.datagram.clear();
        PendingDump {
            sequence: self.push(message, NLM_F_DUMP),
            filled: 0,
            read: 0,
            is_interrupted: false,
            is_done: false,
        }
    }

    /// Encodes the next part of a batch and appends an `Ok` for each of its requests to `results`, which a refusal
    /// replaces. `None` where no request is left.
    pub(crate) fn batch<M: NetlinkSerializable>(
        &mut self,
        requests: &mut impl Iterator<Item = Request<M>>,
        results: &mut Vec<Result<(), Refusal>>,
    ) -> Option<PendingBatch> {
        self.datagram.clear();
        let first = results.len();
        let first_sequence = self.sequence.wrapping_add(1);
        let mut last_start = 0;
        while results.len() - first < self.batch_messages && self.datagram.len() < BATCH_BYTES {
            let Some(request) = requests.next() else { break };
            last_start = self.datagram.len();
            self.push(&request.message, request.flags);
            results.push(Ok(()));
        }
        self.acknowledge(last_start);
        let count = results.len() - first;
        let bytes = 0..self.datagram.len();
        (count > 0).then_some(PendingBatch { first, first_sequence, count, answered: 0, bytes })
    }

    /// The bytes of a part of the batch.
    pub(crate) fn part(&self, batch: &PendingBatch) -> &[u8] {
        self.datagram.get(batch.bytes.clone()).unwrap_or_default()
    }

    /// Splits a part that the kernel finds too large into two, and makes later ones as small. `Err` if it is one message.
    pub(crate) fn halve(&mut self, batch: PendingBatch) -> Result<[PendingBatch; 2], PendingBatch> {
        let count = batch.count / 2;
        if count == 0 {
            return Err(batch);
        }
        self.batch_messages = self.batch_messages.min(count);
        let (mut last_start, mut middle) = (batch.bytes.start, batch.bytes.start);
        for _ in 0..count {
            let Some(message) = self.datagram.get(middle..middle + HEADER_BYTES) else { return Err(batch) };
            last_start = middle;
            middle += (NetlinkBuffer::new(message).length() as usize).next_multiple_of(4);
        }
        self.acknowledge(last_start);
        let PendingBatch { first, first_sequence, bytes, .. } = batch;
        let skipped = u32::try_from(count).unwrap_or(u32::MAX);
        Ok([
            PendingBatch { first, first_sequence, count, answered: 0, bytes: bytes.start..middle },
            PendingBatch {
                first: first + count,
                first_sequence: first_sequence.wrapping_add(skipped),
                count: batch.count - count,
                answered: 0,
                bytes: middle..bytes.end,
            },
        ])
    }

    /// Encodes a transaction. `None` if there are no requests.
    pub(crate) fn transaction<M: NetlinkSerializable>(
        &mut self,
        begin: &M,
        requests: impl IntoIterator<Item = Request<M>>,
        end: &M,
    ) -> Option<PendingTransaction> {
        self.datagram.clear();
        let begin_sequence = self.push(begin, 0);
        let mut count = 0;
        let mut last_start = 0;
        for request in requests {
            last_start = self.datagram.len();
            self.push(&request.message, request.flags);
            count += 1;
        }
        self.acknowledge(last_start);
        self.push(end, 0);
        (count > 0).then_some(PendingTransaction { begin_sequence, count, refused: None, is_acknowledged: false })
    }

    /// Appends a message to the datagram and returns its sequence number.
    fn push<M: NetlinkSerializable>(&mut self, message: &M, flags: u16) -> u32 {
        self.sequence = self.sequence.wrapping_add(1);
        self.sent.messages += 1;
        let start = self.datagram.len();
        let length = HEADER_BYTES + message.buffer_len();
        self.datagram.resize(start + length.next_multiple_of(4), 0);
        let mut header = NetlinkHeader::default();
        header.length = u32::try_from(length).unwrap_or(u32::MAX);
        header.message_type = message.message_type();
        header.flags = NLM_F_REQUEST | flags;
        header.sequence_number = self.sequence;
        header.emit(&mut self.datagram[start..start + HEADER_BYTES]);
        message.serialize(&mut self.datagram[start + HEADER_BYTES..start + length]);
        self.sequence
    }

    /// Sets `NLM_F_ACK` on the message that starts at `start`.
    fn acknowledge(&mut self, start: usize) {
        if let Some(message) = self.datagram.get_mut(start..start + HEADER_BYTES) {
            let mut buffer = NetlinkBuffer::new(message);
            let flags = buffer.flags() | NLM_F_ACK;
            buffer.set_flags(flags);
        }
    }
}

/// A request whose reply is being read.
#[derive(Debug)]
pub(crate) struct PendingRequest {
    sequence: u32,
}

impl PendingRequest {
    /// Reads a datagram. Returns whether the kernel has acknowledged.
    pub(crate) fn receive<R: NetlinkDeserializable>(
        &self,
        outgoing: &Outgoing,
        mut datagram: &[u8],
        each: &mut impl FnMut(R),
    ) -> Result<bool, Error> {
        while let Some((header, reply)) = next_reply(&mut datagram, outgoing.datagram())? {
            if header.sequence_number != self.sequence {
                continue;
            }
            match reply {
                Reply::Acknowledged | Reply::Done => return Ok(true),
                Reply::Refused(refusal) => return Err(refusal.into()),
                Reply::Data(payload) => each(decode(&header, payload)?),
            }
        }
        Ok(false)
    }
}

/// A dump that is being read.
#[derive(Debug)]
pub(crate) struct PendingDump {
    sequence: u32,
    /// How many bytes of the buffer the last datagram fills, and how many of them were read.
    filled: usize,
    read: usize,
    is_interrupted: bool,
    is_done: bool,
}

impl PendingDump {
    /// Whether the kernel has set `NLM_F_DUMP_INTR`.
    pub(crate) fn is_interrupted(&self) -> bool {
        self.is_interrupted
    }

    /// Whether the dump has ended.
    pub(crate) fn is_done(&self) -> bool {
        self.is_done
    }

    /// Ends the dump after an error of the socket.
    pub(crate) fn abort(&mut self) {
        self.is_done = true;
    }

    /// Notes that a datagram of this length is at the start of the buffer.
    pub(crate) fn received(&mut self, length: usize) {
        (self.filled, self.read) = (length, 0);
    }

    /// The next message in the buffer. `None` where another datagram is needed or the dump is done. After an error the
    /// rest can still be read.
    pub(crate) fn next<R: NetlinkDeserializable>(
        &mut self,
        outgoing: &Outgoing,
        buffer: &[u8],
    ) -> Result<Option<R>, Error> {
        let mut rest = buffer.get(self.read..self.filled).unwrap_or_default();
        let next = self.next_in(outgoing, &mut rest);
        self.read = self.filled - rest.len();
        next
    }

    fn next_in<R: NetlinkDeserializable>(
        &mut self,
        outgoing: &Outgoing,
        datagram: &mut &[u8],
    ) -> Result<Option<R>, Error> {
        while !self.is_done {
            let Some((header, reply)) = next_reply(datagram, outgoing.datagram())? else { break };
            if header.sequence_number != self.sequence {
                continue;
            }
            // After a change behind the last entry, only NLMSG_DONE has the flag.
            self.is_interrupted |= header.flags & NLM_F_DUMP_INTR != 0;
            match reply {
                Reply::Acknowledged => {}
                Reply::Done => self.is_done = true,
                Reply::Refused(refusal) => {
                    self.is_done = true;
                    return Err(refusal.into());
                }
                Reply::Data(payload) => return decode(&header, payload).map(Some),
            }
        }
        Ok(None)
    }
}

/// A part of a batch whose replies are being read.
#[derive(Debug)]
pub(crate) struct PendingBatch {
    first: usize,
    first_sequence: u32,
    count: usize,
    /// How many requests have their result: those up to the last one that was answered, since replies come in order.
    answered: usize,
    /// Where it is in the datagram.
    bytes: Range<usize>,
}

impl PendingBatch {
    /// Reads a datagram and stores each refusal at the index of its request. Returns whether the last request has its
    /// reply.
    pub(crate) fn receive(
        &mut self,
        outgoing: &Outgoing,
        mut datagram: &[u8],
        results: &mut [Result<(), Refusal>],
    ) -> Result<bool, Error> {
        while let Some((header, reply)) = next_reply(&mut datagram, outgoing.datagram())? {
            let index = header.sequence_number.wrapping_sub(self.first_sequence) as usize;
            if index >= self.count {
                continue;
            }
            self.answered = self.answered.max(index + 1);
            match reply {
                Reply::Refused(refusal) => {
                    if let Some(result) = results.get_mut(self.first + index) {
                        *result = Err(refusal);
                    }
                }
                // Requests that return data are not for batches: the data is ignored.
                Reply::Data(_) => continue,
                Reply::Acknowledged | Reply::Done => {}
            }
            if index + 1 == self.count {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

impl PendingBatch {
    /// Sets the result of the last request, for which no reply came.
    pub(crate) fn refuse_last(&self, refusal: Refusal, results: &mut [Result<(), Refusal>]) {
        if let Some(last) = results.get_mut(self.first + self.count - 1) {
            *last = Err(refusal);
        }
    }

    /// What is known of the batch when an error ends it here.
    pub(crate) fn end(&self, mut results: Vec<Result<(), Refusal>>, error: Error) -> PartialBatch {
        results.truncate(self.first + self.answered);
        let is_unsent = matches!(error, Error::Send(_));
        PartialBatch { results, in_doubt: if is_unsent { 0 } else { self.count - self.answered }, error }
    }
}

/// What is known of a batch that an error of the socket has ended.
#[derive(Debug)]
#[non_exhaustive]
pub struct PartialBatch {
    /// The results of the first requests.
    pub results: Vec<Result<(), Refusal>>,
    /// The number of requests after those that were sent and may or may not have been handled. The rest was not sent.
    pub in_doubt: usize,
    /// Why the batch ended.
    pub error: Error,
}

impl PartialBatch {
    /// For tests of what is made of it.
    pub const fn new(results: Vec<Result<(), Refusal>>, in_doubt: usize, error: Error) -> Self {
        Self { results, in_doubt, error }
    }
}

impl std::fmt::Display for PartialBatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { results, in_doubt, error } = self;
        write!(f, "{error} (after {} results; {in_doubt} requests may have been handled)", results.len())
    }
}

impl std::error::Error for PartialBatch {}

/// A transaction whose replies are being read. No reply is known to be the last one: for a transaction that is refused
/// as a whole, the kernel sends no ACK.
#[derive(Debug)]
pub(crate) struct PendingTransaction {
    begin_sequence: u32,
    count: usize,
    refused: Option<(usize, Refusal)>,
    is_acknowledged: bool,
}

impl PendingTransaction {
    pub(crate) fn receive(&mut self, outgoing: &Outgoing, mut datagram: &[u8]) -> Result<(), Error> {
        while let Some((header, reply)) = next_reply(&mut datagram, outgoing.datagram())? {
            let index = header.sequence_number.wrapping_sub(self.begin_sequence) as usize;
            match reply {
                Reply::Refused(refusal) if index <= self.count => {
                    self.refused.get_or_insert((index.saturating_sub(1), refusal));
                }
                Reply::Acknowledged => self.is_acknowledged |= index == self.count,
                _ => {}
            }
        }
        Ok(())
    }

    /// The result once the queue is empty. `is_complete` is false if replies were lost: only refusals are that many.
    pub(crate) fn result(self, is_complete: bool) -> Result<(), (usize, Refusal)> {
        match self.refused {
            Some(refused) => Err(refused),
            None if self.is_acknowledged && is_complete => Ok(()),
            None => Err((0, Refusal::new(libc::ENOBUFS))),
        }
    }
}

/// A received message, as the reply to a request.
#[derive(Debug)]
pub(crate) enum Reply<'a> {
    Acknowledged,
    Refused(Refusal),
    Done,
    Data(&'a [u8]),
}

/// Removes the first reply from a datagram, skipping `NLMSG_NOOP`. After a malformed message the datagram is empty.
fn next_reply<'a>(datagram: &mut &'a [u8], sent: &[u8]) -> Result<Option<(NetlinkHeader, Reply<'a>)>, Error> {
    while let Some((header, payload)) = next_message(datagram).inspect_err(|_| *datagram = &[])? {
        if let Some(reply) = parse_reply(&header, payload, sent)? {
            return Ok(Some((header, reply)));
        }
    }
    Ok(None)
}

/// Removes the first message from a datagram.
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

/// Parses one message; `None` for `NLMSG_NOOP`.
pub(crate) fn parse_reply<'a>(
    header: &NetlinkHeader,
    payload: &'a [u8],
    sent: &[u8],
) -> Result<Option<Reply<'a>>, Error> {
    Ok(Some(match header.message_type {
        NLMSG_NOOP => return Ok(None),
        NLMSG_OVERRUN => return Err(Error::Receive(io::Error::from_raw_os_error(libc::ENOBUFS))),
        NLMSG_ERROR => match ErrorBuffer::new_checked(payload)?.code() {
            None => Reply::Acknowledged,
            Some(code) => {
                let refusal = Refusal::new(code.get().saturating_neg());
                if header.flags & NLM_F_ACK_TLVS == 0 {
                    return Ok(Some(Reply::Refused(refusal)));
                }
                // The request's header is echoed, and its payload too unless the ACK is capped; then come the TLVs.
                let echo = &payload[4..];
                let skip = match echo.get(..4).and_then(|length| parse_u32(length).ok()) {
                    Some(length) if header.flags & NLM_F_CAPPED == 0 => (length as usize).checked_next_multiple_of(4),
                    _ => Some(HEADER_BYTES),
                };
                let tlvs = skip.and_then(|skip| echo.get(skip..)).unwrap_or_default();
                Reply::Refused(refusal.with_extended_ack(tlvs, request_in(sent, header.sequence_number)))
            }
        },
        // A dump that fails half-way reports the error here.
        NLMSG_DONE => match payload.get(..4).and_then(|code| parse_i32(code).ok()) {
            Some(code) if code < 0 => {
                Reply::Refused(Refusal::new(code.saturating_neg()).with_extended_ack(&payload[4..], None))
            }
            _ => Reply::Done,
        },
        _ => Reply::Data(payload),
    }))
}

/// The message in a datagram that has this sequence number.
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
