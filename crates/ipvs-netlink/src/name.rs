//! Names the kernel keeps in 16 bytes: of schedulers, persistence engines and interfaces.

use std::fmt;
use std::str::FromStr;

use netlink_packet_core::DecodeError;

/// A name of 1 to 15 bytes without NUL (`IP_VS_SCHEDNAME_MAXLEN`, `IP_VS_PENAME_MAXLEN` and `IP_VS_IFNAME_MAXLEN`, which
/// are all 16, less the NUL at the end).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name {
    bytes: [u8; 15],
    length: u8,
}

/// Not a possible [`Name`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} cannot be a name in IPVS: 1 to 15 bytes without NUL can")]
pub struct InvalidName(String);

impl Name {
    /// The name.
    pub fn as_str(&self) -> &str {
        // Made from a str only, so it is UTF-8.
        str::from_utf8(&self.bytes[..self.length.into()]).unwrap_or_default()
    }

    /// Reads a string as the kernel sends it, up to its NUL.
    pub(crate) fn parse(value: &[u8]) -> Result<Self, DecodeError> {
        let text = value.split(|byte| *byte == 0).next().unwrap_or_default();
        let text = str::from_utf8(text).map_err(|_| DecodeError::from("a name is not UTF-8"))?;
        text.parse().map_err(|error: InvalidName| error.to_string().into())
    }
}

impl FromStr for Name {
    type Err = InvalidName;

    fn from_str(name: &str) -> Result<Self, InvalidName> {
        let mut bytes = [0; 15];
        match bytes.get_mut(..name.len()) {
            Some(start) if !name.is_empty() && !name.contains('\0') => start.copy_from_slice(name.as_bytes()),
            _ => return Err(InvalidName(name.to_owned())),
        }
        // At most 15, as it fitted.
        Ok(Self { bytes, length: u8::try_from(name.len()).unwrap_or_default() })
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.as_str().fmt(f)
    }
}
