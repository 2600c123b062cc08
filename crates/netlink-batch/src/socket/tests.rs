//! Replies that a real kernel cannot be made to give: crafted bytes, and a second socket of this process as the kernel.

use std::thread;
use std::time::Duration;

use netlink_packet_core::{
    DecodeError, Emitable, NLM_F_ACK, NLM_F_DUMP, NLM_F_MULTIPART, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR, NLMSG_NOOP,
    NLMSG_OVERRUN, NetlinkBuffer, NetlinkHeader, emit_i32,
};
use netlink_sys::protocols::{NETLINK_ROUTE, NETLINK_USERSOCK};
use proptest::prelude::*;
use rustix::net::sockopt::set_socket_timeout;

use super::*;
use crate::exchange::{
    BATCH_MESSAGES, HEADER_BYTES, NLM_F_ACK_TLVS, NLM_F_CAPPED, NLM_F_DUMP_INTR, Reply, next_message, parse_reply,
};

const KIND: u16 = 0x20;

/// A message of any content; as a reply it can be decoded unless it is empty.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Bytes(Vec<u8>);

impl NetlinkSerializable for Bytes {
    fn message_type(&self) -> u16 {
        KIND
    }

    fn buffer_len(&self) -> usize {
        self.0.len()
    }

    fn serialize(&self, buffer: &mut [u8]) {
        buffer.copy_from_slice(&self.0);
    }
}

impl NetlinkDeserializable for Bytes {
    type Error = DecodeError;

    fn deserialize(_: &NetlinkHeader, payload: &[u8]) -> Result<Self, DecodeError> {
        if payload.is_empty() { Err("empty".into()) } else { Ok(Self(payload.to_vec())) }
    }
}

