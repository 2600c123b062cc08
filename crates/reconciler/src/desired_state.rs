//! The desired state: the sum of all contributions, with one owner for each front end.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::hash::Hash;
use std::net::IpAddr;
use std::sync::Arc;

use foldhash::HashMap;
use ipvs_netlink::Family;
use service_watch::{ObjectName, Service};

use crate::budget::PART_OPERATIONS;
use crate::contribution::{Contribution, DesiredServer, TrafficDirection};
use crate::filter::{SetElement, SourceRanges, TableContents};
use crate::front_end::{AddressOrigin, FrontEnd};
use crate::plan::Key;
use crate::real_servers::RealServerAddress;

/// A Service's claim to a front end. The first in this order is the owner: by the origin of the address, then the oldest Service,
/// then the first by name. So a Service cannot take a ClusterIP or a load balancer's address by naming it among its external IPs,
/// whether before it is assigned or after.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Claim {
    origin: AddressOrigin,
    /// Seconds since 1970. A Service without a creation time counts as the youngest.
    created: i64,
    service: ObjectName,
}

/// Two Services claim one front end. The winner gets it; the loser is served at its other front ends.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct FrontEndConflict {
    /// The front end.
    pub front_end: FrontEnd,
    /// The Service that owns it.
    pub winner: ObjectName,
    /// The Service that claims it too.
    pub loser: ObjectName,
}

/// For the log and for the Event on the loser.
impl fmt::Display for FrontEndConflict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} belongs to Service {}: an assigned ClusterIP or NodePort comes first, then an address that a load balancer assigned, \
             then external IPs, and among equals the older Service, or the first by name; give one of the two another address or port",
            self.front_end, self.winner
        )
    }
}

#[derive(Debug)]
struct Contributor {
    created: i64,
    contribution: Contribution,
}

/// The sum of all contributions.
#[derive(Debug, Default)]
pub struct DesiredState {
    /// Boxed, since a third of a hash table is unused memory.
    contributors: HashMap<ObjectName, Box<Contributor>>,
    /// The claims to a front end, the owner's first; never empty.
    claims: HashMap<FrontEnd, Vec<Claim>>,
    /// The Services that need a VIP bound; never empty.
    vips: HashMap<IpAddr, Vec<ObjectName>>,
    /// The Services that need an element of a set; never empty.
    elements: HashMap<SetElement, Vec<ObjectName>>,
    /// How many Services have a policy Local that finds no local endpoint although there are others.
    without_local: BTreeMap<(TrafficDirection, Family), usize>,
    /// How many Services exceed their budget.
    over_budget: usize,
    /// How many Services take more than one part to write.
    large: usize,
}

impl DesiredState {
    /// Replaces a Service's contribution. Every key whose desired state may have changed is added to `dirty`, every new conflict
    /// to `conflicts`.
    pub fn update(
        &mut self,
        name: &ObjectName,
        service: Option<&Service>,
        contribution: Contribution,
        dirty: &mut BTreeSet<Key>,
        conflicts: &mut Vec<FrontEndConflict>,
    ) {
        let created = service.and_then(|service| service.created).unwrap_or(i64::MAX);
        let before = self.contributors.remove(name);
        let (before_created, before) = match &before {
            Some(contributor) => (contributor.created, &contributor.contribution),
            None => (created, &Contribution::default()),
        };
        for (front_end, server) in &before.servers {
            let same = created == before_created && contribution.servers.get(front_end) == Some(server);
            if !same {
                dirty.insert(Key::VirtualServer(*front_end));
            }
            let origin = contribution.servers.get(front_end).map(|it| it.origin);
            if created != before_created || origin != Some(server.origin) {
                self.withdraw(*front_end, name);
            }
        }
        for (front_end, server) in &contribution.servers {
            let held = before.servers.get(front_end);
            if held != Some(server) {
                dirty.insert(Key::VirtualServer(*front_end));
            }
            let origin = server.origin;
            if created != before_created || held.map(|it| it.origin) != Some(origin) {
                self.claim(*front_end, Claim { origin, created, service: name.clone() }, conflicts);
            }
        }
        let changed = replace_claims(&mut self.vips, name, &before.vips, &contribution.vips);
        dirty.extend(changed.into_iter().map(Key::Vip));
        let changed = replace_claims(&mut self.elements, name, &before.elements, &contribution.elements);
        dirty.extend(changed.into_iter().map(Key::SetElement));
        for it in before.without_local.difference(&contribution.without_local) {
            self.without_local.entry(*it).and_modify(|count| *count -= 1);
        }
        for it in contribution.without_local.difference(&before.without_local) {
            *self.without_local.entry(*it).or_default() += 1;
        }
        self.large += usize::from(contribution.size > PART_OPERATIONS);
        self.large -= usize::from(before.size > PART_OPERATIONS);
        self.over_budget += usize::from(contribution.left_out.is_some());
        self.over_budget -= usize::from(before.left_out.is_some());
        for family in [Family::Ipv4, Family::Ipv6] {
            if before.source_ranges.get(&family) != contribution.source_ranges.get(&family) {
                dirty.insert(Key::SourceRanges(name.clone(), family));
            }
        }
        if contribution != Contribution::default() {
            self.contributors.insert(name.clone(), Box::new(Contributor { created, contribution }));
        }
    }

