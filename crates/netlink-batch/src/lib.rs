//! One netlink socket for any family: request, dump, batch, transaction; and one for notifications.
//!
//! Netlink to the kernel is a function call: the kernel handles a datagram inside `send`, and when `send` returns every
//! reply is queued on the socket. So this crate needs no thread and no timer. It is not tied to a family: messages are
//! types that implement the traits of [`netlink_packet_core`].
//!
//! ```no_run
//! use netlink_batch::{protocols::NETLINK_ROUTE, Socket};
//! use netlink_packet_route::{RouteNetlinkMessage, link::LinkMessage};
//!
//! let mut socket = Socket::open(NETLINK_ROUTE)?;
//! socket.dump(&RouteNetlinkMessage::GetLink(LinkMessage::default()), |reply: RouteNetlinkMessage| {
//!     println!("{reply:?}");
//! })?;
//! # Ok::<(), netlink_batch::Error>(())
//! ```
//!
//! With the feature `tokio` there is `AsyncSocket`, with the same methods except for transactions. Both are thin layers
//! over one core that does no I/O.
//!
//! [`Socket::batch`] explains what a batch is and gives measurements.

#![forbid(unsafe_code)]

#[cfg(feature = "tokio")]
mod async_socket;
mod error;
mod exchange;
#[cfg(feature = "fault-points")]
mod fault;
#[cfg(fuzzing)]
pub mod fuzzing;
mod socket;
mod subscription;

#[cfg(feature = "tokio")]
pub use async_socket::{AsyncSocket, AsyncStream};

pub use error::{Error, Refusal};
pub use exchange::{BATCH_MESSAGES, PartialBatch, Request, Sent};
pub use netlink_sys::protocols;
pub use socket::{Socket, Stream};
pub use subscription::{Received, Subscription};