fn message(kind: u16, flags: u16, sequence: u32, payload: &[u8]) -> Vec<u8> {
    let mut header = NetlinkHeader::default();
    header.length = u32::try_from(HEADER_BYTES + payload.len()).unwrap();
    header.message_type = kind;
    header.flags = flags;
    header.sequence_number = sequence;
    let mut bytes = vec![0; HEADER_BYTES];
    header.emit(&mut bytes);
    bytes.extend_from_slice(payload);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

fn data(sequence: u32, content: &[u8]) -> Vec<u8> {
    message(KIND, NLM_F_MULTIPART, sequence, content)
}

fn done(flags: u16, sequence: u32) -> Vec<u8> {
    message(NLMSG_DONE, NLM_F_MULTIPART | flags, sequence, &[0; 4])
}

/// An ACK or a refusal of the request, capped to the request's header, with TLVs.
fn error(request: &[u8], errno: i32, tlvs: &[u8]) -> Vec<u8> {
    let mut payload = vec![0; 4];
    emit_i32(&mut payload, -errno).unwrap();
    payload.extend_from_slice(&request[..HEADER_BYTES]);
    payload.extend_from_slice(tlvs);
    let flags = NLM_F_CAPPED | if tlvs.is_empty() { 0 } else { NLM_F_ACK_TLVS };
    message(NLMSG_ERROR, flags, sequence_of(request), &payload)
}

fn sequence_of(request: &[u8]) -> u32 {
    NetlinkBuffer::new(request).sequence_number()
}

/// Makes the datagrams that reply to one.
type AnswerFn = fn(&[u8]) -> Vec<Vec<u8>>;

/// A socket whose fake kernel replies to each datagram with the next function of the script.
fn fake_kernel<const N: usize>(script: [AnswerFn; N]) -> Socket {
    let open = || {
        let mut socket = RawSocket::new(NETLINK_USERSOCK).unwrap();
        let address = socket.bind_auto().unwrap();
        (socket, address)
    };
    let ((raw, address), (kernel, kernel_address)) = (open(), open());
    raw.connect(&kernel_address).unwrap();
    // A fake kernel whose assertions fail stops replying.
    set_receive_timeout(&raw);
    thread::spawn(move || {
        for replies in script {
            let mut request = vec![0; 2 * BATCH_BYTES];
            let length = kernel.recv(&mut &mut request[..], 0).unwrap();
            for datagram in replies(&request[..length]) {
                kernel.send_to(&datagram, &address, 0).unwrap();
            }
        }
    });
    Socket::of(raw)
}

/// Makes a test fail that would otherwise wait for ever.
fn set_receive_timeout(raw: &RawSocket) {
    set_socket_timeout(raw, Timeout::Recv, Some(Duration::from_secs(10))).unwrap();
}

fn dump(socket: &mut Socket) -> Result<Vec<u8>, Error> {
    let mut seen = Vec::new();
    socket.dump(&Bytes(Vec::new()), |reply: Bytes| seen.extend(reply.0))?;
    Ok(seen)
}

#[test]
fn a_dump_of_several_datagrams_is_complete_and_in_order() {
    let mut socket = fake_kernel([|request| {
        let sequence = sequence_of(request);
        assert_eq!(NetlinkBuffer::new(request).flags(), NLM_F_REQUEST | NLM_F_DUMP);
        let first = [data(sequence, &[1]), data(sequence, &[2, 3])].concat();
        vec![first, data(sequence, &[4]), done(0, sequence)]
    }]);
    assert_eq!(dump(&mut socket).unwrap(), [1, 2, 3, 4]);
}

#[test]
fn an_empty_dump_is_not_an_error() {
    let mut socket = fake_kernel([|request| vec![done(0, sequence_of(request))]]);
    assert_eq!(dump(&mut socket).unwrap(), []);
}

#[test]
fn an_interrupted_dump_is_repeated_until_it_is_consistent() {
    let mut socket = fake_kernel([
        |request| {
            let sequence = sequence_of(request);
            let interrupted = message(KIND, NLM_F_MULTIPART | NLM_F_DUMP_INTR, sequence, &[2]);
            vec![data(sequence, &[1]), interrupted, done(0, sequence)]
        },
        // The change came after the last entry: only the end says so.
        |request| vec![data(sequence_of(request), &[3]), done(NLM_F_DUMP_INTR, sequence_of(request))],
        |request| vec![data(sequence_of(request), &[4]), done(0, sequence_of(request))],
    ]);
    assert_eq!(dump(&mut socket).unwrap(), [4]);
}

#[test]
fn a_dump_that_is_always_interrupted_fails() {
    fn interrupted(request: &[u8]) -> Vec<Vec<u8>> {
        vec![done(NLM_F_DUMP_INTR, sequence_of(request))]
    }
    let mut socket = fake_kernel([interrupted; DUMP_ATTEMPTS as usize]);
    let error = dump(&mut socket).unwrap_err();
    assert!(matches!(error, Error::Interrupted { attempts: DUMP_ATTEMPTS }), "{error}");
}

#[test]
fn a_dump_that_fails_half_way_is_a_refusal_with_the_kernels_message() {
    let mut socket = fake_kernel([|request| {
        let sequence = sequence_of(request);
        let mut end = (-libc::EMSGSIZE).to_ne_bytes().to_vec();
        end.extend_from_slice(&[8, 0, 1, 0]);
        end.extend_from_slice(b"big\0");
        vec![data(sequence, &[1]), message(NLMSG_DONE, NLM_F_MULTIPART | NLM_F_ACK_TLVS, sequence, &end)]
    }]);
    let error = dump(&mut socket).unwrap_err();
    assert_eq!(error.to_string(), "Message too long (os error 90): big");
    assert_eq!(error.refusal().unwrap().errno, libc::EMSGSIZE);
}

#[test]
fn an_undecodable_reply_fails_its_dump_but_not_the_next() {
    let mut socket = fake_kernel([
        |request| {
            let sequence = sequence_of(request);
            vec![data(sequence, &[]), data(sequence, &[1]), done(0, sequence)]
        },
        |request| vec![data(sequence_of(request), &[2]), done(0, sequence_of(request))],
    ]);
    let error = dump(&mut socket).unwrap_err();
    assert_eq!(error.to_string(), "cannot decode a reply of the kernel: empty");
    assert_eq!(dump(&mut socket).unwrap(), [2]);
}

#[test]
fn replies_to_earlier_requests_are_skipped() {
    let mut socket = fake_kernel([|request| {
        let sequence = sequence_of(request);
        let mut earlier = request.to_vec();
        NetlinkBuffer::new(&mut earlier).set_sequence_number(sequence - 1);
        vec![
            [error(&earlier, libc::EPERM, &[]), data(sequence - 1, &[1])].concat(),
            [message(NLMSG_NOOP, 0, sequence, &[]), data(sequence, &[2]), error(request, 0, &[])].concat(),
        ]
    }]);
    socket.outgoing.sequence = 7;
    let mut seen = Vec::new();
    socket.request(&Bytes(vec![9]).into(), |reply: Bytes| seen.extend(reply.0)).unwrap();
    assert_eq!(seen, [2]);
}

#[test]
fn lost_replies_are_an_error() {
    let mut socket = fake_kernel([|request| vec![message(NLMSG_OVERRUN, 0, sequence_of(request), &[])]]);
    let error = socket.request(&Bytes(vec![9]).into(), |_: Bytes| ()).unwrap_err();
    assert!(matches!(&error, Error::Receive(error) if error.raw_os_error() == Some(libc::ENOBUFS)), "{error}");
}

#[test]
fn the_socket_works_after_a_receive_buffer_overrun() {
    let mut socket = Socket::open(NETLINK_ROUTE).unwrap();
    set_receive_timeout(&socket.raw);
    socket.raw.set_rx_buf_sz(4096_u32).unwrap();
    // Refused with and without privileges: a new routing rule of no family.
    let refused = || Request::from(Bytes(vec![0]));
    let error = socket.batch((0..BATCH_MESSAGES).map(|_| refused())).unwrap_err();
    assert!(matches!(&error, Error::Receive(error) if error.raw_os_error() == Some(libc::ENOBUFS)), "{error}");
    for _ in 0..3 {
        let error = socket.request(&refused(), |_: Bytes| ()).unwrap_err();
        assert!(error.refusal().is_some(), "{error}");
    }
}

/// A socket with buffers of these sizes, which the kernel doubles, and rounds up to a few KiB.
fn small(receive: usize, send: usize) -> Socket {
    let raw = open(NETLINK_ROUTE).unwrap();
    sockopt::set_socket_recv_buffer_size(&raw, receive).unwrap();
    sockopt::set_socket_send_buffer_size(&raw, send).unwrap();
    set_receive_timeout(&raw);
    Socket::of(raw)
}

#[test]
fn batches_adapt_to_small_buffers() {
    let refused = || Request::from(Bytes(vec![0; 200]));
    for (receive, send) in [(0, 0), (0, 100_000), (100_000, 0), (2000, 2000), (10_000, 5000), (50_000, 30_000)] {
        let mut socket = small(receive, send);
        for length in [1, 2, 3, BATCH_MESSAGES, 5 * BATCH_MESSAGES + 1] {
            let results = socket.batch((0..length).map(|_| refused())).unwrap();
            assert!(results.len() == length && results.iter().all(Result::is_err), "{receive} {send}");
        }
    }
}

#[test]
fn a_message_larger_than_the_send_buffer_is_refused_alone() {
    let mut socket = small(100_000, 0);
    let lengths = [200, 200, 100_000, 200, 100_000];
    let results = socket.batch(lengths.map(|length| Request::from(Bytes(vec![0; length])))).unwrap();
    let is_too_large = results.iter().map(|result| result.as_ref().unwrap_err().errno == libc::EMSGSIZE);
    assert_eq!(is_too_large.collect::<Vec<_>>(), [false, false, true, false, true]);
}

#[test]
fn a_failed_batch_tells_what_is_known_of_it() {
    fn acknowledge(mut datagram: &[u8]) -> Vec<Vec<u8>> {
        let mut last = 0;
        while let Some((header, _)) = next_message(&mut datagram).unwrap() {
            last = header.sequence_number;
        }
        vec![error(&message(KIND, 0, last, &[]), 0, &[])]
    }
    // Of the second datagram, two replies arrive and the others are lost.
    let mut socket = fake_kernel([acknowledge, |datagram| {
        let first = sequence_of(datagram);
        let reply = error(&message(KIND, 0, first + 2, &[]), libc::EPERM, &[]);
        vec![reply, message(NLMSG_OVERRUN, 0, first, &[])]
    }]);
    let requests = || (0..3 * BATCH_MESSAGES).map(|_| Request::from(Bytes(vec![1])));
    let partial = socket.batch_partial(requests()).unwrap_err();
    assert_eq!((partial.results.len(), partial.in_doubt), (BATCH_MESSAGES + 3, BATCH_MESSAGES - 3));
    assert_eq!(partial.results.iter().position(Result::is_err), Some(BATCH_MESSAGES + 2));
    assert!(
        matches!(&partial.error, Error::Receive(error) if error.raw_os_error() == Some(libc::ENOBUFS)),
        "{partial}"
    );

    // Nobody takes what is sent.
    let mut raw = RawSocket::new(NETLINK_USERSOCK).unwrap();
    raw.bind_auto().unwrap();
    raw.connect(&SocketAddr::new(0x7fff_ff00, 0)).unwrap();
    let partial = Socket::of(raw).batch_partial(requests()).unwrap_err();
    assert_eq!((partial.results.len(), partial.in_doubt), (0, 0));
    assert!(matches!(&partial.error, Error::Send(_)), "{partial}");
}

#[test]
fn replies_that_were_not_read_are_discarded_before_the_next_send() {
    let mut socket = Socket::open(NETLINK_ROUTE).unwrap();
    set_receive_timeout(&socket.raw);
    let refused = || Request::from(Bytes(vec![0]));
    let batch = |socket: &mut Socket| socket.batch((0..BATCH_MESSAGES).map(|_| refused()));
    for _ in 0..4 {
        // What is left of a batch whose replies could not be read.
        let mut requests = (0..BATCH_MESSAGES).map(|_| refused());
        socket.outgoing.batch(&mut requests, &mut Vec::new()).unwrap();
        socket.send().unwrap();
    }
    assert!(batch(&mut socket).unwrap().iter().all(Result::is_err));
}

#[test]
fn a_batch_requests_one_ack_and_matches_refusals_to_requests() {
    let mut socket = fake_kernel([|mut datagram| {
        let mut replies = Vec::new();
        let mut requests = Vec::new();
        while let Some((header, payload)) = next_message(&mut datagram).unwrap() {
            requests.push(message(header.message_type, header.flags, header.sequence_number, payload));
        }
        let flags = requests.iter().map(|request| NetlinkBuffer::new(request).flags());
        assert_eq!(flags.collect::<Vec<_>>(), [NLM_F_REQUEST, NLM_F_REQUEST | 0x400, NLM_F_REQUEST | NLM_F_ACK]);
        // The second message, padded to 4 bytes, has its attribute 9 at offset 16.
        let offset = [8, 0, 2, 0, 16, 0, 0, 0];
        replies.push(error(&requests[1], libc::EINVAL, &offset));
        replies.push([data(sequence_of(&requests[2]), &[1]), error(&requests[2], 0, &[])].concat());
        replies
    }]);
    // Sequence numbers wrap around within the batch.
    socket.outgoing.sequence = u32::MAX - 1;
    let second = Request { message: Bytes(vec![5, 0, 9, 0x80, 1]), flags: 0x400 };
    let results = socket.batch([Bytes(vec![1, 2]).into(), second, Bytes(vec![3]).into()]).unwrap();
    assert_eq!(results[0], Ok(()));
    assert_eq!(results[1].as_ref().unwrap_err().to_string(), "Invalid argument (os error 22) (attribute 9)");
    assert_eq!(results[2], Ok(()));
}

#[test]
fn a_batch_is_split_by_message_count_and_size() {
    fn count<const MESSAGES: usize>(mut datagram: &[u8]) -> Vec<Vec<u8>> {
        let (mut count, mut last) = (0, 0);
        assert!(datagram.len() <= BATCH_BYTES + 40_016);
        while let Some((header, _)) = next_message(&mut datagram).unwrap() {
            (count, last) = (count + 1, header.sequence_number);
        }
        assert_eq!(count, MESSAGES);
        vec![error(&message(KIND, 0, last, &[]), 0, &[])]
    }
    let small = Bytes(vec![1; 5]);
    let mut socket = fake_kernel([count::<128>, count::<1>]);
    assert_eq!(socket.batch(vec![small.into(); BATCH_MESSAGES + 1]).unwrap().len(), 129);
    let large = Bytes(vec![1; 40_000]);
    let mut socket = fake_kernel([count::<2>, count::<1>]);
    assert_eq!(socket.batch(vec![large.into(); 3]).unwrap().len(), 3);
    assert_eq!(socket.batch(Vec::<Request<Bytes>>::new()).unwrap(), []);
}

/// A kernel without `NETLINK_CAP_ACK` echoes the whole request.
#[test]
fn an_extended_ack_is_found_after_an_echo_of_the_whole_request() {
    let request = message(KIND, NLM_F_REQUEST, 3, &[0, 0, 0, 0, 1]);
    let mut payload = (-libc::EINVAL).to_ne_bytes().to_vec();
    payload.extend_from_slice(&request);
    payload.extend([7_u16.to_ne_bytes(), 1_u16.to_ne_bytes()].concat());
    payload.extend_from_slice(b"no\0\0");
    let bytes = message(NLMSG_ERROR, NLM_F_ACK_TLVS, 3, &payload);
    let (header, payload) = next_message(&mut &bytes[..]).unwrap().unwrap();
    let Some(Reply::Refused(refusal)) = parse_reply(&header, payload, &request).unwrap() else { panic!("not refused") };
    assert_eq!(refusal.message.as_deref(), Some("no"));
}

#[test]
fn malformed_datagrams_are_errors() {
    let valid = message(KIND, 0, 1, &[1, 2, 3, 4]);
    for length in [0, 1, 15, 21, u32::MAX] {
        let mut bytes = valid.clone();
        bytes[..4].copy_from_slice(&length.to_ne_bytes());
        assert!(next_message(&mut &bytes[..]).is_err(), "a length of {length}");
    }
    for end in 1..valid.len() {
        assert!(next_message(&mut &valid[..end]).is_err(), "{end} bytes");
    }
    assert!(next_message(&mut &[][..]).unwrap().is_none());
    // NLMSG_ERROR needs an error code.
    let mut header = NetlinkHeader::default();
    header.message_type = NLMSG_ERROR;
    assert!(parse_reply(&header, &[0; 3], &[]).is_err());
}

#[test]
fn the_last_message_of_a_datagram_needs_no_padding() {
    let mut bytes = message(KIND, 0, 1, &[1]);
    bytes.truncate(HEADER_BYTES + 1);
    let mut rest = &bytes[..];
    assert_eq!(next_message(&mut rest).unwrap().unwrap().1, [1]);
    assert_eq!(rest, []);
}

/// Reads a datagram as the exchanges do.
fn read_all(mut datagram: &[u8], sent: &[u8]) {
    let mut left = datagram.len();
    while let Ok(Some((header, payload))) = next_message(&mut datagram) {
        assert!(datagram.len() < left, "reading does not end");
        left = datagram.len();
        let _ = parse_reply(&header, payload, sent);
    }
}

proptest! {
    #[test]
    fn arbitrary_bytes_do_not_panic(
        datagram in proptest::collection::vec(any::<u8>(), 0..200),
        sent in proptest::collection::vec(any::<u8>(), 0..200),
    ) {
        read_all(&datagram, &sent);
    }

    /// Bytes that pass the first checks: replies of all kinds with some bytes changed.
    #[test]
    fn damaged_replies_do_not_panic(
        kind in prop_oneof![Just(NLMSG_ERROR), Just(NLMSG_DONE), Just(NLMSG_NOOP), any::<u16>()],
        flags in any::<u16>(),
        payload in proptest::collection::vec(any::<u8>(), 0..60),
        changes in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 0..4),
    ) {
        let sent = message(KIND, NLM_F_REQUEST, 1, &[8, 0, 7, 0, 1, 2, 3, 4]);
        let mut bytes = [message(kind, flags, 1, &payload), error(&sent, libc::EINVAL, &[8, 0, 2, 0, 16, 0, 0, 0])].concat();
        for (index, value) in changes {
            let index = index.index(bytes.len());
            bytes[index] = value;
        }
        read_all(&bytes, &sent);
    }
}