    /// What a Service contributes; `None` if nothing.
    pub fn contribution(&self, service: &ObjectName) -> Option<&Contribution> {
        self.contributors.get(service).map(|contributor| &contributor.contribution)
    }

    /// The virtual server desired at a front end.
    pub fn server(&self, front_end: &FrontEnd) -> Option<&DesiredServer> {
        self.contribution(self.owner(front_end)?)?.servers.get(front_end)
    }

    /// The real servers desired at a front end, sorted.
    pub fn real_servers(&self, front_end: &FrontEnd) -> Arc<[RealServerAddress]> {
        self.server(front_end).map(|wanted| wanted.real_servers.clone()).unwrap_or_default()
    }

    /// The Service that owns a front end.
    pub fn owner(&self, front_end: &FrontEnd) -> Option<&ObjectName> {
        self.claims.get(front_end)?.first().map(|claim| &claim.service)
    }

    /// Whether a VIP is to be bound.
    pub fn wants_vip(&self, address: IpAddr) -> bool {
        self.vips.contains_key(&address)
    }

    /// Whether a set of the packet filter should have an element.
    pub fn wants_element(&self, element: &SetElement) -> bool {
        self.elements.contains_key(element)
    }

    /// The source ranges of a Service in a family, if it has any.
    pub fn source_ranges(&self, service: &ObjectName, family: Family) -> Option<&SourceRanges> {
        self.contribution(service)?.source_ranges.get(&family)
    }

    /// All elements and source ranges of a family's table of the packet filter.
    pub fn contents(&self, family: Family) -> TableContents {
        let sources = self.contributors.iter();
        let sources =
            sources.filter_map(|(name, it)| Some((name.clone(), it.contribution.source_ranges.get(&family)?.clone())));
        let front_ends = self.claims.keys().filter(|front_end| Family::of(front_end.address) == family);
        let vips = self.vips.keys().copied().map(SetElement::Vip);
        TableContents {
            front_ends: front_ends.filter_map(|it| Some((*it, self.server(it)?.rule.clone()))).collect(),
            elements: vips.chain(self.elements.keys().copied()).filter(|element| element.family() == family).collect(),
            source_ranges: sources.collect(),
        }
    }

    /// Every VIP that is to be bound.
    pub fn vips(&self) -> impl Iterator<Item = IpAddr> {
        self.vips.keys().copied()
    }

    /// The Services that need a VIP bound.
    pub fn claimants(&self, address: IpAddr) -> impl Iterator<Item = &ObjectName> {
        self.vips.get(&address).into_iter().flatten()
    }

    /// Every key that something is desired for, except tables, the device, ranges and flows.
    pub fn keys(&self) -> impl Iterator<Item = Key> {
        let sources = self.contributors.iter().flat_map(|(name, contributor)| {
            contributor.contribution.source_ranges.keys().map(|family| Key::SourceRanges(name.clone(), *family))
        });
        let servers = self.claims.keys().copied().map(Key::VirtualServer);
        let addresses = self.vips.keys().copied().map(Key::Vip);
        servers.chain(addresses).chain(self.elements.keys().copied().map(Key::SetElement)).chain(sources)
    }

    /// Whether [`DesiredState::keys`] has this one.
    pub fn wants(&self, key: &Key) -> bool {
        match key {
            Key::VirtualServer(front_end) => self.claims.contains_key(front_end),
            Key::Vip(address) => self.wants_vip(*address),
            Key::SetElement(element) => self.wants_element(element),
            Key::SourceRanges(service, family) => self.source_ranges(service, *family).is_some(),
            Key::Table(_) | Key::Device | Key::VipRange(_) | Key::Flows(_) => false,
        }
    }

