//! The tables and their elements as messages of `nf_tables`, ordered within a transaction: an object is created before those that refer
//! to it, and deleted after them.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use ipvs_netlink::Family;
use netlink_batch::Request;
use netlink_packet_core::{Emitable, NLA_HEADER_SIZE, NLM_F_APPEND, NLM_F_CREATE};
use netlink_packet_netfilter::nftables::{
    ChainAttribute, ChainMessage, DataAttribute, Hook, HookNumber, ListAttribute, NfTablesMessage, RuleAttribute,
    RuleMessage, SetAttribute, SetElementAttribute, SetElementFlags, SetElementList, SetElementMessage, SetFlags,
    SetMessage, TableAttribute, TableFlags, TableMessage,
};
use netlink_packet_netfilter::none::ControlMessage;
use netlink_packet_netfilter::{NetfilterHeader, NetfilterMessage, NetfilterProtoFamily};
use service_watch::{ObjectName, Protocol};

use crate::filter::expression::{
    Field, Verdict, is_not_in_anonymous, load, octets, protocol_family, protocol_number, register, verdict,
};
use crate::filter::ruleset::{
    HAIRPIN, HEALTH_CHECK_PORTS, Rule, Ruleset, SOURCE_RANGES, SOURCES_PREFIX, Set, VERDICT, VIPS, address_type,
};
use crate::filter::{FrontEndElements, SetElement, SourceRanges, SourceRangesElement, TABLE, TableContents, set};
use crate::front_end::FrontEnd;

/// The length of an attribute has 16 bits, so a list of elements is split into messages of at most this many bytes.
const LIST_BYTES: usize = 48 * 1024;
/// `NFNL_SUBSYS_NFTABLES`.
const SUBSYSTEM: u16 = 10;
/// The name of anonymous sets. The kernel replaces `%d` by a number.
const ANONYMOUS: &str = "__set%d";

/// Types in a rule's user data, in the layout of `libnftnl`: a comment, and a fingerprint, which `nft` ignores.
const UDATA_COMMENT: u8 = 0;
pub(crate) const UDATA_FINGERPRINT: u8 = 0x4b;

/// The flags of a table that belongs to the socket which created or adopted it: others can neither change nor flush it
/// (`NFT_TABLE_F_OWNER`, since Linux 5.12), and it outlives the socket, without an owner (`NFT_TABLE_F_PERSIST`, since 6.9).
pub(crate) const OWNED: TableFlags = TableFlags::Owner.union(PERSIST);
pub(crate) const PERSIST: TableFlags = TableFlags::from_bits_retain(4);

/// An element of a set or map.
type Element = Vec<SetElementAttribute>;

