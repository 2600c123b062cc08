//! What the kernel answers, whatever it is: read without a panic; and what was understood of it, written and read again, is
//! the same. The first byte is the command.

#![no_main]

use ipvs_netlink::{Message, Protocol, VirtualServerId};
use libfuzzer_sys::fuzz_target;
use netlink_packet_core::{Emitable, ParseableParametrized};
use netlink_packet_generic::{GenlFamily, GenlHeader};

fn parse(command: u8, bytes: &[u8]) -> Option<Message> {
    Message::parse_with_param(bytes, GenlHeader { cmd: command, version: 1 }).ok()
}

fn again(message: Message) -> Option<Message> {
    let mut bytes = vec![0xff; message.buffer_len()];
    message.emit(&mut bytes);
    parse(message.command(), &bytes)
}

fuzz_target!(|data: &[u8]| {
    let Some((command, bytes)) = data.split_first() else { return };
    let Some(message) = parse(*command, bytes) else { return };
    let _ = format!("{message:?}");
    match message {
        Message::VirtualServer(entry) => {
            let read = again(Message::AddVirtualServer(entry.server));
            assert!(matches!(read, Some(Message::VirtualServer(it)) if it.server == entry.server), "{entry:?}: {read:?}");
        }
        Message::RealServer(entry) => {
            let id = VirtualServerId::address(Protocol::Tcp, ([10, 0, 0, 1], 80).into());
            let read = again(Message::AddRealServer(id, entry.server));
            assert!(matches!(read, Some(Message::RealServer(it)) if it.server == entry.server), "{entry:?}: {read:?}");
        }
        Message::SyncDaemon(daemon) => {
            assert_eq!(again(Message::StartSyncDaemon(daemon)), Some(Message::SyncDaemon(daemon)));
        }
        Message::Timeouts(timeouts) => {
            assert_eq!(again(Message::SetTimeouts(timeouts)), Some(Message::Timeouts(timeouts)));
        }
        _ => {}
    }
});
