//! Words and options, as popt, the library of ipvsadm, understands them.

use super::error::{Fault, ParseError};

/// A word, or a part of one, and where it stands.
#[derive(Clone, Copy, Debug)]
pub(super) struct Word<'a> {
    pub(super) text: &'a str,
    /// The character of the line, from 1 on.
    pub(super) column: usize,
}

impl Word<'_> {
    pub(super) fn error(self, fault: Fault) -> ParseError {
        ParseError { line: 1, column: self.column, word: self.text.to_owned(), fault }
    }
}

/// The options of rules, commands first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    AddService,
    EditService,
    DeleteService,
    AddServer,
    EditServer,
    DeleteServer,
    Clear,
    Zero,
    Set,
    StartDaemon,
    StopDaemon,
    TcpService,
    UdpService,
    SctpService,
    FwmarkService,
    Ipv6,
    Scheduler,
    Persistent,
    Netmask,
    Engine,
    OnePacket,
    SchedulerFlags,
    RealServer,
    Gatewaying,
    Ipip,
    Masquerading,
    Weight,
    UpperThreshold,
    LowerThreshold,
    TunnelType,
    TunnelPort,
    TunnelNoChecksum,
    TunnelChecksum,
    TunnelRemoteChecksum,
    McastInterface,
    SyncId,
    SyncMaxLength,
    McastGroup,
    McastPort,
    McastTtl,
}

/// Whether an option has a value, and which.
#[derive(Clone, Copy, Debug)]
enum OptionValue {
    None,
    /// A value in the same word, or the next word where that is no option.
    Optional,
    Required(&'static str),
}

/// An option as ipvsadm(8) has it.
struct Spec {
    kind: Kind,
    short: Option<char>,
    long: &'static str,
    value: OptionValue,
}

const fn spec(kind: Kind, short: char, long: &'static str, value: OptionValue) -> Spec {
    Spec { kind, short: Some(short), long, value }
}

const fn long(kind: Kind, long: &'static str, value: OptionValue) -> Spec {
    Spec { kind, short: None, long, value }
}

const SERVICE: OptionValue = OptionValue::Required("address:port");
const NUMBER: OptionValue = OptionValue::Required("a number");
const ROLE: OptionValue = OptionValue::Required("master or backup");

const SPECS: [Spec; 40] = [
    spec(Kind::AddService, 'A', "--add-service", OptionValue::None),
    spec(Kind::EditService, 'E', "--edit-service", OptionValue::None),
    spec(Kind::DeleteService, 'D', "--delete-service", OptionValue::None),
    spec(Kind::AddServer, 'a', "--add-server", OptionValue::None),
    spec(Kind::EditServer, 'e', "--edit-server", OptionValue::None),
    spec(Kind::DeleteServer, 'd', "--delete-server", OptionValue::None),
    spec(Kind::Clear, 'C', "--clear", OptionValue::None),
    spec(Kind::Zero, 'Z', "--zero", OptionValue::None),
    long(Kind::Set, "--set", OptionValue::None),
    long(Kind::StartDaemon, "--start-daemon", ROLE),
    long(Kind::StopDaemon, "--stop-daemon", ROLE),
    spec(Kind::TcpService, 't', "--tcp-service", SERVICE),
    spec(Kind::UdpService, 'u', "--udp-service", SERVICE),
    long(Kind::SctpService, "--sctp-service", SERVICE),
    spec(Kind::FwmarkService, 'f', "--fwmark-service", OptionValue::Required("a firewall mark")),
    spec(Kind::Ipv6, '6', "--ipv6", OptionValue::None),
    spec(Kind::Scheduler, 's', "--scheduler", OptionValue::Required("the name of a scheduler")),
    spec(Kind::Persistent, 'p', "--persistent", OptionValue::Optional),
    spec(Kind::Netmask, 'M', "--netmask", OptionValue::Required("a mask")),
    long(Kind::Engine, "--pe", OptionValue::Required("the name of a persistence engine")),
    spec(Kind::OnePacket, 'o', "--ops", OptionValue::None),
    spec(
        Kind::SchedulerFlags,
        'b',
        "--sched-flags",
        OptionValue::Required("scheduler flags, with commas between them"),
    ),
    spec(Kind::RealServer, 'r', "--real-server", SERVICE),
    spec(Kind::Gatewaying, 'g', "--gatewaying", OptionValue::None),
    spec(Kind::Ipip, 'i', "--ipip", OptionValue::None),
    spec(Kind::Masquerading, 'm', "--masquerading", OptionValue::None),
    spec(Kind::Weight, 'w', "--weight", NUMBER),
    spec(Kind::UpperThreshold, 'x', "--u-threshold", NUMBER),
    spec(Kind::LowerThreshold, 'y', "--l-threshold", NUMBER),
    long(Kind::TunnelType, "--tun-type", OptionValue::Required("ipip, gue or gre")),
    long(Kind::TunnelPort, "--tun-port", NUMBER),
    long(Kind::TunnelNoChecksum, "--tun-nocsum", OptionValue::None),
    long(Kind::TunnelChecksum, "--tun-csum", OptionValue::None),
    long(Kind::TunnelRemoteChecksum, "--tun-remcsum", OptionValue::None),
    long(Kind::McastInterface, "--mcast-interface", OptionValue::Required("the name of an interface")),
    long(Kind::SyncId, "--syncid", NUMBER),
    long(Kind::SyncMaxLength, "--sync-maxlen", NUMBER),
    long(Kind::McastGroup, "--mcast-group", OptionValue::Required("a multicast address")),
    long(Kind::McastPort, "--mcast-port", NUMBER),
    long(Kind::McastTtl, "--mcast-ttl", NUMBER),
];

impl Kind {
    pub(super) fn is_command(self) -> bool {
        use Kind::{
            AddServer, AddService, Clear, DeleteServer, DeleteService, EditServer, EditService, Set, StartDaemon,
            StopDaemon, Zero,
        };
        matches!(
            self,
            AddService
                | EditService
                | DeleteService
                | AddServer
                | EditServer
                | DeleteServer
                | Clear
                | Zero
                | Set
                | StartDaemon
                | StopDaemon
        )
    }

