//! Starts with an empty kernel, with a full one, and what the kernel itself needs for both.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use ipvs_netlink::Client;

use lab::agent::usage;
use lab::http::Metrics;

use super::super::agent::{Agent, Line};
use super::super::load::{address_commands, ipvsadm_rules};
use super::super::wiretap::{Datagram, Family, Wiretap, count, replay, run};
use super::{Bench, Measure, path_str};

/// How often the floor is measured; the best counts.
const TRIES: usize = 3;

/// So many of the most frequent system calls are named.
const COMMON: usize = 8;

/// The parts of the first audit, as the agent's log names them.
const PARTS: [(&str, &str); 6] = [
    ("reading", "reading the kernel"),
    ("computing", "computing"),
    ("filter", "writing the packet filter"),
    ("ipvs", "writing IPVS"),
    ("addresses", "binding VIPs"),
    ("flows", "looking after flows"),
];

/// When a first audit was done, and where its time went.
struct First {
    /// When the first line of the log came.
    log_began: Duration,
    /// From when the last of what is known of `default/kubernetes` was heard until it was served.
    bootstrap: Option<Duration>,
    total: Duration,
    parts: Line,
    end: Line,
}

impl First {
    fn of(agent: &mut Agent) -> Result<Self> {
        let log_began = agent.line()?.at - agent.started;
        let mut bootstrap = None;
        let parts = loop {
            let line = agent
                .until(|line| line.has("before all other Services") || line.has("time spent in the first audit"))?;
            if line.has("time spent in the first audit") {
                break line;
            }
            bootstrap = bootstrap.or(line.duration("latency"));
        };
        let end = agent.until(|line| line.has("audited"))?;
        Ok(Self { log_began, bootstrap, total: end.at - agent.started, parts, end })
    }

    /// The first audit: all but the start and the listing.
    fn audit(&self) -> Duration {
        self.end.duration("took").unwrap_or_default()
    }

    fn listing(&self) -> Duration {
        self.total.saturating_sub(self.audit())
    }
}

impl Bench {
    /// Starts an agent with an empty kernel.
    pub(super) fn cold_start(&mut self, flags: &[String]) -> Result<Agent> {
        let cpu_before = usage(std::process::id())?.cpu;
        let mut agent = self.start(flags)?;
        let first = First::of(&mut agent)?;
        let server = usage(std::process::id())?.cpu.saturating_sub(cpu_before);
        let used = agent.usage()?;
        if self.wants(Measure::Cold) {
            let figures = &mut self.figures;
            figures.time("cold/first log line", first.log_began);
            if let Some(bootstrap) = first.bootstrap {
                figures.time("cold/kubernetes served after", bootstrap);
            }
            figures.time("cold/total", first.total);
            figures.time("cold/listing", first.listing());
            figures.time("cold/of it the API server", server);
            figures.time("cold/first audit", first.audit());
            for (field, name) in PARTS {
                figures.time(&format!("cold/{name}"), first.parts.duration(field).unwrap_or_default());
            }
            figures.time("cold/cpu", used.cpu);
            // What was needed for the start is given back in a while.
            std::thread::sleep(Duration::from_secs(2));
            let used = agent.usage()?;
            figures.bytes("memory/peak", used.peak);
            figures.bytes("memory/resident", used.resident);
        }
        Ok(agent)
    }

