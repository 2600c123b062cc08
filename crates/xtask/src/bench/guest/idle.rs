//! A hundred changes a second, none at all, and a million: what an agent takes over time.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use lab::http::Metrics;

use super::super::agent::Agent;
use super::Bench;
use super::change::{Extras, Kind};

/// From one change to the next.
const EVERY: Duration = Duration::from_millis(10);
/// How long after the last change everything has been in the kernel for long.
const SETTLED: Duration = Duration::from_secs(2);

impl Bench {
    /// A hundred changes a second, of all kinds in turn.
    pub(super) fn churn(&mut self, agent: &mut Agent) -> Result<()> {
        let mut extras = Extras::new(self.options.size);
        // So that there is something to take out.
        for _ in 0..20 {
            self.change(Kind::EndpointIn, &mut extras);
            self.change(Kind::ServiceIn, &mut extras);
        }
        std::thread::sleep(SETTLED);
        agent.pending();
        let before = agent.usage()?;
        let start = Instant::now();
        let length = Duration::from_secs(self.options.seconds);
        let mut changes = 0_u32;
        let mut kinds = Kind::ALL.into_iter().cycle();
        while start.elapsed() < length {
            if let Some(kind) = kinds.next() {
                self.change(kind, &mut extras);
            }
            changes += 1;
            // Not in step with the kernel's clock, which looks a hundred times a second who is at work.
            let due = start + EVERY * changes + EVERY * (changes * 7 % 10) / 10;
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
        }
        let took = start.elapsed();
        std::thread::sleep(SETTLED);
        let cpu = agent.usage()?.cpu.saturating_sub(before.cpu);
        let lines = agent.pending();
        let synced = lines.iter().filter(|line| line.has("synced"));
        let latencies: Vec<Duration> = synced
            .filter_map(|line| Some(line.duration("latency")?.saturating_sub(line.duration("gathering")?)))
            .collect();
        let figures = &mut self.figures;
        figures.average("churn/changes a second", f64::from(changes) / took.as_secs_f64());
        figures.count("churn/syncs", lines.iter().filter(|line| line.has("synced")).count());
        figures.percent("churn/cpu", cpu.as_secs_f64() / took.as_secs_f64() * 100.0);
        figures.spread("churn/latency", latencies);
        for _ in 0..20 {
            self.change(Kind::EndpointOut, &mut extras);
            self.change(Kind::ServiceOut, &mut extras);
        }
        std::thread::sleep(SETTLED);
        agent.pending();
        Ok(())
    }

    /// Nothing happens; at the default period there is an audit in each half minute.
    pub(super) fn steady(&mut self, agent: &mut Agent) -> Result<()> {
        let start = Instant::now();
        let before = agent.usage()?;
        std::thread::sleep(Duration::from_secs(self.options.seconds.next_multiple_of(30)));
        let used = agent.usage()?;
        let share = used.cpu.saturating_sub(before.cpu).as_secs_f64() / start.elapsed().as_secs_f64();
        self.figures.percent("steady/cpu", share * 100.0);
        self.figures.bytes("steady/resident", used.resident);
        Ok(())
    }

    /// What very many changes leave behind: as fast as the agent takes them.
    pub(super) fn growth(&mut self, agent: &mut Agent) -> Result<()> {
        const ROUND: usize = 1000;
        let mut extras = Extras::new(self.options.size);
        let start = Instant::now();
        let (mut done, mut tenths) = (0, 1);
        while done < self.options.many {
            for kind in [Kind::EndpointIn, Kind::ServiceIn, Kind::EndpointOut, Kind::ServiceOut] {
                for _ in 0..ROUND / 4 {
                    self.change(kind, &mut extras);
                }
            }
            done += ROUND;
            Self::wait_for_changes(agent, done)?;
            // Its history would grow, and only that.
            self.server.bookmark();
            std::thread::sleep(Duration::from_millis(5));
            self.server.compact();
            if tenths < 10 && done >= self.options.many / 10 * tenths {
                let resident = agent.usage()?.resident;
                self.figures.bytes(&format!("growth/resident after {tenths} tenths"), resident);
                tenths += 1;
            }
            if done.is_multiple_of(100_000) {
                println!("{:>16}  {done} changes in {:.0} s", "", start.elapsed().as_secs_f64());
            }
        }
        std::thread::sleep(SETTLED);
        self.figures.bytes("growth/resident after all", agent.usage()?.resident);
        self.figures.count("growth/changes", done);
        self.figures.time("growth/time", start.elapsed());
        Ok(())
    }

    /// Waits until the agent has taken in what it was sent, so that nothing but its own state can pile up.
    fn wait_for_changes(agent: &mut Agent, done: usize) -> Result<()> {
        let start = Instant::now();
        loop {
            agent.pending();
            let metrics = Metrics::read()?;
            let pending = ["service", "endpoint"]
                .map(|kind| metrics.sum(&format!("kubeproxy_sync_proxy_rules_{kind}_changes_pending")));
            if pending.iter().sum::<f64>() == 0.0 {
                return Ok(());
            }
            if start.elapsed() > Duration::from_secs(60) {
                bail!("after {done} changes the agent does not keep up: {pending:?} are pending");
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}
