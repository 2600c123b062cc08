//! One line of the connection table.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use super::{Connection, ConnectionState, Origin, PersistenceData};
use crate::id::{Family, Protocol};
use crate::name::Name;
use crate::proc::{Line, ProcError, Words, number, padded_hex};

/// Whether it is the line above the connections.
pub(super) fn is_header(line: &Line<'_>) -> bool {
    line.number == 1 && line.text.starts_with(b"Pro ")
}

pub(super) fn parse(line: Line<'_>) -> Result<Connection, ProcError> {
    parse_words(line.words()).map_err(|fault| line.error(fault))
}

fn parse_words(mut words: Words<'_>) -> Result<Connection, &'static str> {
    let protocol = protocol(words.next().ok_or("it is empty")?).ok_or("its protocol is unknown")?;
    let client = socket_address(&mut words).ok_or("its client is not an address and a port in hexadecimal")?;
    let virtual_address =
        socket_address(&mut words).ok_or("its virtual address is not an address and a port in hexadecimal")?;
    if Family::of(client.ip()) != Family::of(virtual_address.ip()) {
        return Err("its client and its virtual address are of different families");
    }
    let real_address =
        socket_address(&mut words).ok_or("its real address is not an address and a port in hexadecimal")?;
    let state = state(words.next().ok_or("it has no state")?).ok_or("its state is no name of up to 15 bytes")?;
    // Only one of the two files has an origin, and it is never a number.
    let mut word = words.next();
    let origin = match word {
        Some(b"LOCAL") => Some(Origin::Local),
        Some(b"SYNC") => Some(Origin::Synchronized),
        _ => None,
    };
    if origin.is_some() {
        word = words.next();
    }
    let expires = word.and_then(seconds).ok_or("the seconds to its end are not a number of 32 bits")?;
    let persistence = persistence(words)?;
    Ok(Connection { protocol, client, virtual_address, real_address, state, expires, origin, persistence })
}

fn protocol(name: &[u8]) -> Option<Protocol> {
    Some(match name {
        b"TCP" => Protocol::Tcp,
        b"UDP" => Protocol::Udp,
        b"SCTP" => Protocol::Sctp,
        b"IP" => Protocol::Other(0),
        b"ICMP" => Protocol::Other(1),
        b"ICMPv6" => Protocol::Other(58),
        _ => Protocol::from_number(u16::try_from(number(name.strip_prefix(b"IP_")?, 10)?).ok()?),
    })
}

fn socket_address(words: &mut Words<'_>) -> Option<SocketAddr> {
    let address = address(words.next()?)?;
    let port = u16::try_from(padded_hex(words.next()?, 4)?).ok()?;
    Some(SocketAddr::new(address, port))
}

/// Eight digits, or eight groups of four.
fn address(word: &[u8]) -> Option<IpAddr> {
    if let Some(bits) = padded_hex(word, 8) {
        return Some(Ipv4Addr::from_bits(u32::try_from(bits).ok()?).into());
    }
    let mut groups = [0; 8];
    let mut words = word.split(|byte| *byte == b':');
    for group in &mut groups {
        *group = u16::try_from(padded_hex(words.next()?, 4)?).ok()?;
    }
    words.next().is_none().then(|| Ipv6Addr::from(groups).into())
}

fn state(word: &[u8]) -> Option<ConnectionState> {
    str::from_utf8(word).ok()?.parse().ok()
}

fn seconds(word: &[u8]) -> Option<Duration> {
    let seconds = u32::try_from(number(word, 10)?).ok()?;
    Some(Duration::from_secs(seconds.into()))
}

/// A space and the engine's name, another space and all the rest.
fn persistence(mut words: Words<'_>) -> Result<Option<PersistenceData>, &'static str> {
    let Some(engine) = words.next() else {
        return Ok(None);
    };
    let engine: Option<Name> = str::from_utf8(engine).ok().and_then(|name| name.parse().ok());
    let engine = engine.ok_or("its persistence engine is no name of up to 15 bytes")?;
    let data = words.rest();
    Ok(Some(PersistenceData { engine, data: data.strip_prefix(b" ").unwrap_or(data).to_vec() }))
}