/// Changes to the tables that take effect together.
#[derive(Debug, Default)]
pub struct Transaction {
    tables: Vec<Request<NetfilterMessage>>,
    removed: BTreeMap<(Family, &'static str), Vec<Element>>,
    source_ranges: Vec<Request<NetfilterMessage>>,
    added: BTreeMap<(Family, &'static str), Vec<Element>>,
    removed_source_ranges: Vec<Request<NetfilterMessage>>,
    last_set_id: u32,
    /// The flags of tables that it creates.
    table_flags: TableFlags,
}

impl Transaction {
    /// A transaction whose tables belong to the socket that sends it, and outlive it, if `owned`.
    pub fn new(owned: bool) -> Self {
        let table_flags = if owned { OWNED } else { TableFlags::empty() };
        Self { table_flags, ..Self::default() }
    }

    /// Takes possession of a table that belongs to no socket. Creates it if it does not exist.
    pub fn own_table(&mut self, family: Family, name: &str) {
        let attributes = vec![TableAttribute::Name(name.into()), TableAttribute::Flags(OWNED)];
        self.tables.push(create(family, NfTablesMessage::NewTable(TableMessage { attributes })));
    }

    /// The messages that begin and end a transaction.
    pub fn begin_and_end() -> (NetfilterMessage, NetfilterMessage) {
        let message =
            |content| NetfilterMessage::new(NetfilterHeader::new(NetfilterProtoFamily::Unspec, 0, SUBSYSTEM), content);
        (message(ControlMessage::BatchBegin), message(ControlMessage::BatchEnd))
    }

    /// The messages between them.
    pub fn into_requests(self) -> Vec<Request<NetfilterMessage>> {
        let mut requests = self.tables;
        let elements = |(key, elements): ((Family, &'static str), Vec<Element>), is_new: bool| {
            let (family, set) = key;
            split_elements(elements).into_iter().map(move |piece| set_elements(family, set, None, piece, is_new))
        };
        requests.extend(self.removed.into_iter().flat_map(|set| elements(set, false)));
        requests.extend(self.source_ranges);
        requests.extend(self.added.into_iter().flat_map(|set| elements(set, true)));
        requests.extend(self.removed_source_ranges);
        requests
    }

    /// Builds a family's table, in place of one that exists.
    pub fn build(&mut self, ruleset: &Ruleset, exists: bool, contents: &TableContents) {
        let family = ruleset.family();
        if exists {
            self.delete_table(family, TABLE);
        }
        let attributes = vec![TableAttribute::Name(TABLE.into()), TableAttribute::Flags(self.table_flags)];
        self.tables.push(create(family, NfTablesMessage::NewTable(TableMessage { attributes })));
        for set in ruleset.sets() {
            let id = self.next_set_id();
            self.tables.push(create(family, new_set(&set, id)));
        }
        let chains = ruleset.chains();
        for chain in &chains {
            let mut attributes = vec![ChainAttribute::Table(TABLE.into()), ChainAttribute::Name(chain.name.clone())];
            if let Some(base) = chain.base {
                attributes.push(ChainAttribute::Hook(vec![
                    Hook::Number(HookNumber::Other(base.hook)),
                    Hook::Priority(base.priority.cast_unsigned()),
                ]));
                attributes.push(ChainAttribute::Type(base.kind.into()));
            }
            self.tables.push(create(family, NfTablesMessage::NewChain(ChainMessage { attributes })));
        }
        for chain in &chains {
            let rules = chain.rules.iter().map(|rule| new_rule(family, &chain.name, rule, rule.fingerprint()));
            self.tables.extend(rules);
        }
        for (service, ranges) in &contents.source_ranges {
            self.set_source_ranges(service, family, ranges);
        }
        for (front_end, rule) in &contents.front_ends {
            self.set_front_end(*front_end, &FrontEndElements::default(), &rule.into());
        }
        for element in &contents.elements {
            self.add_element(*element);
        }
    }

    /// Deletes a family's table.
    pub fn delete_table(&mut self, family: Family, name: &str) {
        let attributes = vec![TableAttribute::Name(name.into())];
        self.tables.push(request(family, NfTablesMessage::DeleteTable(TableMessage { attributes }), 0));
    }

    /// Replaces the elements of a front end.
    pub fn set_front_end(&mut self, front_end: FrontEnd, before: &FrontEndElements, after: &FrontEndElements) {
        let family = Family::of(front_end.address);
        let key = || SetElementAttribute::Key(DataAttribute::Value(front_end_key(&front_end)));
        // An element of a map has a verdict; an element of a set has none.
        let mut change = |set: &'static str, is_before: bool, after: Option<Option<DataAttribute>>| {
            if is_before {
                self.removed.entry((family, set)).or_default().push(vec![key()]);
            }
            if let Some(data) = after {
                let element = [key()].into_iter().chain(data.map(SetElementAttribute::Data));
                self.added.entry((family, set)).or_default().push(element.collect());
            }
        };
        for (set, name) in set::NAMES {
            match (before.sets & set != 0, after.sets & set != 0) {
                (false, true) => change(name, false, Some(None)),
                (true, false) => change(name, true, None),
                _ => {}
            }
        }
        if before.source_ranges != after.source_ranges {
            // Another program's verdict is not one that is ever written here.
            let verdict = match &after.source_ranges {
                SourceRangesElement::Service(service) => Some(Verdict::Jump(source_ranges_chain(service)).data()),
                SourceRangesElement::Absent | SourceRangesElement::Foreign => None,
            };
            change(SOURCE_RANGES, before.source_ranges != SourceRangesElement::Absent, verdict.map(Some));
        }
    }

    /// Adds an element to a set that is not about front ends.
    pub fn add_element(&mut self, element: SetElement) {
        let (set, attributes) = encode_element(element);
        self.added.entry((element.family(), set)).or_default().push(attributes);
    }

    /// Deletes an element from a set that is not about front ends.
    pub fn remove_element(&mut self, element: SetElement) {
        let (set, attributes) = encode_element(element);
        self.removed.entry((element.family(), set)).or_default().push(attributes);
    }

    /// Creates the chain with a Service's source ranges, or replaces its rule.
    pub fn set_source_ranges(&mut self, service: &ObjectName, family: Family, ranges: &SourceRanges) {
        let chain = source_ranges_chain(service);
        let attributes = vec![ChainAttribute::Table(TABLE.into()), ChainAttribute::Name(chain.clone())];
        self.source_ranges.push(create(family, NfTablesMessage::NewChain(ChainMessage { attributes })));
        let attributes = vec![RuleAttribute::Table(TABLE.into()), RuleAttribute::Chain(chain.clone())];
        self.source_ranges.push(request(family, NfTablesMessage::DeleteRule(RuleMessage { attributes }), 0));

        let mut elements = ranges.iter().flat_map(interval).peekable();
        let mut expressions = Vec::new();
        if elements.peek().is_some() {
            // Before Linux 5.6 intervals cannot be part of a concatenation, so they need a set of their own. An anonymous set is deleted
            // with its rule.
            let id = self.next_set_id();
            self.source_ranges.push(create(family, new_interval_set(family, id)));
            for piece in split_elements(elements.collect()) {
                self.source_ranges.push(set_elements(family, ANONYMOUS, Some(id), piece, true));
            }
            expressions
                .push(vec![load(Field::source(family), register(0)), is_not_in_anonymous(ANONYMOUS, id, register(0))]);
        }
        expressions.push(vec![verdict(&Verdict::Drop)]);
        let rule = Rule::new("from elsewhere", expressions);
        self.source_ranges.push(new_rule(family, &chain, &rule, ranges.fingerprint()));
    }

    /// Deletes the chain with a Service's source ranges.
    pub fn remove_source_ranges(&mut self, service: &ObjectName, family: Family) {
        let attributes = vec![ChainAttribute::Table(TABLE.into()), ChainAttribute::Name(source_ranges_chain(service))];
        self.removed_source_ranges.push(request(family, NfTablesMessage::DeleteChain(ChainMessage { attributes }), 0));
    }

    fn next_set_id(&mut self) -> u32 {
        self.last_set_id += 1;
        self.last_set_id
    }
}

pub(crate) fn header(family: Family) -> NetfilterHeader {
    NetfilterHeader::new(NetfilterProtoFamily::from(protocol_family(family)), 0, 0)
}

fn request(family: Family, message: NfTablesMessage, flags: u16) -> Request<NetfilterMessage> {
    Request { message: NetfilterMessage::new(header(family), message), flags }
}

fn create(family: Family, message: NfTablesMessage) -> Request<NetfilterMessage> {
    request(family, message, NLM_F_CREATE)
}

fn new_set(set: &Set, id: u32) -> NfTablesMessage {
    let mut attributes = vec![
        SetAttribute::Table(TABLE.into()),
        SetAttribute::Name(set.name.into()),
        SetAttribute::KeyType(set.key_type),
        SetAttribute::KeyLen(set.key_bytes),
        SetAttribute::Id(id),
    ];
    if set.is_map {
        attributes.push(SetAttribute::Flags(SetFlags::Map));
        attributes.push(SetAttribute::DataType(VERDICT));
    }
    NfTablesMessage::NewSet(SetMessage { attributes })
}

fn new_interval_set(family: Family, id: u32) -> NfTablesMessage {
    NfTablesMessage::NewSet(SetMessage {
        attributes: vec![
            SetAttribute::Table(TABLE.into()),
            SetAttribute::Name(ANONYMOUS.into()),
            SetAttribute::Flags(SetFlags::Anonymous | SetFlags::Constant | SetFlags::Interval),
            SetAttribute::KeyType(address_type(family)),
            SetAttribute::KeyLen(Field::source(family).length),
            SetAttribute::Id(id),
        ],
    })
}

/// Splits elements into lists that fit into an attribute each.
fn split_elements(elements: Vec<Element>) -> Vec<Vec<Element>> {
    let mut pieces: Vec<Vec<Element>> = Vec::new();
    let mut bytes = LIST_BYTES;
    for element in elements {
        let length = element.as_slice().buffer_len() + NLA_HEADER_SIZE;
        bytes += length;
        match pieces.last_mut() {
            Some(piece) if bytes <= LIST_BYTES => piece.push(element),
            _ => {
                bytes = length;
                pieces.push(vec![element]);
            }
        }
    }
    pieces
}

fn set_elements(
    family: Family,
    set: &str,
    id: Option<u32>,
    elements: Vec<Element>,
    is_new: bool,
) -> Request<NetfilterMessage> {
    let mut attributes = vec![SetElementList::Table(TABLE.into()), SetElementList::Set(set.into())];
    attributes.extend(id.map(SetElementList::SetId));
    attributes.push(SetElementList::Elements(elements.into_iter().map(ListAttribute::Element).collect()));
    let message = SetElementMessage { attributes };
    if is_new {
        create(family, NfTablesMessage::NewSetElement(message))
    } else {
        request(family, NfTablesMessage::DeleteSetElement(message), 0)
    }
}

fn new_rule(family: Family, chain: &str, rule: &Rule, fingerprint: u64) -> Request<NetfilterMessage> {
    let mut user_data = Vec::new();
    let mut put = |kind: u8, value: &[u8]| {
        user_data.push(kind);
        user_data.push(u8::try_from(value.len()).unwrap_or(u8::MAX));
        user_data.extend_from_slice(value);
    };
    put(UDATA_COMMENT, &[rule.comment.as_bytes(), &[0]].concat());
    put(UDATA_FINGERPRINT, &fingerprint.to_be_bytes());
    let attributes = vec![
        RuleAttribute::Table(TABLE.into()),
        RuleAttribute::Chain(chain.into()),
        RuleAttribute::Expressions(rule.expressions.clone()),
        RuleAttribute::UserData(user_data),
    ];
    request(family, NfTablesMessage::NewRule(RuleMessage { attributes }), NLM_F_CREATE | NLM_F_APPEND)
}

/// The chain with a Service's source ranges.
pub(crate) fn source_ranges_chain(service: &ObjectName) -> String {
    format!("{SOURCES_PREFIX}{service}")
}

/// Each part of a concatenation is padded to whole words of 4 bytes.
fn front_end_key(front_end: &FrontEnd) -> Vec<u8> {
    [octets(front_end.address), port_key(front_end.protocol, front_end.port)].concat()
}

fn port_key(protocol: Protocol, port: u16) -> Vec<u8> {
    let [high, low] = port.to_be_bytes();
    vec![protocol_number(protocol), 0, 0, 0, high, low, 0, 0]
}

fn encode_element(element: SetElement) -> (&'static str, Element) {
    let (set, key) = match element {
        SetElement::Vip(address) => (VIPS, octets(address)),
        SetElement::Hairpin(endpoint, protocol) => {
            (HAIRPIN, [octets(endpoint.ip()).repeat(2), port_key(protocol, endpoint.port())].concat())
        }
        SetElement::HealthCheckPort(_, port) => (HEALTH_CHECK_PORTS, port.to_be_bytes().to_vec()),
    };
    (set, vec![SetElementAttribute::Key(DataAttribute::Value(key))])
}

/// The elements of a range: its first address and, flagged as interval end, the address after its last, if there is one.
fn interval(range: &IpNet) -> impl Iterator<Item = Element> {
    let key = |address: IpAddr| SetElementAttribute::Key(DataAttribute::Value(octets(address)));
    let after = match range {
        IpNet::V4(range) => u32::from(range.broadcast()).checked_add(1).map(|next| IpAddr::V4(next.into())),
        IpNet::V6(range) => u128::from(range.broadcast()).checked_add(1).map(|next| IpAddr::V6(next.into())),
    };
    let end = after.map(|after| vec![key(after), SetElementAttribute::Flags(SetElementFlags::IntervalEnd)]);
    [vec![key(range.network())]].into_iter().chain(end)
}
