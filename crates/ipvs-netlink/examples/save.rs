//! Prints the virtual servers of the kernel, and their real servers, as the rules that restore them: `ipvsadm -Sn` with
//! thresholds.
//!
//! ```text
//! sudo cargo run -p ipvs-netlink --example save > rules
//! ```
//!
//! The `restore` example and `ipvsadm -R` read them. What no rule can say is an error, and all others are printed.

use std::io::{self, Write};
use std::process::ExitCode;

use ipvs_netlink::{Client, Error, Message, RealServer, VirtualServerId, rules};

fn main() -> ExitCode {
    let messages = match read() {
        Ok(messages) => messages,
        Err(error) => {
            eprintln!("save: {error}");
            return ExitCode::FAILURE;
        }
    };
    let (mut text, mut is_whole) = (String::new(), true);
    for message in messages {
        match rules::format(&message) {
            Ok(line) => text += &(line + "\n"),
            Err(error) => {
                eprintln!("save: {error}: {message:?}");
                is_whole = false;
            }
        }
    }
    if let Err(error) = io::stdout().write_all(text.as_bytes()) {
        eprintln!("save: cannot write: {error}");
        return ExitCode::FAILURE;
    }
    if is_whole { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// What would make everything that is there, in ipvsadm's order: addresses by family first, then firewall marks.
fn read() -> Result<Vec<Message>, Error> {
    let mut client = Client::connect()?;
    let mut entries = client.servers()?.collect::<Result<Vec<_>, _>>()?;
    entries.sort_by_key(|entry| match entry.virtual_server.server.id {
        id @ VirtualServerId::Address { .. } => (0, Some(id.family()), id),
        id @ VirtualServerId::FirewallMark { .. } => (1, None, id),
    });
    let mut messages = Vec::new();
    for entry in entries {
        let (virtual_server, mut real_servers) = entry.into_configuration();
        real_servers.sort_by_key(RealServer::socket_address);
        messages.push(Message::AddVirtualServer(virtual_server));
        messages.extend(real_servers.into_iter().map(|server| Message::AddRealServer(virtual_server.id, server)));
    }
    Ok(messages)
}
