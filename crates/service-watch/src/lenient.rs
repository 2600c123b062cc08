//! Lenient decoding: a field of the wrong type makes only that field invalid, not the page of objects around it.
//!
//! [`Lenient`] accepts any input, without buffering it, and records what it found where that is not of the expected
//! type.

use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;

use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

/// A field that may have the wrong type.
#[derive(Clone, Debug, Default)]
pub(crate) enum Lenient<T> {
    /// Absent or `null`.
    #[default]
    Absent,
    /// Of the right type.
    Present(T),
    /// Of another type.
    Mismatch(TypeMismatch),
}

/// A value of the wrong type.
#[derive(Clone, Debug)]
pub(crate) struct TypeMismatch {
    found: Box<str>,
    expected: &'static str,
}

impl fmt::Display for TypeMismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "is {}, not {}", self.found, self.expected)
    }
}

impl<T> Lenient<T> {
    /// The value if present; an error if it has the wrong type.
    pub(crate) fn get(&self) -> Result<Option<&T>, &TypeMismatch> {
        match self {
            Self::Absent => Ok(None),
            Self::Present(value) => Ok(Some(value)),
            Self::Mismatch(mismatch) => Err(mismatch),
        }
    }
}

/// A type that a [`Lenient`] can hold: the inputs it can be made from.
pub(crate) trait LenientValue: Sized {
    /// The type in words, for messages: "not `EXPECTED`".
    const EXPECTED: &'static str;

    fn text(_: &str) -> Option<Self> {
        None
    }

    fn number(_: i64) -> Option<Self> {
        None
    }

    fn boolean(_: bool) -> Option<Self> {
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

impl LenientValue for Box<str> {
    const EXPECTED: &'static str = "text";

    fn text(text: &str) -> Option<Self> {
        Some(text.into())
    }
}

impl LenientValue for i64 {
    const EXPECTED: &'static str = "a whole number";

    fn number(number: i64) -> Option<Self> {
        Some(number)
    }
}

impl LenientValue for bool {
    const EXPECTED: &'static str = "true or false";

    fn boolean(boolean: bool) -> Option<Self> {
        Some(boolean)
    }
}

impl<T: LenientValue> LenientValue for Vec<Lenient<T>> {
    const EXPECTED: &'static str = "a list";

    fn list<'de, A: SeqAccess<'de>>(mut seq: A) -> Result<Option<Self>, A::Error> {
        // The hint comes from the input, so it does not decide how much memory is allocated.
        let mut items = Self::with_capacity(seq.size_hint().unwrap_or(0).min(1024));
        while let Some(item) = seq.next_element()? {
            items.push(item);
        }
        Ok(Some(items))
    }
}

impl<T: LenientValue> LenientValue for BTreeMap<String, Lenient<T>> {
    const EXPECTED: &'static str = "a map";

    fn map<'de, A: MapAccess<'de>>(mut map: A) -> Result<Option<Self>, A::Error> {
        let mut entries = Self::new();
        while let Some((key, value)) = map.next_entry()? {
            entries.insert(key, value);
        }
        Ok(Some(entries))
    }
}

/// Implements [`LenientValue`] for structs that derive `Deserialize`.
macro_rules! lenient_structs {
    ($($record:ty),+ $(,)?) => {$(
        impl $crate::lenient::LenientValue for $record {
            const EXPECTED: &'static str = "a map";

            fn map<'de, A: serde::de::MapAccess<'de>>(map: A) -> Result<Option<Self>, A::Error> {
                serde::Deserialize::deserialize(serde::de::value::MapAccessDeserializer::new(map)).map(Some)
            }
        }
    )+};
}
pub(crate) use lenient_structs;

struct LenientVisitor<T>(PhantomData<T>);

impl<T: LenientValue> LenientVisitor<T> {
    fn value_or_mismatch(value: Option<T>, found: impl FnOnce() -> String) -> Lenient<T> {
        match value {
            Some(value) => Lenient::Present(value),
            None => Lenient::Mismatch(TypeMismatch { found: found().into(), expected: T::EXPECTED }),
        }
    }
}

impl<'de, T: LenientValue> Visitor<'de> for LenientVisitor<T> {
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

    fn visit_bool<E>(self, boolean: bool) -> Result<Self::Value, E> {
        Ok(Self::value_or_mismatch(T::boolean(boolean), || boolean.to_string()))
    }

    fn visit_i64<E>(self, number: i64) -> Result<Self::Value, E> {
        Ok(Self::value_or_mismatch(T::number(number), || format!("the number {number}")))
    }

    fn visit_u64<E>(self, number: u64) -> Result<Self::Value, E> {
        let value = i64::try_from(number).ok().and_then(T::number);
        Ok(Self::value_or_mismatch(value, || format!("the number {number}")))
    }

    fn visit_f64<E>(self, number: f64) -> Result<Self::Value, E> {
        Ok(Self::value_or_mismatch(None, || format!("the number {number}")))
    }

    fn visit_str<E>(self, text: &str) -> Result<Self::Value, E> {
        Ok(Self::value_or_mismatch(T::text(text), || format!("the text {:?}", Truncated(text))))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<Self::Value, A::Error> {
        Ok(Self::value_or_mismatch(T::list(seq)?, || "a list".into()))
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
        Ok(Self::value_or_mismatch(T::map(map)?, || "a map".into()))
    }
}

impl<'de, T: LenientValue> Deserialize<'de> for Lenient<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(LenientVisitor(PhantomData))
    }
}

/// Truncates text from outside when it is shown in messages.
pub(crate) struct Truncated<'a>(pub(crate) &'a str);

impl Truncated<'_> {
    fn split(&self) -> (&str, &'static str) {
        match self.0.char_indices().nth(200) {
            Some((end, _)) => (&self.0[..end], "…"),
            None => (self.0, ""),
        }
    }
}

impl fmt::Debug for Truncated<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (text, rest) = self.split();
        write!(f, "{text:?}{rest}")
    }
}

impl fmt::Display for Truncated<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (text, rest) = self.split();
        write!(f, "{text}{rest}")
    }
}
