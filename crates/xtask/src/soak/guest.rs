//! Inside the lab: everything at once, for as long as was ordered.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use fastrand::Rng;
use lab::Scratch;
use lab::http::Metrics;
use lab::netns::Namespace;
use rustix::process::Signal;
use rustix::time::{ClockId, clock_gettime, clock_settime};
use test_apiserver::Server;

use super::tally::{Sample, Shared};
use super::traffic;
use super::trouble::{Vandal, misbehave};
use super::world::{self, COMING_AND_GOING, LIVELY, STAYING, VICTIMS, World};
use super::{Order, report};
use crate::bench::agent::Agent;
use crate::bench::load::{self, NODE, Size};

/// Short, so that drift is found often. Everything else is as in a cluster.
const SYNC_PERIOD: &str = "--ipvs-sync-period=10s";
/// How many endpoints a Service that changes all the time has at most.
const ENDPOINTS: usize = 10;
/// How often the kernel is compared with what a fresh start makes.
const COMPARE: Duration = Duration::from_secs(120);
/// The kernel may need this long to become as a fresh start makes it: the sync period, and real servers that drain.
const PATIENCE: Duration = Duration::from_secs(120);

/// Soaks the agent inside the lab.
#[derive(clap::Args)]
pub(crate) struct GuestArgs {
    order: PathBuf,
    results: PathBuf,
}

pub(crate) fn run_guest(args: &GuestArgs) -> Result<ExitCode> {
    let order: Order = serde_json::from_slice(&fs::read(&args.order).context("cannot read the order")?)?;
    let tally = soak(&order)?;
    fs::write(&args.results, tally).context("cannot write the results")?;
    Ok(ExitCode::SUCCESS)
}

fn soak(order: &Order) -> Result<Vec<u8>> {
    let world = World::new()?;
    let shared = Shared::new(order.seconds, order.seed);
    let stage = Stage::new(order, &world)?;
    traffic::serve(&world.servers, world::all_servers())?;
    let mut actor = Actor { agent: stage.start()?, life: 1, found: 0.0, stage: &stage, shared: &shared };
    let is_ready =
        || Metrics::read().is_ok_and(|it| it.get("kube_ipvs_sync_duration_seconds_count{kind=\"audit\"}") > Some(0.0));
    while !is_ready() {
        if shared.start.elapsed() > PATIENCE {
            bail!("the agent does not come up");
        }
        thread::sleep(Duration::from_millis(200));
    }

    let (is_over, is_quiet) = (Arc::new(AtomicBool::new(false)), AtomicBool::new(false));
    let mut vandal = Vandal::new(&world.node, &shared)?;
    let played = thread::scope(|scope| {
        traffic::ask_all(scope, &world, &shared, &is_over);
        scope.spawn(|| churn(&stage, &shared, &is_over, &is_quiet));
        let played = actor.play(&mut vandal, &is_quiet);
        is_over.store(true, Ordering::Relaxed);
        played
    });
    played?;
    let found = actor.found + Metrics::read()?.sum("kube_ipvs_drift_found_total");
    shared.lock().drift_found = found;
    actor.agent.kill();
    let tally = serde_json::to_vec_pretty(&*shared.lock())?;
    Ok(tally)
}

/// What the agent needs to run, and the API server it listens to.
struct Stage<'a> {
    order: &'a Order,
    world: &'a World,
    server: Server,
    dir: Scratch,
}

impl<'a> Stage<'a> {
    fn new(order: &'a Order, world: &'a World) -> Result<Self> {
        let server = Server::new();
        for object in (Size { services: order.services, endpoints: ENDPOINTS }).objects() {
            server.apply(object);
        }
        let services = world::services();
        for service in services {
            let name = service["metadata"]["name"].as_str().unwrap_or_default().to_owned();
            server.apply(service);
            server.apply(world::slice(&name, &STAYING, &[]));
        }
        for number in 0..VICTIMS {
            for object in world::victim(number) {
                server.apply(object);
            }
        }
        let stage = Self { order, world, server, dir: Scratch::new()? };
        stage.listen("kubeconfig")?;
        Ok(stage)
    }

    /// Has the API server listen in the namespace of this thread too, and writes a kubeconfig that leads there.
    fn listen(&self, file: &str) -> Result<PathBuf> {
        let address = self.server.listen_in_thread().context("cannot start the API server")?;
        let path = self.dir.path().join(file);
        Server::write_kubeconfig(&path, address);
        Ok(path)
    }

    fn flags(kubeconfig: &Path) -> Vec<String> {
        vec![
            format!("--kubeconfig={}", kubeconfig.display()),
            SYNC_PERIOD.to_owned(),
            "--nodeport-addresses=192.168.1.0/24".to_owned(),
        ]
    }

