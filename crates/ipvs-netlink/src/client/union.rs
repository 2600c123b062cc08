//! Lists that lack nothing that was there all the time.
//!
//! From one datagram of a list to the next the kernel finds its place by counting (`ip_vs_genl_dump_services`,
//! `ip_vs_genl_dump_dests`). Where others delete meanwhile, or the kernel resizes its table (since Linux 7.2), it skips some and
//! lists others twice, and does not say so. So lists are read until one adds nothing.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::hash::Hash;
use std::net::SocketAddr;

use crate::id::VirtualServerId;
use crate::message::Message;
use crate::real_server::RealServerEntry;
use crate::virtual_server::VirtualServerEntry;

/// How often a list is read while each reading adds something.
pub(super) const READINGS: u32 = 32;

/// So few fit the smallest datagram of real servers: they come from one look at the list.
const ENTRIES_OF_ONE_LOOK: usize = 8;

/// What a list consists of.
pub(super) trait Listed: Sized {
    type Key: Eq + Hash;

    fn from_message(message: Message) -> Option<Self>;
    fn key(&self) -> Self::Key;
}

/// What several readings of a list had in them.
pub(super) struct Union<T: Listed> {
    /// Each with the last reading that had it.
    entries: Vec<(T, u32)>,
    positions: HashMap<T::Key, usize>,
    reading: u32,
    /// Of the last reading: what it has, and what only it has.
    found: usize,
    added: usize,
    /// How many readings have added nothing, up to the last one.
    without_addition: u32,
}

impl<T: Listed> Default for Union<T> {
    fn default() -> Self {
        Self { entries: Vec::new(), positions: HashMap::new(), reading: 0, found: 0, added: 0, without_addition: 0 }
    }
}

impl<T: Listed> Union<T> {
    pub(super) fn begin(&mut self) {
        self.reading += 1;
        (self.found, self.added) = (0, 0);
    }

    pub(super) fn push(&mut self, message: Message) {
        let Some(listed) = T::from_message(message) else { return };
        match self.positions.entry(listed.key()) {
            Entry::Occupied(position) => {
                if let Some((entry, reading)) = self.entries.get_mut(*position.get()) {
                    self.found += usize::from(*reading != self.reading);
                    (*entry, *reading) = (listed, self.reading);
                }
            }
            Entry::Vacant(position) => {
                position.insert(self.entries.len());
                self.entries.push((listed, self.reading));
                self.found += 1;
                self.added += 1;
            }
        }
    }

    /// Ends a reading; returns whether it was the last. One is that has exactly what was known, as the second has where nobody
    /// changes anything; where they do, it takes two that add nothing.
    pub(super) fn end(&mut self) -> bool {
        self.without_addition = if self.added == 0 { self.without_addition + 1 } else { 0 };
        self.without_addition > 1 || (self.without_addition == 1 && self.found == self.entries.len())
    }

    /// Whether it is so short that one reading is complete.
    pub(super) fn is_of_one_look(&self) -> bool {
        self.reading == 1 && self.entries.len() <= ENTRIES_OF_ONE_LOOK
    }

    /// Everything, and whether the last reading had it.
    pub(super) fn into_entries(self) -> impl Iterator<Item = (T, bool)> {
        self.entries.into_iter().map(move |(entry, reading)| (entry, reading == self.reading))
    }

    /// What one of the last two readings had.
    pub(super) fn into_latest(self) -> impl Iterator<Item = T> {
        self.entries.into_iter().filter(move |(_, reading)| reading + 1 >= self.reading).map(|(entry, _)| entry)
    }
}

impl Listed for VirtualServerId {
    type Key = Self;

    fn from_message(message: Message) -> Option<Self> {
        if let Message::VirtualServer(entry) = message { Some(entry.server.id) } else { None }
    }

    fn key(&self) -> Self {
        *self
    }
}

impl Listed for VirtualServerEntry {
    type Key = VirtualServerId;

    fn from_message(message: Message) -> Option<Self> {
        if let Message::VirtualServer(entry) = message { Some(entry) } else { None }
    }

    fn key(&self) -> VirtualServerId {
        self.server.id
    }
}

impl Listed for RealServerEntry {
    type Key = SocketAddr;

    fn from_message(message: Message) -> Option<Self> {
        if let Message::RealServer(entry) = message { Some(entry) } else { None }
    }

    fn key(&self) -> SocketAddr {
        self.server.socket_address()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::tests::web;
    use crate::stats::Stats;
    use crate::virtual_server::VirtualServer;

    fn id(mark: u32) -> VirtualServerId {
        VirtualServerId::firewall_mark(mark, crate::Family::Ipv4).unwrap()
    }

    /// Reads lists until they are enough; returns how many that took, and what they had with whether the last one did.
    fn read(lists: &[&[u32]]) -> (usize, Vec<(VirtualServerId, bool)>) {
        let mut union = Union::<VirtualServerId>::default();
        for (index, list) in lists.iter().enumerate() {
            union.begin();
            for mark in *list {
                let server = VirtualServer { id: id(*mark), ..web() };
                union.push(Message::VirtualServer(VirtualServerEntry { server, stats: Stats::default() }));
            }
            if union.end() {
                return (index + 1, union.into_entries().collect());
            }
        }
        panic!("{lists:?} are not enough")
    }

    #[test]
    fn a_list_is_read_until_nothing_is_added() {
        let entries =
            |entries: &[(u32, bool)]| entries.iter().map(|(mark, last)| (id(*mark), *last)).collect::<Vec<_>>();
        for (lists, readings, wanted) in [
            // Nobody changes anything.
            (&[&[][..]][..], 1, entries(&[])),
            (&[&[1, 2, 3], &[1, 2, 3]], 2, entries(&[(1, true), (2, true), (3, true)])),
            // Some were skipped, others listed twice.
            (&[&[1, 3, 3], &[1, 2, 3], &[1, 2, 3]], 3, entries(&[(1, true), (3, true), (2, true)])),
            (&[&[1, 2], &[2, 3], &[1, 3], &[1, 2]], 4, entries(&[(1, true), (2, true), (3, false)])),
            (&[&[1, 2], &[1], &[1]], 3, entries(&[(1, true), (2, false)])),
            (&[&[1, 2], &[1], &[1, 2]], 3, entries(&[(1, true), (2, true)])),
            (&[&[1, 2], &[1], &[1, 3], &[1], &[1]], 5, entries(&[(1, true), (2, false), (3, false)])),
        ] {
            assert_eq!(read(lists), (readings, wanted), "{lists:?}");
        }
    }
}
