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
enum Takes {
    Nothing,
    /// A value in the same word, or the next word where that is no option.
    Maybe,
    Value(&'static str),
}

/// An option as ipvsadm(8) has it.
struct Spec {
    kind: Kind,
    short: Option<char>,
    long: &'static str,
    takes: Takes,
}

const fn spec(kind: Kind, short: char, long: &'static str, takes: Takes) -> Spec {
    Spec { kind, short: Some(short), long, takes }
}

const fn long(kind: Kind, long: &'static str, takes: Takes) -> Spec {
    Spec { kind, short: None, long, takes }
}

const SERVICE: Takes = Takes::Value("address:port");
const NUMBER: Takes = Takes::Value("a number");
const ROLE: Takes = Takes::Value("master or backup");

const SPECS: [Spec; 40] = [
    spec(Kind::AddService, 'A', "--add-service", Takes::Nothing),
    spec(Kind::EditService, 'E', "--edit-service", Takes::Nothing),
    spec(Kind::DeleteService, 'D', "--delete-service", Takes::Nothing),
    spec(Kind::AddServer, 'a', "--add-server", Takes::Nothing),
    spec(Kind::EditServer, 'e', "--edit-server", Takes::Nothing),
    spec(Kind::DeleteServer, 'd', "--delete-server", Takes::Nothing),
    spec(Kind::Clear, 'C', "--clear", Takes::Nothing),
    spec(Kind::Zero, 'Z', "--zero", Takes::Nothing),
    long(Kind::Set, "--set", Takes::Nothing),
    long(Kind::StartDaemon, "--start-daemon", ROLE),
    long(Kind::StopDaemon, "--stop-daemon", ROLE),
    spec(Kind::TcpService, 't', "--tcp-service", SERVICE),
    spec(Kind::UdpService, 'u', "--udp-service", SERVICE),
    long(Kind::SctpService, "--sctp-service", SERVICE),
    spec(Kind::FwmarkService, 'f', "--fwmark-service", Takes::Value("a firewall mark")),
    spec(Kind::Ipv6, '6', "--ipv6", Takes::Nothing),
    spec(Kind::Scheduler, 's', "--scheduler", Takes::Value("the name of a scheduler")),
    spec(Kind::Persistent, 'p', "--persistent", Takes::Maybe),
    spec(Kind::Netmask, 'M', "--netmask", Takes::Value("a mask")),
    long(Kind::Engine, "--pe", Takes::Value("the name of a persistence engine")),
    spec(Kind::OnePacket, 'o', "--ops", Takes::Nothing),
    spec(Kind::SchedulerFlags, 'b', "--sched-flags", Takes::Value("scheduler flags, with commas between them")),
    spec(Kind::RealServer, 'r', "--real-server", SERVICE),
    spec(Kind::Gatewaying, 'g', "--gatewaying", Takes::Nothing),
    spec(Kind::Ipip, 'i', "--ipip", Takes::Nothing),
    spec(Kind::Masquerading, 'm', "--masquerading", Takes::Nothing),
    spec(Kind::Weight, 'w', "--weight", NUMBER),
    spec(Kind::UpperThreshold, 'x', "--u-threshold", NUMBER),
    spec(Kind::LowerThreshold, 'y', "--l-threshold", NUMBER),
    long(Kind::TunnelType, "--tun-type", Takes::Value("ipip, gue or gre")),
    long(Kind::TunnelPort, "--tun-port", NUMBER),
    long(Kind::TunnelNoChecksum, "--tun-nocsum", Takes::Nothing),
    long(Kind::TunnelChecksum, "--tun-csum", Takes::Nothing),
    long(Kind::TunnelRemoteChecksum, "--tun-remcsum", Takes::Nothing),
    long(Kind::McastInterface, "--mcast-interface", Takes::Value("the name of an interface")),
    long(Kind::SyncId, "--syncid", NUMBER),
    long(Kind::SyncMaxLength, "--sync-maxlen", NUMBER),
    long(Kind::McastGroup, "--mcast-group", Takes::Value("a multicast address")),
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

/// Tells options, with their values, from other words.
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
        let mut next = |takes, attached: Option<Word<'a>>, option: Word<'a>| match (takes, attached) {
            (Takes::Nothing, Some(_)) => Err(option.error(Fault::UnwantedValue)),
            (Takes::Nothing, None) => Ok(None),
            (_, Some(value)) => Ok(Some(value)),
            (Takes::Maybe, None) => Ok(words.next_if(|word| !word.text.starts_with('-'))),
            (Takes::Value(what), None) => words.next().map(Some).ok_or_else(|| option.error(Fault::NoValue(what))),
        };
        if letters.starts_with('-') {
            let (name, attached) = match word.text.split_once('=') {
                Some((name, value)) => (name, Some(part(word, word.text.len() - value.len()))),
                None => (word.text, None),
            };
            let spec = SPECS.iter().find(|spec| spec.long == name);
            let spec = spec.ok_or_else(|| word.error(Fault::UnknownOption))?;
            items.push(Item { kind: spec.kind, word, value: next(spec.takes, attached, word)? });
            continue;
        }
        // Short options, up to one with a value, whose value the rest of the word is.
        for (index, letter) in letters.char_indices() {
            let rest = part(word, 1 + index + letter.len_utf8());
            // The hyphen belongs to the first.
            let option = Word { column: if index == 0 { word.column } else { rest.column - 1 }, ..word };
            let spec = SPECS.iter().find(|spec| spec.short == Some(letter));
            let spec = spec.ok_or_else(|| option.error(Fault::UnknownOption))?;
            let attached = match (spec.takes, rest.text.starts_with('=')) {
                (_, true) => Some(part(rest, 1)),
                (Takes::Nothing, false) => None,
                (_, false) => (!rest.text.is_empty()).then_some(rest),
            };
            items.push(Item { kind: spec.kind, word: option, value: next(spec.takes, attached, option)? });
            if attached.is_some() {
                break;
            }
        }
    }
    Ok((items, others))
}

/// A word from one of its bytes on.
pub(super) fn part(word: Word<'_>, from: usize) -> Word<'_> {
    let (before, text) = word.text.split_at_checked(from).unwrap_or((word.text, ""));
    Word { text, column: word.column + before.chars().count() }
}
