//! Reads fields of an object and collects the problems found.

use std::cell::{Cell, RefCell};
use std::collections::HashSet;
use std::fmt;
use std::net::IpAddr;
use std::num::NonZeroU16;
use std::sync::Arc;

use ipnet::IpNet;

use crate::address::{parse_ip, parse_range};
use crate::convert::{Conversion, Converted};
use crate::lenient::{Lenient, Truncated};
use crate::reserved::reserved;

/// The maximum number of problems listed for one object; further ones are only counted.
const MAX_PROBLEMS: usize = 12;

/// A field is invalid, and the problem has been added.
pub(crate) struct InvalidField;

/// The problems of an object that is being converted.
///
/// In its methods `at` is the path of a field and `effect` the consequence of skipping it.
#[derive(Debug, Default)]
pub(crate) struct Problems {
    list: RefCell<Vec<String>>,
    omitted: Cell<usize>,
}

impl Problems {
    pub(crate) fn add(&self, problem: impl fmt::Display) {
        let mut list = self.list.borrow_mut();
        if list.len() < MAX_PROBLEMS {
            list.push(problem.to_string());
        } else {
            self.omitted.set(self.omitted.get() + 1);
        }
    }

    pub(crate) fn into_converted<T>(self, conversion: Conversion<T>) -> Converted<T> {
        let mut problems = self.list.into_inner();
        if self.omitted.get() > 0 {
            problems.push(format!("and {} more problems", self.omitted.get()));
        }
        Converted { conversion, problems }
    }

    /// A field that may be absent.
    pub(crate) fn field<'a, T>(
        &self,
        field: &'a Lenient<T>,
        at: impl fmt::Display,
        effect: &str,
    ) -> Result<Option<&'a T>, InvalidField> {
        field.get().map_err(|mismatch| {
            self.add(format_args!("{at} {mismatch}: {effect}; correct it"));
            InvalidField
        })
    }

    /// A field for which an invalid value has the same effect as an absent one.
    pub(crate) fn value<'a, T>(&self, field: &'a Lenient<T>, at: impl fmt::Display, effect: &str) -> Option<&'a T> {
        self.field(field, at, effect).ok().flatten()
    }

    /// The items of a list with their paths; none if the list is absent.
    pub(crate) fn items<'a, T, A: fmt::Display + Copy>(
        &self,
        list: &'a Lenient<Vec<Lenient<T>>>,
        at: A,
        effect: &str,
    ) -> impl Iterator<Item = (Index<A>, &'a Lenient<T>)> + use<'a, T, A> {
        let items = self.value(list, at, effect).map_or(&[][..], Vec::as_slice);
        items.iter().enumerate().map(move |(index, item)| (Index(at, index), item))
    }

    /// An address.
    pub(crate) fn ip(&self, text: &str, at: impl fmt::Display, effect: &str) -> Option<IpAddr> {
        let address = parse_ip(text);
        if address.is_none() {
            self.add(format_args!("{at} {:?} is no IP address: {effect}; correct it", Truncated(text)));
        }
        address
    }

    /// An address that a VIP or an endpoint may have. With `127.0.0.1`, users who may write Services could reach what
    /// listens for the node alone; with `169.254.169.254`, they could pose as the cloud's metadata service.
    pub(crate) fn usable_ip(&self, text: &str, at: impl fmt::Display, effect: &str) -> Option<IpAddr> {
        let address = self.ip(text, &at, effect)?;
        let Some(word) = reserved(address) else { return Some(address) };
        self.add(format_args!("{at} {address} is a {word} address: {effect}; use another address"));
        None
    }

    /// A range of addresses.
    pub(crate) fn range(&self, text: &str, at: impl fmt::Display, effect: &str) -> Option<IpNet> {
        let range = parse_range(text);
        if range.is_none() {
            self.add(format_args!(
                "{at} {:?} is no range of IP addresses: {effect}; write it as in 192.0.2.0/24 or 2001:db8::/32",
                Truncated(text)
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

    /// Adds the problem of a value that is not one of `words`.
    pub(crate) fn unknown_value(&self, word: &str, at: impl fmt::Display, effect: &str, words: &str) {
        self.add(format_args!("{at} is {:?}: {effect}; give {words}", Truncated(word)));
    }
}

/// The path of a list item, as in `spec.ports[1]`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Index<A>(pub(crate) A, pub(crate) usize);

impl<A: fmt::Display> fmt::Display for Index<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}[{}]", self.0, self.1)
    }
}

/// The path of a child field, as in `spec.ports[1].name`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Child<A>(pub(crate) A, pub(crate) &'static str);

impl<A: fmt::Display> fmt::Display for Child<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.0, self.1)
    }
}

/// Interns strings that many objects have in common: names of ports, Nodes and zones.
#[derive(Debug, Default)]
pub(crate) struct Interner {
    texts: HashSet<Arc<str>>,
    /// At this size, unused strings are dropped.
    threshold: usize,
}

impl Interner {
    pub(crate) fn get(&mut self, text: &str) -> Arc<str> {
        if let Some(known) = self.texts.get(text) {
            return known.clone();
        }
        if self.texts.len() >= self.threshold {
            self.texts.retain(|text| Arc::strong_count(text) > 1);
            self.threshold = (self.texts.len() * 2).max(1024);
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
    fn the_interner_keeps_one_copy_and_drops_unused_strings() {
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
    fn only_the_first_problems_of_an_object_are_listed() {
        let problems = Problems::default();
        for i in 0..100 {
            problems.add(i);
        }
        let list = problems.into_converted(Conversion::<()>::Ignore).problems;
        assert_eq!((list.len(), list[MAX_PROBLEMS].as_str()), (MAX_PROBLEMS + 1, "and 88 more problems"));
    }
}
