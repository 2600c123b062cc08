//! Decoding that cannot fail: a field of the wrong type costs that field, not the page of objects around it.
//!
//! [`Lenient`] reads whatever it is given, straight from the input and without buffering, and remembers what it found
//! if that was not what the field wants.

use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;

use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

/// A field as it came.
#[derive(Clone, Debug, Default)]
pub(crate) enum Lenient<T> {
    /// Absent or `null`.
    #[default]
    Absent,
    /// Of the right type.
    Given(T),
    /// Of another type.
    Wrong(Wrong),
}

/// What was found in place of a field's type.
#[derive(Clone, Debug)]
pub(crate) struct Wrong {
    found: Box<str>,
    wanted: &'static str,
}

impl fmt::Display for Wrong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "is {}, not {}", self.found, self.wanted)
    }
}

impl<T> Lenient<T> {
    /// The value, if there is one; an error if there is something else.
    pub(crate) fn get(&self) -> Result<Option<&T>, &Wrong> {
        match self {
            Self::Absent => Ok(None),
            Self::Given(value) => Ok(Some(value)),
            Self::Wrong(wrong) => Err(wrong),
        }
    }
}

/// What a [`Lenient`] can hold: says from which inputs it can be made.
pub(crate) trait Shape: Sized {
    /// The type in words: "not `WANTED`".
    const WANTED: &'static str;

    fn text(_: &str) -> Option<Self> {
        None
    }

    fn number(_: i64) -> Option<Self> {
        None
    }

    fn flag(_: bool) -> Option<Self> {
        None
    }

    /// Must read `seq` to its end.
    fn list<'de, A: SeqAccess<'de>>(mut seq: A) -> Result<Option<Self>, A::Error> {
        while seq.next_element::<IgnoredAny>()?.is_some() {}
        Ok(None)
    }

    /// Must read `map` to its end.
    fn map<'de, A: MapAccess<'de>>(mut map: A) -> Result<Option<Self>, A::Error> {
        while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(None)
    }
}

impl Shape for Box<str> {
    const WANTED: &'static str = "text";

    fn text(text: &str) -> Option<Self> {
        Some(text.into())
    }
}

impl Shape for i64 {
    const WANTED: &'static str = "a whole number";

    fn number(number: i64) -> Option<Self> {
        Some(number)
    }
}

impl Shape for bool {
    const WANTED: &'static str = "true or false";

    fn flag(flag: bool) -> Option<Self> {
        Some(flag)
    }
}

impl<T: Shape> Shape for Vec<Lenient<T>> {
    const WANTED: &'static str = "a list";

    fn list<'de, A: SeqAccess<'de>>(mut seq: A) -> Result<Option<Self>, A::Error> {
        // The hint is the input's claim: not trusted with memory.
        let mut items = Self::with_capacity(seq.size_hint().unwrap_or(0).min(1024));
        while let Some(item) = seq.next_element()? {
            items.push(item);
        }
        Ok(Some(items))
    }
}

impl<T: Shape> Shape for BTreeMap<String, Lenient<T>> {
    const WANTED: &'static str = "a map";

    fn map<'de, A: MapAccess<'de>>(mut map: A) -> Result<Option<Self>, A::Error> {
        let mut entries = Self::new();
        while let Some((key, value)) = map.next_entry()? {
            entries.insert(key, value);
        }
        Ok(Some(entries))
    }
}

/// Makes structs that derive `Deserialize` readable from a map.
macro_rules! records {
    ($($record:ty),+ $(,)?) => {$(
        impl $crate::lenient::Shape for $record {
            const WANTED: &'static str = "a map";

            fn map<'de, A: serde::de::MapAccess<'de>>(map: A) -> Result<Option<Self>, A::Error> {
                serde::Deserialize::deserialize(serde::de::value::MapAccessDeserializer::new(map)).map(Some)
            }
        }
    )+};
}
pub(crate) use records;

struct LenientVisitor<T>(PhantomData<T>);

impl<T: Shape> LenientVisitor<T> {
    fn settle(value: Option<T>, found: impl FnOnce() -> String) -> Lenient<T> {
        match value {
            Some(value) => Lenient::Given(value),
            None => Lenient::Wrong(Wrong { found: found().into(), wanted: T::WANTED }),
        }
    }
}

impl<'de, T: Shape> Visitor<'de> for LenientVisitor<T> {
    type Value = Lenient<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("anything")
    }

    fn visit_unit<E>(self) -> Result<Self::Value, E> {
        Ok(Lenient::Absent)
    }

    fn visit_none<E>(self) -> Result<Self::Value, E> {
        Ok(Lenient::Absent)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        Lenient::deserialize(deserializer)
    }

    fn visit_bool<E>(self, flag: bool) -> Result<Self::Value, E> {
        Ok(Self::settle(T::flag(flag), || flag.to_string()))
    }

    fn visit_i64<E>(self, number: i64) -> Result<Self::Value, E> {
        Ok(Self::settle(T::number(number), || format!("the number {number}")))
    }

    fn visit_u64<E>(self, number: u64) -> Result<Self::Value, E> {
        let value = i64::try_from(number).ok().and_then(T::number);
        Ok(Self::settle(value, || format!("the number {number}")))
    }

    fn visit_f64<E>(self, number: f64) -> Result<Self::Value, E> {
        Ok(Self::settle(None, || format!("the number {number}")))
    }

    fn visit_str<E>(self, text: &str) -> Result<Self::Value, E> {
        Ok(Self::settle(T::text(text), || format!("the text {:?}", Short(text))))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<Self::Value, A::Error> {
        Ok(Self::settle(T::list(seq)?, || "a list".into()))
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
        Ok(Self::settle(T::map(map)?, || "a map".into()))
    }
}

impl<'de, T: Shape> Deserialize<'de> for Lenient<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(LenientVisitor(PhantomData))
    }
}

/// The first characters of a text that somebody else chose: it goes into messages.
pub(crate) struct Short<'a>(pub(crate) &'a str);

impl Short<'_> {
    fn cut(&self) -> (&str, &'static str) {
        match self.0.char_indices().nth(200) {
            Some((end, _)) => (&self.0[..end], "…"),
            None => (self.0, ""),
        }
    }
}

impl fmt::Debug for Short<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (text, rest) = self.cut();
        write!(f, "{text:?}{rest}")
    }
}

impl fmt::Display for Short<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (text, rest) = self.cut();
        write!(f, "{text}{rest}")
    }
}