    /// The same state written by who does nothing else, and by the usual tools.
    pub(super) fn floor(&mut self) -> Result<()> {
        let (datagrams, ruleset) = self.in_namespace(|bench| {
            let flags = bench.serve_api()?;
            let wiretap = Wiretap::start()?;
            let mut agent = bench.start(&flags)?;
            First::of(&mut agent)?;
            let datagrams = wiretap.stop()?;
            Ok((datagrams, run("nft", &["list", "ruleset"])?))
        })?;
        let writes: Vec<Datagram> = datagrams.iter().filter(|it| !it.is_reading()).cloned().collect();
        if self.wants(Measure::Cold) {
            let counts = count(&datagrams);
            self.figures.count("cold/netlink datagrams", counts.datagrams);
            self.figures.count("cold/netlink messages", counts.messages);
            self.figures.bytes("cold/netlink bytes", counts.bytes as u64);
            let mut best: Option<(Duration, [Duration; 3])> = None;
            for _ in 0..TRIES {
                let (took, parts) = self.in_namespace(|bench| bench.replay_writes(&writes))?;
                if best.is_none_or(|(before, _)| took < before) {
                    best = Some((took, parts));
                }
            }
            if let Some((took, [ipvs, addresses, filter])) = best {
                self.figures.floor("cold/total", took);
                self.figures.floor("cold/first audit", took);
                self.figures.floor("cold/writing IPVS", ipvs);
                self.figures.floor("cold/binding VIPs", addresses);
                self.figures.floor("cold/writing the packet filter", filter);
            }
        }
        if self.wants(Measure::Tools) {
            self.tools(&ruleset)?;
        }
        Ok(())
    }

    fn replay_writes(&self, writes: &[Datagram]) -> Result<(Duration, [Duration; 3])> {
        // The index of kube-ipvs0 is in the messages: there was one interface before it then, too.
        run("ip", &["link", "add", "nlmon0", "type", "nlmon"])?;
        let replayed = replay(writes)?;
        let virtual_servers = Client::connect()?.virtual_servers()?.len();
        if virtual_servers != self.options.size.services {
            bail!("replayed, it made {virtual_servers} virtual servers; errors: {:?}", replayed.errors);
        }
        let part = |family| replayed.by_family.get(&family).copied().unwrap_or_default();
        Ok((replayed.took, [part(Family::Generic), part(Family::Route), part(Family::Netfilter)]))
    }

    fn tools(&mut self, ruleset: &str) -> Result<()> {
        let rules = self.write("rules", &ipvsadm_rules(self.options.size))?;
        let addresses = self.write("addresses", &address_commands(self.options.size))?;
        let ruleset = self.write("ruleset", ruleset)?;
        self.in_namespace(|bench| {
            let mut total = Duration::ZERO;
            let restore = format!("exec ipvsadm --restore < {}", path_str(&rules)?);
            let address = format!("ip link add kube-ipvs0 type dummy && exec ip -batch {}", path_str(&addresses)?);
            let filter = format!("exec nft --file {}", path_str(&ruleset)?);
            for (name, command) in [("ipvsadm --restore", restore), ("ip -batch", address), ("nft --file", filter)] {
                let start = Instant::now();
                run("sh", &["-c", &command])?;
                let took = start.elapsed();
                bench.figures.time(&format!("tools/{name}"), took);
                total += took;
            }
            bench.figures.time("tools/total", total);
            Ok(())
        })
    }

    pub(super) fn cold_from_manifests(&mut self) -> Result<()> {
        let directory = self.dir.path().join("manifests");
        fs::create_dir(&directory).context("cannot create a directory for the manifests")?;
        let objects: Vec<String> = self.options.size.objects().map(|object| object.to_string()).collect();
        // A file for each hundred objects, as generators make them.
        for (number, some) in objects.chunks(100).enumerate() {
            fs::write(directory.join(format!("{number}.json")), some.join("\n")).context("cannot write a manifest")?;
        }
        let flags: Vec<String> =
            std::iter::once(format!("--manifests={}", directory.display())).chain(self.options.flags.clone()).collect();
        self.in_namespace(|bench| {
            let mut agent = bench.start(&flags)?;
            let first = First::of(&mut agent)?;
            bench.figures.time("manifests/total", first.total);
            bench.figures.time("manifests/reading them", first.listing());
            Ok(())
        })
    }

