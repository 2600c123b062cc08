//! What one change costs, of each kind.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use lab::http::Metrics;

use super::super::agent::{Agent, Line};
use super::super::load::{Size, endpoint, service, service_name, slice, slice_name};
use super::super::wiretap::{Wiretap, count};
use super::Bench;

/// How many changes are recorded, to count what each sends.
const RECORDED: usize = 20;
/// Within this time after an endpoint went, the agent has seen that its real server has drained, and deleted it.
const DRAINED: Duration = Duration::from_millis(400);
/// Less than it takes until the agent looks at what drains.
const COUNTED: Duration = Duration::from_millis(30);
/// What controllers put into one slice.
const PER_SLICE: usize = 100;

/// What changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    EndpointIn,
    EndpointOut,
    ServiceIn,
    ServiceOut,
}

impl Kind {
    pub(super) const ALL: [Self; 4] = [Self::EndpointIn, Self::EndpointOut, Self::ServiceIn, Self::ServiceOut];

    fn name(self) -> &'static str {
        match self {
            Self::EndpointIn => "one endpoint in",
            Self::EndpointOut => "one endpoint out",
            Self::ServiceIn => "one Service in",
            Self::ServiceOut => "one Service out",
        }
    }

    /// Whether a line of the log says that the kernel has it.
    fn is_done(self, line: &Line) -> bool {
        // An audit takes in what it finds.
        (line.has("synced") || line.has("audited"))
            && line.has(match self {
                Self::EndpointIn => "real_servers=+1",
                Self::EndpointOut => "draining=1",
                Self::ServiceIn => "virtual_servers=+1",
                Self::ServiceOut => "virtual_servers=-1",
            })
    }
}

/// What there is beside the load: one more endpoint here and there, and Services.
#[derive(Debug)]
pub(super) struct Extras {
    size: Size,
    /// How many more endpoints each Service has.
    endpoints: Vec<usize>,
    /// How many there are over all.
    total: usize,
    services: usize,
}

impl Extras {
    pub(super) fn new(size: Size) -> Self {
        Self { size, endpoints: vec![0; size.services], total: 0, services: 0 }
    }
}

impl Bench {
    /// Makes one change. What is taken out is what was put in last.
    pub(super) fn change(&self, kind: Kind, extras: &mut Extras) {
        let size = extras.size;
        match kind {
            Kind::EndpointIn => {
                let at = extras.total % size.services;
                extras.endpoints[at] += 1;
                extras.total += 1;
                self.write_extras(at, extras.endpoints[at] - 1, extras.endpoints[at]);
            }
            Kind::EndpointOut => {
                extras.total -= 1;
                let at = extras.total % size.services;
                extras.endpoints[at] -= 1;
                self.write_extras(at, extras.endpoints[at], extras.endpoints[at]);
            }
            Kind::ServiceIn => {
                let number = extras.services;
                extras.services += 1;
                let new = size.services + number;
                let endpoints = (0..size.endpoints.min(10)).map(|it| endpoint(3_000_000 + number * 10 + it));
                // Slices come later, or sooner; a Service that comes last is there at once.
                self.server.apply(slice(new, "s0", endpoints));
                self.server.apply(service(new));
            }
            Kind::ServiceOut => {
                extras.services -= 1;
                let gone = size.services + extras.services;
                let (namespace, name) = service_name(gone);
                self.server.delete("Service", &namespace, &name);
                let (namespace, name) = slice_name(gone, "s0");
                self.server.delete("EndpointSlice", &namespace, &name);
            }
        }
    }

    /// Writes the slice that has the extra endpoint of this place.
    fn write_extras(&self, service: usize, place: usize, through: usize) {
        let number = place / PER_SLICE;
        // Beyond what the load has.
        let address = |it: usize| endpoint(1_000_000 + it * self.options.size.services + service);
        let endpoints = (number * PER_SLICE..through).map(address);
        self.server.apply(slice(service, &format!("x{number}"), endpoints));
    }

    /// Changes of each kind, each begun when the last has arrived.
    pub(super) fn changes(&mut self, agent: &mut Agent) -> Result<()> {
        let mut extras = Extras::new(self.options.size);
        for kind in Kind::ALL {
            let (mut latencies, mut gatherings) = (Vec::new(), Vec::new());
            let (mut syncs, mut end_to_end) = (Vec::new(), Vec::new());
            for _ in 0..self.options.changes {
                let start = Instant::now();
                self.change(kind, &mut extras);
                let line = agent.until(|line| kind.is_done(line))?;
                end_to_end.push(line.at - start);
                // The agent gathers changes for a fixed time first, which says nothing about its speed.
                let gathering = line.duration("gathering").context("a sync of changes that were not gathered")?;
                let latency = line.duration("latency").context("a sync without a latency")?;
                latencies.push(latency.saturating_sub(gathering));
                gatherings.push(gathering);
                syncs.push(line.duration("took").context("a sync that took no time")?);
            }
            std::thread::sleep(DRAINED);
            let name = format!("change/{}", kind.name());
            self.figures.spread(&name, latencies);
            self.figures.spread(&format!("{name}/gathering before"), gatherings);
            self.figures.spread(&format!("{name}/of it the sync"), syncs);
            self.figures.spread(&format!("{name}/from the API server"), end_to_end);
        }
        for kind in Kind::ALL {
            self.recorded(kind, &mut extras, agent)?;
        }
        Ok(())
    }

    /// What changes of a kind send: until they are in the kernel, as the agent counts, and with all that follows, as the
    /// kernel sees it. Medians: now and then an audit falls in between.
    fn recorded(&mut self, kind: Kind, extras: &mut Extras, agent: &mut Agent) -> Result<()> {
        const SENT: [(&str, &str); 3] = [("messages", "messages"), ("batches", "batches"), ("bytes", "sent_bytes")];
        let mut sent = [const { Vec::new() }; 3];
        let (mut messages, mut dumps) = (Vec::new(), Vec::new());
        for _ in 0..RECORDED {
            let wiretap = Wiretap::start()?;
            let before = Metrics::read()?;
            self.change(kind, extras);
            agent.until(|line| kind.is_done(line))?;
            // The agent counts after it has said so.
            std::thread::sleep(COUNTED);
            let after = Metrics::read()?;
            for (counts, (_, metric)) in sent.iter_mut().zip(SENT) {
                let metric = format!("kube_ipvs_netlink_{metric}_total");
                counts.push(after.sum(&metric) - before.sum(&metric));
            }
            std::thread::sleep(DRAINED);
            let all = count(&wiretap.stop()?);
            messages.push(f64::from(u32::try_from(all.messages).unwrap_or(u32::MAX)));
            dumps.push(f64::from(u32::try_from(all.dumps).unwrap_or(u32::MAX)));
        }
        let name = format!("change/{}", kind.name());
        for ((what, _), counts) in SENT.into_iter().zip(sent) {
            self.figures.average(&format!("{name}/{what}"), median(counts));
        }
        self.figures.average(&format!("{name}/messages with what follows"), median(messages));
        self.figures.average(&format!("{name}/lists read with what follows"), median(dumps));
        Ok(())
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}