    fn start(&self) -> Result<Agent> {
        Agent::start(&self.order.agent, &Self::flags(&self.dir.path().join("kubeconfig")))
    }

    /// What a fresh start makes.
    fn fresh(&self) -> Result<Kernel> {
        let namespace = world::like_the_node()?;
        namespace.run(|| {
            let kubeconfig = self.listen("fresh")?;
            let mut command = Command::new(&self.order.agent);
            command.args(Self::flags(&kubeconfig)).arg("--once").arg(format!("--hostname-override={NODE}"));
            command.args(["--conntrack-max-per-core=0", "--cluster-cidr=10.128.0.0/9"]);
            let output = command.output().context("cannot start the agent")?;
            if !output.status.success() {
                bail!("a fresh start fails: {}", String::from_utf8_lossy(&output.stderr));
            }
            Kernel::read(&namespace)
        })?
    }
}

/// What there is of the agent's in a kernel.
#[derive(Debug, PartialEq, Eq)]
struct Kernel(BTreeSet<String>);

impl Kernel {
    fn read(namespace: &Namespace) -> Result<Self> {
        let servers = namespace.exec("ipvsadm -Sn")?;
        let addresses = namespace.exec("ip -br address show dev kube-ipvs0")?;
        let mut all: BTreeSet<String> = servers.lines().map(str::to_owned).collect();
        all.extend(addresses.split_whitespace().skip(2).map(|it| format!("address {it}")));
        for family in ["ip", "ip6"] {
            let table = namespace.exec(&format!("nft list table {family} kube-ipvs"))?;
            // Sets list their elements in any order, several in a line.
            let mut within = "";
            for line in table.lines().map(str::trim) {
                if line.starts_with("set ") || line.starts_with("map ") || line.starts_with("chain ") {
                    within = line;
                }
                let words = line.trim_start_matches("elements = ").split([',', '{', '}']).map(str::trim);
                all.extend(words.filter(|word| !word.is_empty()).map(|word| format!("{family} {within} {word}")));
            }
        }
        Ok(Self(all))
    }

    /// What one has and the other has not, but for what is somebody else's, and real servers that drain: what connection
    /// tracking of IPVS remembers of a connection that is over lasts two minutes.
    fn differences(&self, right: &Self) -> Vec<String> {
        let missing = right.0.difference(&self.0).map(|line| format!("missing: {line}"));
        let surplus = self.0.difference(&right.0);
        let surplus = surplus.filter(|line| !line.contains("172.16.0.1:80") && !line.ends_with(" -w 0"));
        missing.chain(surplus.map(|line| format!("too much: {line}"))).collect()
    }
}

/// Changes Services and endpoints until it is over.
fn churn(stage: &Stage<'_>, shared: &Shared, is_over: &AtomicBool, is_quiet: &AtomicBool) {
    let mut rng = Rng::with_seed(stage.order.seed);
    let mut absent: Vec<usize> = Vec::new();
    let server = &stage.server;
    while !is_over.load(Ordering::Relaxed) {
        thread::sleep(Duration::from_millis(50));
        if is_quiet.load(Ordering::Relaxed) {
            continue;
        }
        // The first is `default/kubernetes`.
        let number = rng.usize(1..stage.order.services.max(2));
        match rng.u32(..20) {
            0 if !absent.contains(&number) => {
                let (namespace, name) = load::service_name(number);
                server.delete("Service", &namespace, &name);
                absent.push(number);
                shared.changed("Services deleted");
            }
            1 => {
                if let Some(number) = absent.pop() {
                    server.apply(load::service(number));
                    shared.changed("Services made");
                }
            }
            2 | 3 => {
                let name = LIVELY[rng.usize(..LIVELY.len())];
                let mut ready: Vec<&str> = STAYING.into();
                let mut terminating = Vec::new();
                for address in COMING_AND_GOING {
                    match rng.u8(..3) {
                        0 => ready.push(address),
                        1 => terminating.push(address),
                        _ => {}
                    }
                }
                server.apply(world::slice(name, &ready, &terminating));
                shared.changed("slices with traffic changed");
            }
            _ => {
                let first = rng.usize(..1000);
                let addresses = (0..rng.usize(..=ENDPOINTS)).map(|it| load::endpoint(first + it));
                server.apply(load::slice(number, "s0", addresses));
                shared.changed("slices changed");
            }
        }
    }
}

/// Who does things to the agent, and keeps count of its lives.
struct Actor<'a> {
    agent: Agent,
    life: u64,
    /// Drift that earlier lives had found.
    found: f64,
    stage: &'a Stage<'a>,
    shared: &'a Shared,
}

