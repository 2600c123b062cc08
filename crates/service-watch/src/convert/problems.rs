//! Reading fields while keeping a list of what is wrong with them.

use std::cell::{Cell, RefCell};
use std::collections::HashSet;
use std::fmt;
use std::net::IpAddr;
use std::num::NonZeroU16;
use std::sync::Arc;

use ipnet::IpNet;

use crate::address::{parse_ip, parse_range};
use crate::convert::{Converted, Outcome};
use crate::lenient::{Lenient, Short};
use crate::reserved::reserved;

/// More problems than this of one object are only counted.
const TOLD: usize = 12;

/// A field was of the wrong type, and that has been told.
pub(crate) struct Told;

/// What is wrong with an object, while it is being read.
///
/// `at` says where in the object, `effect` what follows from leaving the thing out.
#[derive(Debug, Default)]
pub(crate) struct Problems {
    told: RefCell<Vec<String>>,
    more: Cell<usize>,
}

impl Problems {
    pub(crate) fn add(&self, problem: impl fmt::Display) {
        let mut told = self.told.borrow_mut();
        if told.len() < TOLD {
            told.push(problem.to_string());
        } else {
            self.more.set(self.more.get() + 1);
        }
    }

    pub(crate) fn with<T>(self, outcome: Outcome<T>) -> Converted<T> {
        let mut problems = self.told.into_inner();
        if self.more.get() > 0 {
            problems.push(format!("and {} more of this kind", self.more.get()));
        }
        Converted { outcome, problems }
    }

    /// A field that may be absent.
    pub(crate) fn field<'a, T>(
        &self,
        field: &'a Lenient<T>,
        at: impl fmt::Display,
        effect: &str,
    ) -> Result<Option<&'a T>, Told> {
        field.get().map_err(|wrong| {
            self.add(format_args!("{at} {wrong}: {effect}; correct it"));
            Told
        })
    }

    /// A field for which absent and wrong come to the same.
    pub(crate) fn value<'a, T>(&self, field: &'a Lenient<T>, at: impl fmt::Display, effect: &str) -> Option<&'a T> {
        self.field(field, at, effect).ok().flatten()
    }

    /// The items of a list with their place in it; none if it is absent.
    pub(crate) fn items<'a, T, A: fmt::Display + Copy>(
        &self,
        list: &'a Lenient<Vec<Lenient<T>>>,
        at: A,
        effect: &str,
    ) -> impl Iterator<Item = (Item<A>, &'a Lenient<T>)> + use<'a, T, A> {
        let items = self.value(list, at, effect).map_or(&[][..], Vec::as_slice);
        items.iter().enumerate().map(move |(index, item)| (Item(at, index), item))
    }

    /// An address.
    pub(crate) fn ip(&self, text: &str, at: impl fmt::Display, effect: &str) -> Option<IpAddr> {
        let address = parse_ip(text);
        if address.is_none() {
            self.add(format_args!("{at} {:?} is no IP address: {effect}; correct it", Short(text)));
        }
        address
    }

    /// An address that somebody can have, for a VIP or an endpoint: with `127.0.0.1` whoever may write Services would reach
    /// what listens for the node alone, with `169.254.169.254` they would be everybody's cloud.
    pub(crate) fn ordinary_ip(&self, text: &str, at: impl fmt::Display, effect: &str) -> Option<IpAddr> {
        let address = self.ip(text, &at, effect)?;
        let Some(word) = reserved(address) else { return Some(address) };
        self.add(format_args!("{at} {address} is a {word} address: {effect}; give another"));
        None
    }

    /// A range of addresses.
    pub(crate) fn range(&self, text: &str, at: impl fmt::Display, effect: &str) -> Option<IpNet> {
        let range = parse_range(text);
        if range.is_none() {
            self.add(format_args!(
                "{at} {:?} is no range of IP addresses: {effect}; write it as in 192.0.2.0/24 or 2001:db8::/32",
                Short(text)
            ));
        }
        range
    }

    /// A port number.
    pub(crate) fn port(&self, number: i64, at: impl fmt::Display, effect: &str) -> Option<NonZeroU16> {
        let port = u16::try_from(number).ok().and_then(NonZeroU16::new);
        if port.is_none() {
            self.add(format_args!("{at} is {number}: {effect}; give one from 1 to 65535"));
        }
        port
    }

    /// A word that is none of those it may be.
    pub(crate) fn unknown(&self, word: &str, at: impl fmt::Display, effect: &str, words: &str) {
        self.add(format_args!("{at} is {:?}: {effect}; give {words}", Short(word)));
    }
}

/// Where in an object: `spec.ports[1]`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Item<A>(pub(crate) A, pub(crate) usize);

impl<A: fmt::Display> fmt::Display for Item<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}[{}]", self.0, self.1)
    }
}

/// Where in an item: `spec.ports[1].name`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct In<A>(pub(crate) A, pub(crate) &'static str);

impl<A: fmt::Display> fmt::Display for In<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.0, self.1)
    }
}

/// One copy of each text that many objects have in common: port names, nodes, zones.
#[derive(Debug, Default)]
pub(crate) struct Interner {
    texts: HashSet<Arc<str>>,
    /// At this size, texts nobody uses any more are dropped.
    full: usize,
}

impl Interner {
    pub(crate) fn get(&mut self, text: &str) -> Arc<str> {
        if let Some(known) = self.texts.get(text) {
            return known.clone();
        }
        if self.texts.len() >= self.full {
            self.texts.retain(|text| Arc::strong_count(text) > 1);
            self.full = (self.texts.len() * 2).max(1024);
        }
        let text: Arc<str> = text.into();
        self.texts.insert(text.clone());
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interner_keeps_one_copy_and_drops_what_nobody_uses() {
        let mut interner = Interner::default();
        let kept = interner.get("node-a");
        assert!(Arc::ptr_eq(&kept, &interner.get("node-a")));
        for i in 0..5000 {
            interner.get(&format!("gone-{i}"));
        }
        assert!(interner.texts.len() <= 1024, "{}", interner.texts.len());
        assert!(Arc::ptr_eq(&kept, &interner.get("node-a")));
    }

    #[test]
    fn many_problems_of_one_object_are_counted_not_listed() {
        let problems = Problems::default();
        for i in 0..100 {
            problems.add(i);
        }
        let told = problems.with(Outcome::<()>::Ignore).problems;
        assert_eq!((told.len(), told[TOLD].as_str()), (TOLD + 1, "and 88 more of this kind"));
    }
}