    /// Every front end that is desired.
    pub fn front_ends(&self) -> impl Iterator<Item = &FrontEnd> {
        self.claims.keys()
    }

    /// How many virtual servers are desired.
    pub fn server_count(&self) -> usize {
        self.claims.len()
    }

    /// How many Services contribute anything.
    pub fn service_count(&self) -> usize {
        self.contributors.len()
    }

    /// How many VIPs are to be bound.
    pub fn vip_count(&self) -> usize {
        self.vips.len()
    }

    /// How many Services have this policy Local and no local endpoint, although they have others.
    pub fn without_local(&self, direction: TrafficDirection, family: Family) -> usize {
        self.without_local.get(&(direction, family)).copied().unwrap_or(0)
    }

    /// Whether any Service takes more than one part to write.
    pub(crate) fn has_large_services(&self) -> bool {
        self.large > 0
    }

    /// The Service that a key is for; one of them if there are several.
    pub(crate) fn owner_of<'a>(&'a self, key: &'a Key) -> Option<&'a ObjectName> {
        match key {
            Key::Table(_) | Key::Device | Key::VipRange(_) => None,
            Key::SourceRanges(service, _) => Some(service),
            Key::VirtualServer(front_end) | Key::Flows(front_end) => self.owner(front_end),
            Key::Vip(address) => self.claimants(*address).next(),
            Key::SetElement(element) => self.elements.get(element)?.first(),
        }
    }

    /// How many Services exceed their budget.
    pub fn over_budget_count(&self) -> usize {
        self.over_budget
    }

    fn claim(&mut self, front_end: FrontEnd, claim: Claim, conflicts: &mut Vec<FrontEndConflict>) {
        let claims = self.claims.entry(front_end).or_insert_with(|| Vec::with_capacity(1));
        let index = claims.partition_point(|held| *held < claim);
        claims.insert(index, claim);
        if let [winner, .., _] = claims.as_slice() {
            // Reported to the Service that has just lost: the new claimant, or the previous owner.
            let loser = if index == 0 { &claims[1] } else { &claims[index] };
            conflicts.push(FrontEndConflict {
                front_end,
                winner: winner.service.clone(),
                loser: loser.service.clone(),
            });
        }
    }

    /// What is left of conflicts after further updates: whoever claims a front end and does not own it.
    pub fn lasting_conflicts(&self, conflicts: Vec<FrontEndConflict>) -> BTreeSet<FrontEndConflict> {
        let claimants = conflicts.into_iter().flat_map(|FrontEndConflict { front_end, winner, loser }| {
            [winner, loser].map(|service| (front_end, service))
        });
        let lasting = claimants.filter_map(|(front_end, loser)| {
            let (owner, others) = self.claims.get(&front_end)?.split_first()?;
            let is_claimed = others.iter().any(|claim| claim.service == loser);
            is_claimed.then(|| FrontEndConflict { front_end, winner: owner.service.clone(), loser })
        });
        lasting.collect()
    }

    fn withdraw(&mut self, front_end: FrontEnd, service: &ObjectName) {
        if let Some(claims) = self.claims.get_mut(&front_end) {
            claims.retain(|claim| claim.service != *service);
            if claims.is_empty() {
                self.claims.remove(&front_end);
            }
        }
    }
}

/// Replaces a Service's claims; both slices are sorted. Returns what it claims newly or no longer.
fn replace_claims<T: Copy + Ord + Hash>(
    claims: &mut HashMap<T, Vec<ObjectName>>,
    name: &ObjectName,
    before: &[T],
    after: &[T],
) -> Vec<T> {
    let gone: Vec<T> = before.iter().filter(|it| after.binary_search(it).is_err()).copied().collect();
    let new: Vec<T> = after.iter().filter(|it| before.binary_search(it).is_err()).copied().collect();
    for it in &gone {
        if let Some(claimants) = claims.get_mut(it) {
            claimants.retain(|claimant| claimant != name);
            if claimants.is_empty() {
                claims.remove(it);
            }
        }
    }
    for it in &new {
        claims.entry(*it).or_insert_with(|| Vec::with_capacity(1)).push(name.clone());
    }
    [gone, new].concat()
}
