//! The packet filter's tables over netlink: [`message`] encodes them, [`read`] reads them back, `client` carries out operations.

pub(crate) mod client;
pub mod message;
pub mod read;
