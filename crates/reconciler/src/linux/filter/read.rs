//! Reads the tables back. Only the needed attributes are decoded, by hand: an unknown attribute of another program's chain must not
//! make our own unreadable.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use ipvs_netlink::Family;
use netlink_batch::{Error, Socket};
use netlink_packet_core::{
    DecodeError, NetlinkDeserializable, NetlinkHeader, NlasIterator, parse_string, parse_u32_be,
};
use netlink_packet_netfilter::nftables::{
    ChainMessage, NfTablesMessage, RuleAttribute, RuleMessage, SetAttribute, SetElementList, SetElementMessage,
    SetMessage, TableMessage,
};
use netlink_packet_netfilter::{NetfilterHeader, NetfilterMessage, NetfilterProtoFamily};
use service_watch::{ObjectName, Protocol};

use super::super::errno::ENOENT;
use super::super::host::{DroppingChain, ForeignHook};
use super::message::{OWNED, PERSIST, UDATA_FINGERPRINT, header};
use crate::filter::expression::protocol_number;
use crate::filter::inventory::Inventory;
use crate::filter::ruleset::{HAIRPIN, HEALTH_CHECK_PORTS, SOURCE_RANGES, SOURCES_PREFIX, VIPS};
use crate::filter::{ObservedFilter, SetElement, SourceRangesElement, TABLE, set};
use crate::front_end::FrontEnd;
use crate::policy::Families;

/// An undecoded message of nfnetlink.
#[derive(Debug)]
pub(in crate::linux) struct RawMessage {
    /// The generation of the ruleset (`res_id` of `nfgenmsg`): the low half of a number that each transaction increments.
    generation: u16,
    attributes: Vec<u8>,
}

impl NetlinkDeserializable for RawMessage {
    type Error = DecodeError;

    fn deserialize(_: &NetlinkHeader, payload: &[u8]) -> Result<Self, DecodeError> {
        let [_, _, high, low, attributes @ ..] = payload else { return Err("a message of nfnetlink is short".into()) };
        Ok(Self { generation: u16::from_be_bytes([*high, *low]), attributes: attributes.to_vec() })
    }
}

impl RawMessage {
    fn attribute(&self, kind: u16) -> Option<&[u8]> {
        attribute(&self.attributes, kind)
    }

    fn text(&self, kind: u16) -> Option<String> {
        parse_string(self.attribute(kind)?).ok()
    }

    pub(in crate::linux) fn number(&self, kind: u16) -> Option<u32> {
        parse_u32_be(self.attribute(kind)?).ok()
    }
}

