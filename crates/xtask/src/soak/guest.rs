//! Inside the lab: everything at once, for as long as was ordered.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use fastrand::Rng;
use lab::Scratch;
use lab::http::Metrics;
use rustix::process::Signal;
use rustix::time::{ClockId, Timespec, clock_settime};
use test_apiserver::Server;

use super::disruption::{DriftInjector, inject_api_fault};
use super::record::{Recorder, Sample};
use super::{SoakOptions, report};
use crate::bench::agent::Agent;
use crate::bench::load::{self, Size};
use crate::workload::cluster::{
    self, CHANGING_ENDPOINTS, CHANGING_SERVICES, Cluster, STABLE_ENDPOINTS, TCP_TARGETS, VICTIMS,
};
use crate::workload::kernel_state::KernelState;
use crate::workload::traffic;

/// Short, so that drift is found often. Everything else is as in a cluster.
const SYNC_PERIOD: &str = "--ipvs-sync-period=10s";
/// How many endpoints a Service that changes all the time has at most.
const ENDPOINTS: usize = 10;
/// How often the kernel is compared with what a fresh start makes.
const COMPARE_INTERVAL: Duration = Duration::from_secs(120);
/// The kernel may need this long to become as a fresh start makes it: the sync period, and real servers that drain.
const CONVERGENCE_TIMEOUT: Duration = Duration::from_secs(120);

/// Soaks the agent inside the lab.
#[derive(clap::Args)]
pub(crate) struct GuestArgs {
    options: PathBuf,
    results: PathBuf,
}

pub(crate) fn run_guest(args: &GuestArgs) -> Result<ExitCode> {
    let options: SoakOptions = serde_json::from_slice(&fs::read(&args.options).context("cannot read the options")?)?;
    let record = soak(&options)?;
    fs::write(&args.results, record).context("cannot write the results")?;
    Ok(ExitCode::SUCCESS)
}

fn soak(options: &SoakOptions) -> Result<Vec<u8>> {
    let cluster = Cluster::new()?;
    let recorder = Recorder::new(options.seconds, options.seed);
    let setup = TestSetup::new(options, &cluster)?;
    traffic::serve_services(&cluster)?;
    let mut driver = AgentDriver { agent: setup.start()?, life: 1, found: 0.0, setup: &setup, recorder: &recorder };
    let is_ready =
        || Metrics::read().is_ok_and(|it| it.get("kube_ipvs_sync_duration_seconds_count{kind=\"audit\"}") > Some(0.0));
    while !is_ready() {
        if recorder.traffic.start.elapsed() > CONVERGENCE_TIMEOUT {
            bail!("the agent does not come up");
        }
        thread::sleep(Duration::from_millis(200));
    }

    let (is_over, is_quiet) = (Arc::new(AtomicBool::new(false)), AtomicBool::new(false));
    let mut injector = DriftInjector::new(&cluster.node, &recorder)?;
    let played = thread::scope(|scope| {
        traffic::start_clients(scope, &cluster, TCP_TARGETS, &recorder.traffic, &is_over);
        scope.spawn(|| churn(&setup, &recorder, &is_over, &is_quiet));
        let played = driver.play(&mut injector, &is_quiet);
        is_over.store(true, Ordering::Relaxed);
        played
    });
    played?;
    let found = driver.found + Metrics::read()?.sum("kube_ipvs_drift_found_total");
    recorder.lock().drift_found = found;
    driver.agent.kill();
    let record = serde_json::to_vec_pretty(&recorder.result())?;
    Ok(record)
}

/// What the agent needs to run, and the API server it listens to.
struct TestSetup<'a> {
    options: &'a SoakOptions,
    cluster: &'a Cluster,
    server: Server,
    dir: Scratch,
}

