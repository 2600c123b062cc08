//! The packet filter's tables over netlink: [`message`] writes them, [`read`] reads them back, [`client`] does both on a socket.

pub(crate) mod client;
pub mod message;
pub mod read;
