//! Which kernel the guest has: a release of Linux, `6.1`, built for the lab or by Debian.

use std::fmt;
use std::str::FromStr;

use crate::error::Error;

/// A release of Linux, such as 6.1. Its patch level is whatever the package has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version {
    major: u16,
    minor: u16,
}

impl Version {
    /// The release `major.minor`.
    pub const fn new(major: u16, minor: u16) -> Self {
        Self { major, minor }
    }

    /// The release of a package such as `linux-source-6.1`, or Ubuntu's `linux-source-6.8.0`.
    pub(crate) fn of_package(name: &str) -> Option<Self> {
        let version = name.strip_prefix("linux-source-")?;
        version.strip_suffix(".0").filter(|rest| rest.contains('.')).unwrap_or(version).parse().ok()
    }
}

impl FromStr for Version {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let parts = text.split_once('.').and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)));
        let (major, minor) = parts
            .ok_or_else(|| Error::Usage(format!("`{text}` is not the version of a Linux release, such as 6.1")))?;
        Ok(Self { major, minor })
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// A kernel that the guest can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kernel {
    /// User-Mode Linux, built for the lab from the source of this release: `6.1`.
    Uml(Version),
    /// The kernel of this release as Debian builds it, with its modules, in QEMU: `debian-6.1`.
    Debian(Version),
}

impl FromStr for Kernel {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        Ok(match text.strip_prefix("debian-") {
            Some(version) => Self::Debian(version.parse()?),
            None => Self::Uml(text.parse()?),
        })
    }
}

impl fmt::Display for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Uml(version) => version.fmt(f),
            Self::Debian(version) => write!(f, "debian-{version}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_ordered_by_number_and_not_by_text() {
        let version = |text: &str| text.parse::<Version>().unwrap();
        assert!(version("5.10") < version("6.1") && version("6.1") < version("6.12"));
        assert_eq!(version("6.12").to_string(), "6.12");
        for wrong in ["", "6", "6.", "6.1.2", "v6.1", "6.1-rc1"] {
            assert!(wrong.parse::<Version>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_kernel_is_built_for_the_lab_unless_it_is_debians() {
        for (text, kernel) in
            [("6.1", Kernel::Uml(Version::new(6, 1))), ("debian-6.1", Kernel::Debian(Version::new(6, 1)))]
        {
            assert_eq!(text.parse::<Kernel>().unwrap(), kernel);
            assert_eq!(kernel.to_string(), text);
        }
        assert!("ubuntu-6.1".parse::<Kernel>().is_err());
    }

    #[test]
    fn packages_of_debian_and_ubuntu_name_their_release() {
        assert_eq!(Version::of_package("linux-source-6.1"), Some(Version::new(6, 1)));
        assert_eq!(Version::of_package("linux-source-6.8.0"), Some(Version::new(6, 8)));
        assert_eq!(Version::of_package("linux-source-7.0"), Some(Version::new(7, 0)));
        assert_eq!(Version::of_package("linux-source"), None);
    }
}
