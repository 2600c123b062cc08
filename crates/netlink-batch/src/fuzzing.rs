//! What a fuzz target sees of the inside: a datagram from the kernel, read as the answer to whatever may have been asked.

use netlink_packet_core::{NetlinkDeserializable, NetlinkHeader, NetlinkSerializable};

use crate::exchange::{Outgoing, Request};

/// A request of a few bytes.
struct Question;

impl NetlinkSerializable for Question {
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

/// An answer of whatever kind: how long it is.
struct Length(usize);

impl NetlinkDeserializable for Length {
    type Error = std::convert::Infallible;

    fn deserialize(_: &NetlinkHeader, payload: &[u8]) -> Result<Self, Self::Error> {
        Ok(Self(payload.len()))
    }
}

/// Reads a datagram in each of the four ways. The requests have sequence numbers from 1 on. Panics where what was read is
/// more than there was.
pub fn read(datagram: &[u8]) {
    let mut total = 0;
    let mut outgoing = Outgoing::default();
    let asking = outgoing.request(&Question.into());
    let _ =
        asking.receive(&outgoing, datagram, &mut |Length(length)| total += length).map_err(|error| error.to_string());
    assert!(total <= datagram.len(), "{total} bytes of answers in {}", datagram.len());

    let mut outgoing = Outgoing::default();
    let mut dumping = outgoing.dump(&Question);
    dumping.received(datagram.len());
    // An error costs one message at least.
    for left in (0..=datagram.len()).rev() {
        match dumping.next::<Length>(&outgoing, datagram) {
            Ok(None) => break,
            Ok(Some(_)) => {}
            Err(error) => drop(error.to_string()),
        }
        assert!(left > 0, "there is no end to the answers");
    }

    let requests = || std::iter::repeat_with(|| Request::from(Question)).take(3);
    let (mut outgoing, mut results) = (Outgoing::default(), Vec::new());
    if let Some(batching) = outgoing.batch(&mut requests(), &mut results) {
        let _ = batching.receive(&outgoing, datagram, &mut results).map_err(|error| error.to_string());
    }
    results.into_iter().filter_map(Result::err).for_each(|refusal| drop(refusal.to_string()));

    let mut outgoing = Outgoing::default();
    if let Some(mut transaction) = outgoing.transaction(&Question, requests(), &Question) {
        let _ = transaction.receive(&outgoing, datagram).map_err(|error| error.to_string());
        if let Err((index, _)) = transaction.result(true) {
            assert!(index < 3, "request {index} of 3");
        }
    }
}
