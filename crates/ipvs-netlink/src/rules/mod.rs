//! The rules that `ipvsadm -S` saves and `ipvsadm -R` restores: one command a line.
//!
//! [`parse()`] reads lines into [`Message`]s for [`Client::apply`](crate::Client::apply), and [`format()`] writes a
//! message as a line:
//!
//! ```
//! use ipvs_netlink::{Message, rules};
//!
//! let text = "-A -t 10.0.0.1:80 -s wrr -p 600\n-a -t 10.0.0.1:80 -r 10.1.0.7:8080 -m -w 5 -x 100\n";
//! let rules = rules::parse(text).collect::<Result<Vec<_>, _>>()?;
//! assert!(matches!(rules[0].message, Message::AddVirtualServer(_)));
//! assert_eq!(rules[1].line, 2);
//! assert_eq!(rules::format(&rules[1].message)?, "-a -t 10.0.0.1:80 -r 10.1.0.7:8080 -m -w 5 -x 100");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Reading
//!
//! Every command that changes something and every option of ipvsadm(8) that belongs to it is known, short (`-t`), long
//! (`--tcp-service`), with the value in the same word (`-s=rr`, `-srr`, `--scheduler=rr`) or the next one, and several
//! short ones in one word (`-At 10.0.0.1:80`). What is left out is what it is for ipvsadm: scheduler `wlc`, forwarding
//! `-g`, weight 1, 360 seconds for `-p` alone, the virtual server's port for `-r`, tunnel type `ipip`, interface `eth0`.
//! Blank lines and lines that begin with `#` are passed over, as is the word `ipvsadm` at the start of a line.
//!
//! What ipvsadm refuses is refused, and what is read here means the same there, but that
//!
//! * hosts, ports and masks are read as numbers only, addresses in their usual form, and an IPv4 mask in four parts
//!   (`-M 24` is the mask 0.0.0.24 to ipvsadm);
//! * `-M`, and `-r` without a port, have to follow the virtual server, without which ipvsadm misreads them;
//! * `-M` without `-p`, which means nothing to the kernel, is left out;
//! * negative firewall marks are read, because ipvsadm writes them (below);
//! * the port of a real server is read as it is written: ipvsadm silently takes the virtual server's for `-g` and `-i`,
//!   but for firewall marks;
//! * ipvsadm has no comments, and stops at one.
//!
//! # Writing
//!
//! A line is what `ipvsadm -Sn` writes, and what is saved is whole, which with ipvsadm 1.31 it is not:
//!
//! * ipvsadm leaves out the thresholds of real servers; here `-x` and `-y` stand at the end of the line, and
//!   `ipvsadm -R` reads them.
//! * It writes firewall marks from 2,147,483,648 on as negative numbers, which it refuses to read.
//! * It leaves out `flag-3` of the schedulers `sh` and `mh`, and where no other is set writes a `-b` that it refuses.
//! * It writes `-g` for real servers on the host itself ([`Forwarding::Local`](crate::Forwarding::Local)) and `(null)` for
//!   those that are bypassed. No option says either, so [`format()`] is an error for them, as for everything else that
//!   `ipvsadm -R` could not read back.
//! * It saves neither timeouts (`--set`) nor synchronization daemons. They are messages like any other here.
//! * It writes IPv6 addresses below `::1:0:0` with their end in four decimal parts, which only looks different.

mod error;
mod format;
mod options;
mod parse;

use crate::message::Message;

pub use error::{FormatError, ParseError};
pub use format::format;

/// A line that was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Rule {
    /// The number of the line, from 1 on.
    pub line: usize,
    /// What it tells the kernel to do.
    pub message: Message,
}

/// Reads rules, one a line. A line that cannot be read is an error of its own; those after it are read.
pub fn parse(text: &str) -> impl Iterator<Item = Result<Rule, ParseError>> {
    (1..).zip(text.lines()).filter_map(|(number, line)| match parse::line(line) {
        Ok(message) => message.map(|message| Ok(Rule { line: number, message })),
        Err(error) => Some(Err(ParseError { line: number, ..error })),
    })
}