impl<'a> TestSetup<'a> {
    fn new(options: &'a SoakOptions, cluster: &'a Cluster) -> Result<Self> {
        let server = Server::new();
        for object in (Size { services: options.services, endpoints: ENDPOINTS }).objects() {
            server.apply(object);
        }
        let services = cluster::services();
        for service in services {
            let name = service["metadata"]["name"].as_str().unwrap_or_default().to_owned();
            server.apply(service);
            server.apply(cluster::slice(&name, &STABLE_ENDPOINTS, &[]));
        }
        for number in 0..VICTIMS {
            for object in cluster::victim(number) {
                server.apply(object);
            }
        }
        let setup = Self { options, cluster, server, dir: Scratch::new()? };
        setup.listen("kubeconfig")?;
        Ok(setup)
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
        Agent::start(&self.options.agent, &Self::flags(&self.dir.path().join("kubeconfig")))
    }

    /// What a fresh start makes.
    fn expected_state(&self) -> Result<KernelState> {
        let namespace = cluster::namespace_like_node()?;
        namespace.run(|| {
            let kubeconfig = self.listen("fresh")?;
            Agent::run_once(&self.options.agent, &Self::flags(&kubeconfig))?;
            KernelState::read(&namespace)
        })?
    }
}

/// Changes Services and endpoints until it is over.
fn churn(setup: &TestSetup<'_>, recorder: &Recorder, is_over: &AtomicBool, is_quiet: &AtomicBool) {
    let mut rng = Rng::with_seed(setup.options.seed);
    let mut absent: Vec<usize> = Vec::new();
    let server = &setup.server;
    while !is_over.load(Ordering::Relaxed) {
        thread::sleep(Duration::from_millis(50));
        if is_quiet.load(Ordering::Relaxed) {
            continue;
        }
        // The first is `default/kubernetes`.
        let number = rng.usize(1..setup.options.services.max(2));
        match rng.u32(..20) {
            0 if !absent.contains(&number) => {
                let (namespace, name) = load::service_name(number);
                server.delete("Service", &namespace, &name);
                absent.push(number);
                recorder.changed("Services deleted");
            }
            1 => {
                if let Some(number) = absent.pop() {
                    server.apply(load::service(number));
                    recorder.changed("Services made");
                }
            }
            2 | 3 => {
                let name = CHANGING_SERVICES[rng.usize(..CHANGING_SERVICES.len())];
                let mut ready: Vec<&str> = STABLE_ENDPOINTS.into();
                let mut terminating = Vec::new();
                for address in CHANGING_ENDPOINTS {
                    match rng.u8(..3) {
                        0 => ready.push(address),
                        1 => terminating.push(address),
                        _ => {}
                    }
                }
                server.apply(cluster::slice(name, &ready, &terminating));
                recorder.changed("slices with traffic changed");
            }
            _ => {
                let first = rng.usize(..1000);
                let addresses = (0..rng.usize(..=ENDPOINTS)).map(|it| load::endpoint(first + it));
                server.apply(load::slice(number, "s0", addresses));
                recorder.changed("slices changed");
            }
        }
    }
}

/// Who does things to the agent, and keeps count of its lives.
struct AgentDriver<'a> {
    agent: Agent,
    life: u64,
    /// Drift that earlier lives had found.
    found: f64,
    setup: &'a TestSetup<'a>,
    recorder: &'a Recorder,
}