    /// The long name, for messages.
    pub(super) fn name(self) -> &'static str {
        SPECS.iter().find(|spec| spec.kind == self).map_or("", |spec| spec.long)
    }
}

/// An option and its value.
#[derive(Clone, Copy, Debug)]
pub(super) struct Item<'a> {
    pub(super) kind: Kind,
    /// The option as it is written.
    pub(super) word: Word<'a>,
    pub(super) value: Option<Word<'a>>,
}

impl<'a> Item<'a> {
    /// The value of an option that has one, which [`read`] has made sure of.
    pub(super) fn value(&self) -> Word<'a> {
        self.value.unwrap_or(self.word)
    }
}

/// The words of a line. Quotes and backslashes mean nothing to ipvsadm.
pub(super) fn words(line: &str) -> impl Iterator<Item = Word<'_>> {
    // isspace() in C.
    let is_space = |c: char| matches!(c, ' ' | '\t' | '\n' | '\x0b' | '\x0c' | '\r');
    let mut column = 1;
    line.split(is_space).filter_map(move |text| {
        let word = Word { text, column };
        column += text.chars().count() + 1;
        (!text.is_empty()).then_some(word)
    })
}

/// Separates options, with their values, from other words.
pub(super) fn read<'a>(words: impl Iterator<Item = Word<'a>>) -> Result<(Vec<Item<'a>>, Vec<Word<'a>>), ParseError> {
    let mut words = words.peekable();
    let (mut items, mut others) = (Vec::new(), Vec::new());
    while let Some(word) = words.next() {
        if word.text == "--" {
            others.extend(words);
            break;
        }
        let Some(letters) = word.text.strip_prefix('-').filter(|letters| !letters.is_empty()) else {
            others.push(word);
            continue;
        };
        let mut next = |value, attached: Option<Word<'a>>, option: Word<'a>| match (value, attached) {
            (OptionValue::None, Some(_)) => Err(option.error(Fault::UnwantedValue)),
            (OptionValue::None, None) => Ok(None),
            (_, Some(value)) => Ok(Some(value)),
            (OptionValue::Optional, None) => Ok(words.next_if(|word| !word.text.starts_with('-'))),
            (OptionValue::Required(what), None) => {
                words.next().map(Some).ok_or_else(|| option.error(Fault::NoValue(what)))
            }
        };
        if letters.starts_with('-') {
            let (name, attached) = match word.text.split_once('=') {
                Some((name, value)) => (name, Some(suffix(word, word.text.len() - value.len()))),
                None => (word.text, None),
            };
            let spec = SPECS.iter().find(|spec| spec.long == name);
            let spec = spec.ok_or_else(|| word.error(Fault::UnknownOption))?;
            items.push(Item { kind: spec.kind, word, value: next(spec.value, attached, word)? });
            continue;
        }
        // Short options, up to one with a value, whose value the rest of the word is.
        for (index, letter) in letters.char_indices() {
            let rest = suffix(word, 1 + index + letter.len_utf8());
            // The hyphen belongs to the first.
            let option = Word { column: if index == 0 { word.column } else { rest.column - 1 }, ..word };
            let spec = SPECS.iter().find(|spec| spec.short == Some(letter));
            let spec = spec.ok_or_else(|| option.error(Fault::UnknownOption))?;
            let attached = match (spec.value, rest.text.starts_with('=')) {
                (_, true) => Some(suffix(rest, 1)),
                (OptionValue::None, false) => None,
                (_, false) => (!rest.text.is_empty()).then_some(rest),
            };
            items.push(Item { kind: spec.kind, word: option, value: next(spec.value, attached, option)? });
            if attached.is_some() {
                break;
            }
        }
    }
    Ok((items, others))
}

/// The part of a word from one of its bytes on.
pub(super) fn suffix(word: Word<'_>, from: usize) -> Word<'_> {
    let (before, text) = word.text.split_at_checked(from).unwrap_or((word.text, ""));
    Word { text, column: word.column + before.chars().count() }
}