fn attribute(attributes: &[u8], wanted: u16) -> Option<&[u8]> {
    let mut rest = attributes;
    // By hand, since the items of the library's iterator do not outlive it.
    while let [a, b, c, d, ..] = *rest {
        let length = usize::from(u16::from_ne_bytes([a, b]));
        let kind = u16::from_ne_bytes([c, d]) & netlink_packet_core::NLA_TYPE_MASK;
        let value = rest.get(4..length)?;
        if kind == wanted {
            return Some(value);
        }
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    None
}

// linux/netfilter/nf_tables.h
const NFTA_TABLE_NAME: u16 = 1;
const NFTA_TABLE_FLAGS: u16 = 2;
const NFTA_CHAIN_TABLE: u16 = 1;
const NFTA_CHAIN_NAME: u16 = 3;
const NFTA_CHAIN_HOOK: u16 = 4;
const NFTA_CHAIN_POLICY: u16 = 5;
const NFTA_CHAIN_TYPE: u16 = 7;
const NFTA_HOOK_HOOKNUM: u16 = 1;
const NFTA_HOOK_PRIORITY: u16 = 2;
const NFTA_RULE_TABLE: u16 = 1;
const NFTA_RULE_CHAIN: u16 = 2;
const NFTA_RULE_USERDATA: u16 = 7;
const NFTA_SET_TABLE: u16 = 1;
const NFTA_SET_NAME: u16 = 2;
const NFTA_SET_FLAGS: u16 = 3;
const NFTA_SET_KEY_LEN: u16 = 5;
const NFTA_SET_DATA_TYPE: u16 = 6;
const NFT_SET_ANONYMOUS: u32 = 1;
const NFTA_SET_ELEM_LIST_ELEMENTS: u16 = 3;
const NFTA_SET_ELEM_KEY: u16 = 1;
const NFTA_SET_ELEM_DATA: u16 = 2;
const NFTA_DATA_VALUE: u16 = 1;
const NFTA_DATA_VERDICT: u16 = 2;
const NFTA_VERDICT_CHAIN: u16 = 2;
const NF_ACCEPT: u32 = 1;

/// How often a read is attempted while other programs change their tables.
const ATTEMPTS: u32 = 5;

/// Several dumps that should be of one generation of the ruleset.
#[derive(Debug, Default)]
struct Snapshot {
    generation: Option<u16>,
    /// Whether the generation changed between them.
    is_inconsistent: bool,
}

impl Snapshot {
    fn dump(
        &mut self,
        socket: &mut Socket,
        family: Family,
        message: NfTablesMessage,
        mut each: impl FnMut(RawMessage),
    ) -> Result<(), Error> {
        socket.dump(&NetfilterMessage::new(header(family), message), |raw: RawMessage| {
            self.is_inconsistent |= *self.generation.get_or_insert(raw.generation) != raw.generation;
            each(raw);
        })
    }
}

/// The families that have a table of this program, with its flags: a dormant table has no effect.
pub fn tables(socket: &mut Socket, families: impl Iterator<Item = Family>) -> Result<Vec<(Family, u32)>, Error> {
    find_tables(socket, families, &mut Snapshot::default())
}

fn find_tables(
    socket: &mut Socket,
    families: impl Iterator<Item = Family>,
    snapshot: &mut Snapshot,
) -> Result<Vec<(Family, u32)>, Error> {
    let mut found = Vec::new();
    for family in families {
        snapshot.dump(socket, family, NfTablesMessage::GetTable(TableMessage { attributes: vec![] }), |table| {
            if table.text(NFTA_TABLE_NAME).as_deref() == Some(TABLE) {
                found.push((family, table.number(NFTA_TABLE_FLAGS).unwrap_or(0)));
            }
        })?;
    }
    Ok(found)
}

/// Reads the tables of these families in one generation of the ruleset; after several attempts, in more than one.
///
/// If `owned`, a table that cannot be adopted, since it was made without `NFT_TABLE_F_PERSIST`, differs from the desired one.
pub fn read(socket: &mut Socket, families: Families, owned: bool) -> Result<ObservedFilter, Error> {
    let mut attempts = 0;
    loop {
        attempts += 1;
        let mut snapshot = Snapshot::default();
        match read_once(socket, families, owned, &mut snapshot) {
            // Another program deleted a table while it was read.
            Err(error) if attempts < ATTEMPTS && error.refusal().is_some_and(|it| it.errno == ENOENT) => {}
            Ok(_) if attempts < ATTEMPTS && snapshot.is_inconsistent => {}
            result => return result,
        }
    }
}

fn read_once(
    socket: &mut Socket,
    families: Families,
    owned: bool,
    snapshot: &mut Snapshot,
) -> Result<ObservedFilter, Error> {
    let mut observed = ObservedFilter::default();
    for (family, flags) in find_tables(socket, families.iter(), snapshot)? {
        let mut inventory = Inventory::default();
        let is_lasting = !owned || flags & PERSIST.bits() != 0;
        inventory.table(if is_lasting { flags & !OWNED.bits() } else { flags | PERSIST.bits() });
        read_sets(socket, family, &mut inventory, snapshot)?;
        read_chains(socket, family, &mut inventory, &mut observed, snapshot)?;
        read_elements(socket, family, &mut inventory, &mut observed, snapshot)?;
        observed.rulesets.insert(family, inventory.fingerprint());
    }
    Ok(observed)
}

/// The chains at the input and forward hooks whose policy is drop.
///
/// A packet that one table accepts can still be dropped by another.
pub(in crate::linux) fn dropping_chains(socket: &mut Socket) -> Result<Vec<DroppingChain>, Error> {
    const INPUT: u32 = 1;
    const FORWARD: u32 = 2;
    const NF_DROP: u32 = 0;
    let mut found = Vec::new();
    let families = [NetfilterProtoFamily::IPv4, NetfilterProtoFamily::IPv6, NetfilterProtoFamily::Inet];
    for (family, word) in families.into_iter().zip(["ip", "ip6", "inet"]) {
        let message = NfTablesMessage::GetChain(ChainMessage { attributes: vec![] });
        let message = NetfilterMessage::new(NetfilterHeader::new(family, 0, 0), message);
        socket.dump(&message, |chain: RawMessage| {
            let hook = chain.attribute(NFTA_CHAIN_HOOK).and_then(|hook| attribute(hook, NFTA_HOOK_HOOKNUM));
            let hook = match hook.and_then(|hook| parse_u32_be(hook).ok()) {
                Some(INPUT) => ForeignHook::Input,
                Some(FORWARD) => ForeignHook::Forward,
                _ => return,
            };
            if chain.number(NFTA_CHAIN_POLICY) == Some(NF_DROP) {
                let text = |kind| chain.text(kind).unwrap_or_default();
                found.push(DroppingChain {
                    hook,
                    family: word,
                    table: text(NFTA_CHAIN_TABLE),
                    chain: text(NFTA_CHAIN_NAME),
                });
            }
        })?;
    }
    Ok(found)
}

fn read_sets(
    socket: &mut Socket,
    family: Family,
    inventory: &mut Inventory,
    snapshot: &mut Snapshot,
) -> Result<(), Error> {
    let attributes = vec![SetAttribute::Table(TABLE.into())];
    snapshot.dump(socket, family, NfTablesMessage::GetSet(SetMessage { attributes }), |set| {
        let is_anonymous = set.number(NFTA_SET_FLAGS).unwrap_or(0) & NFT_SET_ANONYMOUS != 0;
        if set.text(NFTA_SET_TABLE).as_deref() == Some(TABLE) && !is_anonymous {
            let name = set.text(NFTA_SET_NAME).unwrap_or_default();
            let number = |kind| set.number(kind).unwrap_or(0);
            inventory.set(&name, number(NFTA_SET_KEY_LEN), number(NFTA_SET_DATA_TYPE));
        }
    })
}

fn read_chains(
    socket: &mut Socket,
    family: Family,
    inventory: &mut Inventory,
    observed: &mut ObservedFilter,
    snapshot: &mut Snapshot,
) -> Result<(), Error> {
    let mut rules: BTreeMap<String, Vec<u64>> = BTreeMap::new();
    let attributes = vec![RuleAttribute::Table(TABLE.into())];
    snapshot.dump(socket, family, NfTablesMessage::GetRule(RuleMessage { attributes }), |rule| {
        if rule.text(NFTA_RULE_TABLE).as_deref() == Some(TABLE) {
            let chain = rule.text(NFTA_RULE_CHAIN).unwrap_or_default();
            let user_data = rule.attribute(NFTA_RULE_USERDATA).unwrap_or_default();
            rules.entry(chain).or_default().push(rule_fingerprint(user_data).unwrap_or(0));
        }
    })?;
    snapshot.dump(socket, family, NfTablesMessage::GetChain(ChainMessage { attributes: vec![] }), |chain| {
        if chain.text(NFTA_CHAIN_TABLE).as_deref() != Some(TABLE) {
            return;
        }
        let name = chain.text(NFTA_CHAIN_NAME).unwrap_or_default();
        let rules = rules.get(&name).map(Vec::as_slice).unwrap_or_default();
        if let Some(service) = service_of_chain(&name) {
            let fingerprint = if let [only] = rules { *only } else { 0 };
            observed.source_ranges.insert((service, family), fingerprint);
            return;
        }
        let kind = chain.text(NFTA_CHAIN_TYPE);
        let base = chain.attribute(NFTA_CHAIN_HOOK).map(|hook| {
            let number = |kind| attribute(hook, kind).and_then(|value| parse_u32_be(value).ok()).unwrap_or(u32::MAX);
            // A chain with another policy differs.
            let is_accept = chain.number(NFTA_CHAIN_POLICY).unwrap_or(NF_ACCEPT) == NF_ACCEPT;
            let kind = kind.as_deref().filter(|_| is_accept).unwrap_or("");
            (kind, number(NFTA_HOOK_HOOKNUM), number(NFTA_HOOK_PRIORITY).cast_signed())
        });
        inventory.chain(&name, base, rules);
    })
}

/// The Service whose source ranges a chain has.
fn service_of_chain(chain: &str) -> Option<ObjectName> {
    let (namespace, name) = chain.strip_prefix(SOURCES_PREFIX)?.split_once('/')?;
    Some(ObjectName::new(namespace, name))
}

/// The fingerprint in a rule's user data.
fn rule_fingerprint(mut user_data: &[u8]) -> Option<u64> {
    while let [kind, length, rest @ ..] = user_data {
        let value = rest.get(..usize::from(*length))?;
        if *kind == UDATA_FINGERPRINT {
            return value.try_into().ok().map(u64::from_be_bytes);
        }
        user_data = &rest[value.len()..];
    }
    None
}

fn read_elements(
    socket: &mut Socket,
    family: Family,
    inventory: &mut Inventory,
    observed: &mut ObservedFilter,
    snapshot: &mut Snapshot,
) -> Result<(), Error> {
    let others = [SOURCE_RANGES, VIPS, HAIRPIN, HEALTH_CHECK_PORTS];
    for set in set::NAMES.iter().map(|(_, name)| *name).chain(others) {
        let attributes = vec![SetElementList::Table(TABLE.into()), SetElementList::Set(set.into())];
        let message = NfTablesMessage::GetSetElement(SetElementMessage { attributes });
        let mut is_ours = true;
        let read = snapshot.dump(socket, family, message, |list| {
            let elements = list.attribute(NFTA_SET_ELEM_LIST_ELEMENTS).unwrap_or_default();
            for element in NlasIterator::new(elements).flatten() {
                is_ours &= decode_element(family, set, element.value(), observed).is_some();
            }
        });
        match read {
            // If the set is missing, the inventory differs already, unless the set was deleted just now.
            Err(error) if error.refusal().is_some() => snapshot.is_inconsistent |= inventory.has_set(set),
            read => read?,
        }
        if !is_ours {
            inventory.set(&format!("{set} with foreign elements"), 0, 0);
        }
    }
    Ok(())
}

/// Decodes an element. `None` if this program never writes such an element.
fn decode_element(family: Family, set: &str, element: &[u8], observed: &mut ObservedFilter) -> Option<()> {
    let key = attribute(attribute(element, NFTA_SET_ELEM_KEY)?, NFTA_DATA_VALUE)?;
    let data = attribute(element, NFTA_SET_ELEM_DATA);
    match set {
        SOURCE_RANGES => {
            let chain = attribute(attribute(data?, NFTA_DATA_VERDICT)?, NFTA_VERDICT_CHAIN);
            let service = chain.and_then(|chain| parse_string(chain).ok()).and_then(|chain| service_of_chain(&chain));
            observed.front_ends.entry(front_end(family, key)?).or_default().source_ranges =
                service.map_or(SourceRangesElement::Foreign, SourceRangesElement::Service);
        }
        VIPS => {
            observed.elements.insert(SetElement::Vip(address(family, key)?.0));
        }
        HAIRPIN => {
            let (source, rest) = address(family, key)?;
            let FrontEnd { address, port, protocol } = front_end(family, rest)?;
            if source != address {
                return None;
            }
            observed.elements.insert(SetElement::Hairpin(SocketAddr::new(address, port), protocol));
        }
        HEALTH_CHECK_PORTS => {
            let [high, low, ..] = *key else { return None };
            observed.elements.insert(SetElement::HealthCheckPort(family, u16::from_be_bytes([high, low])));
        }
        _ => {
            let (bit, _) = set::NAMES.iter().find(|(_, name)| *name == set)?;
            observed.front_ends.entry(front_end(family, key)?).or_default().sets |= bit;
        }
    }
    Some(())
}

fn front_end(family: Family, key: &[u8]) -> Option<FrontEnd> {
    let (address, rest) = address(family, key)?;
    let [number, _, _, _, high, low, ..] = *rest else { return None };
    let protocol =
        [Protocol::Tcp, Protocol::Udp, Protocol::Sctp].into_iter().find(|p| protocol_number(*p) == number)?;
    Some(FrontEnd { address, port: u16::from_be_bytes([high, low]), protocol })
}

fn address(family: Family, key: &[u8]) -> Option<(IpAddr, &[u8])> {
    Some(match family {
        Family::Ipv4 => {
            let (octets, rest) = key.split_first_chunk::<4>()?;
            (IpAddr::from(*octets), rest)
        }
        Family::Ipv6 => {
            let (octets, rest) = key.split_first_chunk::<16>()?;
            (IpAddr::from(*octets), rest)
        }
    })
}

/// Decodes a table, a chain, a rule, and the elements of each set.
#[cfg(fuzzing)]
pub(crate) fn fuzz(header: &NetlinkHeader, payload: &[u8]) {
    let Ok(raw) = RawMessage::deserialize(header, payload) else { return };
    for kind in 0..16 {
        let _ = (raw.number(kind), raw.text(kind).and_then(|name| service_of_chain(&name)));
    }
    let _ = rule_fingerprint(raw.attribute(NFTA_RULE_USERDATA).unwrap_or_default());
    let elements = raw.attribute(NFTA_SET_ELEM_LIST_ELEMENTS).unwrap_or_default();
    let others = [SOURCE_RANGES, VIPS, HAIRPIN, HEALTH_CHECK_PORTS];
    for set in set::NAMES.iter().map(|(_, name)| *name).chain(others) {
        for family in [Family::Ipv4, Family::Ipv6] {
            for element in NlasIterator::new(elements).flatten() {
                let _ = decode_element(family, set, element.value(), &mut ObservedFilter::default());
            }
        }
    }
}