impl AgentDriver<'_> {
    /// In the first third the agent is killed again and again. The one that lives then is looked at for memory.
    fn play(&mut self, injector: &mut DriftInjector<'_>, is_quiet: &AtomicBool) -> Result<()> {
        let mut rng = Rng::with_seed(self.setup.options.seed + 1);
        let length = Duration::from_secs(self.setup.options.seconds);
        let mut compared = Instant::now();
        let mut sampled = Instant::now();
        while self.recorder.traffic.start.elapsed() < length {
            let until = Instant::now() + Duration::from_millis(rng.u64(500..3000));
            while Instant::now() < until {
                if sampled.elapsed() > Duration::from_secs(5) {
                    sampled = Instant::now();
                    self.sample()?;
                }
                injector.check_repairs();
                thread::sleep(Duration::from_millis(250));
            }
            let may_kill = self.recorder.traffic.start.elapsed() < length / 3;
            match rng.u8(..10) {
                0..3 if may_kill => self.kill()?,
                3 => self.stop(&mut rng)?,
                4..6 => inject_api_fault(&self.setup.server, &mut rng, self.recorder),
                6 if self.setup.options.may_set_clock => self.set_clock(&mut rng)?,
                _ => injector.inject(&mut rng),
            }
            if compared.elapsed() > COMPARE_INTERVAL {
                self.compare(injector, is_quiet)?;
                compared = Instant::now();
            }
        }
        self.compare(injector, is_quiet)
    }

    fn sample(&mut self) -> Result<()> {
        // Its log is read so that it does not pile up.
        drop(self.agent.pending());
        let pid = self.agent.id();
        let count = |what: &str| fs::read_dir(format!("/proc/{pid}/{what}")).map(Iterator::count);
        let sample = Sample {
            at: self.recorder.traffic.start.elapsed().as_secs_f64(),
            life: self.life,
            resident: self.agent.usage()?.resident,
            files: count("fd").context("the agent has ended by itself")?,
            threads: count("task").context("the agent has ended by itself")?,
        };
        self.recorder.lock().samples.push(sample);
        Ok(())
    }

    fn kill(&mut self) -> Result<()> {
        self.recorder.disruption("killed");
        // One that has only just started does not serve metrics yet.
        self.found += Metrics::read().map_or(0.0, |metrics| metrics.sum("kube_ipvs_drift_found_total"));
        self.agent.kill();
        self.agent = self.setup.start()?;
        self.life += 1;
        Ok(())
    }

    fn stop(&mut self, rng: &mut Rng) -> Result<()> {
        self.recorder.disruption("stopped for a while");
        self.agent.signal(Signal::STOP)?;
        thread::sleep(Duration::from_millis(rng.u64(200..3000)));
        self.agent.signal(Signal::CONT)
    }

    /// Sets the clock up to a day forwards or back, for a while.
    fn set_clock(&self, rng: &mut Rng) -> Result<()> {
        self.recorder.disruption("clock set for a while");
        let jump = rng.i64(-86_400..86_400);
        let set = |by: i64| {
            // Not rustix's clock_gettime, which takes for granted that the vDSO has one: that of User-Mode Linux 7.2 has none.
            let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).context("the clock is before 1970")?;
            let mut now = Timespec::try_from(since_1970).context("the clock is too far in the future")?;
            now.tv_sec += by;
            clock_settime(ClockId::Realtime, now).context("cannot set the clock")
        };
        set(jump)?;
        thread::sleep(Duration::from_millis(rng.u64(200..3000)));
        set(-jump)
    }

    /// Lets everything come to rest, and compares.
    fn compare(&mut self, injector: &mut DriftInjector<'_>, is_quiet: &AtomicBool) -> Result<()> {
        is_quiet.store(true, Ordering::Relaxed);
        injector.wait_for_repairs();
        thread::sleep(Duration::from_secs(1));
        let right = self.setup.expected_state()?;
        let node = &self.setup.cluster.node;
        let start = Instant::now();
        let differences = loop {
            let differences = KernelState::read(node).map(|kernel| kernel.differences(&right));
            match differences {
                Ok(differences) if differences.is_empty() || start.elapsed() > CONVERGENCE_TIMEOUT => {
                    break differences;
                }
                Err(error) if start.elapsed() > CONVERGENCE_TIMEOUT => return Err(error),
                _ => thread::sleep(Duration::from_secs(1)),
            }
        };
        for difference in differences {
            self.recorder.differs(&difference);
        }
        if !node.exec("ipvsadm -Sn")?.contains("-a -t 172.16.0.1:80 -r 172.16.0.2:80 -m -w 1") {
            self.recorder.differs("somebody else's virtual server was touched");
        }
        if !node.exec("nft list tables")?.contains("table ip other") {
            self.recorder.differs("somebody else's table was touched");
        }
        self.recorder.lock().comparisons += 1;
        let sum = self.recorder.traffic.lock().sum();
        let usage = self.agent.usage()?;
        println!(
            "{:>5.0} s  {} answers, {} lost; life {}, {:.1} MiB",
            self.recorder.traffic.start.elapsed().as_secs_f64(),
            sum.answered,
            sum.lost,
            self.life,
            report::mib(usage.resident)
        );
        is_quiet.store(false, Ordering::Relaxed);
        Ok(())
    }
}
