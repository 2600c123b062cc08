//! Schedulers and their flags.

use std::fmt;
use std::str::FromStr;

use crate::name::{InvalidName, Name};
use crate::wire::equal_as_written;

/// How a virtual server chooses a real server; the names are those of ipvsadm(8).
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum Scheduler {
    /// `rr`
    RoundRobin,
    /// `wrr`
    WeightedRoundRobin,
    /// `lc`
    LeastConnection,
    /// `wlc`
    WeightedLeastConnection,
    /// `lblc`
    LocalityBasedLeastConnection,
    /// `lblcr`
    LocalityBasedLeastConnectionWithReplication,
    /// `dh`
    DestinationHashing,
    /// `sh`
    SourceHashing,
    /// `sed`
    ShortestExpectedDelay,
    /// `nq`
    NeverQueue,
    /// `fo`
    WeightedFailover,
    /// `ovf`
    WeightedOverflow,
    /// `mh`
    MaglevHashing,
    /// `twos`
    PowerOfTwoChoices,
    /// One that this crate does not know; or `none`, which schedules nothing, and takes only
    /// connections that another node's kernel has told of.
    Other(Name),
}

equal_as_written!(Scheduler, it => it.name());

impl Scheduler {
    /// The schedulers of Linux 6.1.
    pub const ALL: [Self; 14] = [
        Self::RoundRobin,
        Self::WeightedRoundRobin,
        Self::LeastConnection,
        Self::WeightedLeastConnection,
        Self::LocalityBasedLeastConnection,
        Self::LocalityBasedLeastConnectionWithReplication,
        Self::DestinationHashing,
        Self::SourceHashing,
        Self::ShortestExpectedDelay,
        Self::NeverQueue,
        Self::WeightedFailover,
        Self::WeightedOverflow,
        Self::MaglevHashing,
        Self::PowerOfTwoChoices,
    ];

    /// The name the kernel knows it by; its module is `ip_vs_` and this name.
    pub fn name(&self) -> &str {
        match self {
            Self::RoundRobin => "rr",
            Self::WeightedRoundRobin => "wrr",
            Self::LeastConnection => "lc",
            Self::WeightedLeastConnection => "wlc",
            Self::LocalityBasedLeastConnection => "lblc",
            Self::LocalityBasedLeastConnectionWithReplication => "lblcr",
            Self::DestinationHashing => "dh",
            Self::SourceHashing => "sh",
            Self::ShortestExpectedDelay => "sed",
            Self::NeverQueue => "nq",
            Self::WeightedFailover => "fo",
            Self::WeightedOverflow => "ovf",
            Self::MaglevHashing => "mh",
            Self::PowerOfTwoChoices => "twos",
            Self::Other(name) => name.as_str(),
        }
    }
}

impl fmt::Display for Scheduler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Scheduler {
    type Err = InvalidName;

    fn from_str(name: &str) -> Result<Self, InvalidName> {
        match Self::ALL.into_iter().find(|scheduler| scheduler.name() == name) {
            Some(known) => Ok(known),
            None => name.parse().map(Self::Other),
        }
    }
}

const IP_VS_SVC_F_SCHED_SHIFT: u32 = 3;

/// The three flags a scheduler may give a meaning to (`ipvsadm -b`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SchedulerFlags(u8);

impl SchedulerFlags {
    /// No flag.
    pub const NONE: Self = Self(0);
    /// `flag-1`
    pub const FLAG_1: Self = Self(1);
    /// `flag-2`
    pub const FLAG_2: Self = Self(2);
    /// `flag-3`
    pub const FLAG_3: Self = Self(4);
    /// `sh-fallback`: another real server where the one hashed to takes no connections.
    pub const SH_FALLBACK: Self = Self::FLAG_1;
    /// `sh-port`: the source port is hashed too.
    pub const SH_PORT: Self = Self::FLAG_2;
    /// `mh-fallback`: as `sh-fallback`.
    pub const MH_FALLBACK: Self = Self::FLAG_1;
    /// `mh-port`: as `sh-port`.
    pub const MH_PORT: Self = Self::FLAG_2;

    /// Both sets of flags.
    #[must_use]
    pub const fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether all flags of `other` are set.
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// The flags that are set, under the names ipvsadm has for them with a scheduler.
    pub fn names(self, scheduler: Scheduler) -> impl Iterator<Item = &'static str> {
        let names = match scheduler {
            Scheduler::SourceHashing => ["sh-fallback", "sh-port", "flag-3"],
            Scheduler::MaglevHashing => ["mh-fallback", "mh-port", "flag-3"],
            _ => ["flag-1", "flag-2", "flag-3"],
        };
        names
            .into_iter()
            .zip([Self::FLAG_1, Self::FLAG_2, Self::FLAG_3])
            .filter_map(move |(name, flag)| self.contains(flag).then_some(name))
    }

    /// The flag of a name that ipvsadm knows, with whatever scheduler.
    pub fn from_name(name: &str) -> Option<Self> {
        Some(match name {
            "flag-1" | "sh-fallback" | "mh-fallback" => Self::FLAG_1,
            "flag-2" | "sh-port" | "mh-port" => Self::FLAG_2,
            "flag-3" => Self::FLAG_3,
            _ => return None,
        })
    }

    /// As in `IP_VS_SVC_F_SCHED1` to `IP_VS_SVC_F_SCHED3`.
    pub(crate) fn bits(self) -> u32 {
        u32::from(self.0) << IP_VS_SVC_F_SCHED_SHIFT
    }

    pub(crate) fn from_bits(flags: u32) -> Self {
        Self((flags >> IP_VS_SVC_F_SCHED_SHIFT & 7) as u8)
    }
}