    /// How many system calls a cold start takes, counted by strace.
    pub(super) fn system_calls(&mut self) -> Result<()> {
        let counts = self.dir.path().join("counts");
        self.in_namespace(|bench| {
            let flags = bench.serve_api()?;
            let mut command = Command::new("strace");
            command.args(["-f", "-c", "-U", "calls,name", "-o"]).arg(&counts).arg(&bench.options.agent);
            let mut agent = Agent::spawn(command.args(flags).arg("--once"))?;
            agent.until(|line| line.has("audited"))?;
            // It ends by itself; then strace writes.
            while agent.line().is_ok() {}
            let counts = read_counts(&counts)?;
            bench.figures.count("cold/system calls", counts.iter().map(|(_, calls)| calls).sum());
            for (name, calls) in counts.iter().take(COMMON) {
                bench.figures.count(&format!("cold/system calls/{name}"), *calls);
            }
            Ok(())
        })
    }

    /// Starts that find nothing to do, and audits.
    pub(super) fn restarts(&mut self, flags: &[String]) -> Result<()> {
        if self.wants(Measure::Restart) {
            let mut agent = self.start(flags)?;
            let first = First::of(&mut agent)?;
            agent.kill();
            if !first.end.has("nothing to change") {
                bail!("a restart found something to change: {}", first.end.text);
            }
            let figures = &mut self.figures;
            figures.time("restart/total", first.total);
            figures.time("restart/listing", first.listing());
            figures.time("restart/first audit", first.audit());
            for (field, name) in PARTS {
                figures.time(&format!("restart/{name}"), first.parts.duration(field).unwrap_or_default());
            }
        }
        let wiretap = Wiretap::start()?;
        let mut agent = self.start(flags)?;
        First::of(&mut agent)?;
        agent.kill();
        let datagrams = wiretap.stop()?;
        let reads: Vec<Datagram> = datagrams.iter().filter(|it| it.is_dump()).cloned().collect();
        let mut best = Duration::MAX;
        for _ in 0..TRIES {
            best = best.min(replay(&reads)?.took);
        }
        if self.wants(Measure::Restart) {
            let written: Vec<&Datagram> = datagrams.iter().filter(|it| !it.is_reading()).collect();
            self.figures.count("restart/datagrams that write", written.len());
            self.figures.floor("restart/total", best);
            self.figures.floor("restart/reading the kernel", best);
        }
        if self.wants(Measure::Audit) {
            self.audits(flags, best)?;
        }
        Ok(())
    }

    fn audits(&mut self, flags: &[String], floor: Duration) -> Result<()> {
        const AUDITS: f64 = 5.0;
        let flags: Vec<String> = flags.iter().cloned().chain(["--ipvs-sync-period=1s".to_owned()]).collect();
        let mut agent = self.start(&flags)?;
        First::of(&mut agent)?;
        let of = || -> Result<[f64; 2]> {
            let metrics = Metrics::read()?;
            let name = |what| format!("kube_ipvs_sync_duration_seconds_{what}{{kind=\"audit\"}}");
            Ok([metrics.sum(&name("sum")), metrics.sum(&name("count"))])
        };
        let (begin, cpu) = (of()?, agent.usage()?.cpu);
        let end = loop {
            std::thread::sleep(Duration::from_secs(1));
            let end = of()?;
            if end[1] - begin[1] >= AUDITS {
                break end;
            }
        };
        let cpu = agent.usage()?.cpu.saturating_sub(cpu);
        let audits = end[1] - begin[1];
        self.figures.seconds("audit/time", (end[0] - begin[0]) / audits);
        self.figures.floor("audit/time", floor);
        self.figures.seconds("audit/cpu", cpu.as_secs_f64() / audits);
        Ok(())
    }
}

/// How often each system call was made, the most frequent first.
fn read_counts(path: &Path) -> Result<Vec<(String, usize)>> {
    let text = fs::read_to_string(path).context("strace has counted nothing")?;
    let rows = text.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        let calls = words.next()?.parse().ok()?;
        Some((words.next().filter(|name| *name != "total")?.to_owned(), calls))
    });
    let mut counts: Vec<(String, usize)> = rows.collect();
    counts.sort_by_key(|(_, calls)| std::cmp::Reverse(*calls));
    Ok(counts)
}