impl Actor<'_> {
    /// In the first third the agent is killed again and again. The one that lives then is looked at for memory.
    fn play(&mut self, vandal: &mut Vandal<'_>, is_quiet: &AtomicBool) -> Result<()> {
        let mut rng = Rng::with_seed(self.stage.order.seed + 1);
        let length = Duration::from_secs(self.stage.order.seconds);
        let mut compared = Instant::now();
        let mut sampled = Instant::now();
        while self.shared.start.elapsed() < length {
            let until = Instant::now() + Duration::from_millis(rng.u64(500..3000));
            while Instant::now() < until {
                if sampled.elapsed() > Duration::from_secs(5) {
                    sampled = Instant::now();
                    self.sample()?;
                }
                vandal.inspect();
                thread::sleep(Duration::from_millis(250));
            }
            let may_kill = self.shared.start.elapsed() < length / 3;
            match rng.u8(..10) {
                0..3 if may_kill => self.kill()?,
                3 => self.stop(&mut rng)?,
                4..6 => misbehave(&self.stage.server, &mut rng, self.shared),
                6 if self.stage.order.may_set_clock => self.set_clock(&mut rng)?,
                _ => vandal.strike(&mut rng),
            }
            if compared.elapsed() > COMPARE {
                self.compare(vandal, is_quiet)?;
                compared = Instant::now();
            }
        }
        self.compare(vandal, is_quiet)
    }

    fn sample(&mut self) -> Result<()> {
        // Its log is read so that it does not pile up.
        drop(self.agent.pending());
        let pid = self.agent.id();
        let count = |what: &str| fs::read_dir(format!("/proc/{pid}/{what}")).map(Iterator::count);
        let sample = Sample {
            at: self.shared.start.elapsed().as_secs_f64(),
            life: self.life,
            resident: self.agent.usage()?.resident,
            files: count("fd").context("the agent has ended by itself")?,
            threads: count("task").context("the agent has ended by itself")?,
        };
        self.shared.lock().samples.push(sample);
        Ok(())
    }

    fn kill(&mut self) -> Result<()> {
        self.shared.trouble("killed");
        // One that has only just started does not serve metrics yet.
        self.found += Metrics::read().map_or(0.0, |metrics| metrics.sum("kube_ipvs_drift_found_total"));
        self.agent.kill();
        self.agent = self.stage.start()?;
        self.life += 1;
        Ok(())
    }

    fn stop(&mut self, rng: &mut Rng) -> Result<()> {
        self.shared.trouble("stopped for a while");
        self.agent.signal(Signal::STOP)?;
        thread::sleep(Duration::from_millis(rng.u64(200..3000)));
        self.agent.signal(Signal::CONT)
    }

    /// Sets the clock up to a day forwards or back, for a while.
    fn set_clock(&self, rng: &mut Rng) -> Result<()> {
        self.shared.trouble("clock set for a while");
        let jump = rng.i64(-86_400..86_400);
        let set = |by: i64| {
            let mut now = clock_gettime(ClockId::Realtime);
            now.tv_sec += by;
            clock_settime(ClockId::Realtime, now).context("cannot set the clock")
        };
        set(jump)?;
        thread::sleep(Duration::from_millis(rng.u64(200..3000)));
        set(-jump)
    }

    /// Lets everything come to rest, and compares.
    fn compare(&mut self, vandal: &mut Vandal<'_>, is_quiet: &AtomicBool) -> Result<()> {
        is_quiet.store(true, Ordering::Relaxed);
        vandal.settle();
        thread::sleep(Duration::from_secs(1));
        let right = self.stage.fresh()?;
        let node = &self.stage.world.node;
        let start = Instant::now();
        let differences = loop {
            let differences = Kernel::read(node).map(|kernel| kernel.differences(&right));
            match differences {
                Ok(differences) if differences.is_empty() || start.elapsed() > PATIENCE => break differences,
                Err(error) if start.elapsed() > PATIENCE => return Err(error),
                _ => thread::sleep(Duration::from_secs(1)),
            }
        };
        for difference in differences {
            self.shared.differs(&difference);
        }
        if !node.exec("ipvsadm -Sn")?.contains("-a -t 172.16.0.1:80 -r 172.16.0.2:80 -m -w 1") {
            self.shared.differs("somebody else's virtual server was touched");
        }
        if !node.exec("nft list tables")?.contains("table ip other") {
            self.shared.differs("somebody else's table was touched");
        }
        let (lost, answered) = {
            let mut tally = self.shared.lock();
            tally.comparisons += 1;
            (
                tally.traffic.values().map(|it| it.lost).sum::<u64>(),
                tally.traffic.values().map(|it| it.answered).sum::<u64>(),
            )
        };
        let usage = self.agent.usage()?;
        println!(
            "{:>5.0} s  {answered} answers, {lost} lost; life {}, {:.1} MiB",
            self.shared.start.elapsed().as_secs_f64(),
            self.life,
            report::mib(usage.resident)
        );
        is_quiet.store(false, Ordering::Relaxed);
        Ok(())
    }
}
