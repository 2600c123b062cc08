//! Entry points for fuzz targets: parse a datagram as the reply to each kind of request.

use netlink_packet_core::{NetlinkDeserializable, NetlinkHeader, NetlinkSerializable};

use crate::exchange::{Outgoing, Request};

/// A request with a payload of eight bytes.
struct TestRequest;

impl NetlinkSerializable for TestRequest {
    fn message_type(&self) -> u16 {
        16
    }

    fn buffer_len(&self) -> usize {
        8
    }

    fn serialize(&self, buffer: &mut [u8]) {
        buffer.fill(0);
    }
}

/// A reply of any content, decoded to its length.
struct Length(usize);

impl NetlinkDeserializable for Length {
    type Error = std::convert::Infallible;

    fn deserialize(_: &NetlinkHeader, payload: &[u8]) -> Result<Self, Self::Error> {
        Ok(Self(payload.len()))
    }
}

/// Parses a datagram as the reply to a request, a dump, a batch and a transaction, whose sequence numbers start at 1.
/// Panics if more was read than the datagram has.
pub fn read(datagram: &[u8]) {
    let mut total = 0;
    let mut outgoing = Outgoing::new(usize::MAX);
    let pending = outgoing.request(&TestRequest.into());
    let _ =
        pending.receive(&outgoing, datagram, &mut |Length(length)| total += length).map_err(|error| error.to_string());
    assert!(total <= datagram.len(), "{total} bytes of replies in {}", datagram.len());

    let mut outgoing = Outgoing::new(usize::MAX);
    let mut pending = outgoing.dump(&TestRequest);
    pending.received(datagram.len());
    // Each error consumes at least one message.
    for left in (0..=datagram.len()).rev() {
        match pending.next::<Length>(&outgoing, datagram) {
            Ok(None) => break,
            Ok(Some(_)) => {}
            Err(error) => drop(error.to_string()),
        }
        assert!(left > 0, "reading the replies does not end");
    }

    let requests = || std::iter::repeat_with(|| Request::from(TestRequest)).take(3);
    let (mut outgoing, mut results) = (Outgoing::new(usize::MAX), Vec::new());
    if let Some(mut pending) = outgoing.batch(&mut requests(), &mut results) {
        let _ = pending.receive(&outgoing, datagram, &mut results).map_err(|error| error.to_string());
    }
    results.into_iter().filter_map(Result::err).for_each(|refusal| drop(refusal.to_string()));

    let mut outgoing = Outgoing::new(usize::MAX);
    if let Some(mut transaction) = outgoing.transaction(&TestRequest, requests(), &TestRequest) {
        let _ = transaction.receive(&outgoing, datagram).map_err(|error| error.to_string());
        if let Err((index, _)) = transaction.result(true) {
            assert!(index < 3, "request {index} of 3");
        }
    }
}
