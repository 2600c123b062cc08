//! Inside the lab: the node, its honest Services, and everybody who attacks it.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use fastrand::Rng;
use lab::Scratch;
use lab::http::{self, METRICS};
use lab::objects::{self, port, with};
use serde_json::json;
use test_apiserver::Server;

use super::AttackOptions;
use super::flush::{self, is_whole};
use super::honest::{self, Running};
use super::hostile::{self, Objects};
use super::local_user::LocalAttack;
use super::objects::{STRANGER_PORT, Weight};
use super::record::Recorder;
use crate::bench::agent::Agent;
use crate::workload::cluster::{
    self, CONTROL_PLANE, Cluster, STABLE_ENDPOINTS, STRANGER, TCP_TARGETS, Target, VICTIMS,
};
use crate::workload::kernel_state::KernelState;
use crate::workload::traffic;

/// An agent starts within this time, or the attack has no object.
const START_TIMEOUT: Duration = Duration::from_secs(120);
/// How long the kernel may take to lose all that was hostile.
const CONVERGENCE_TIMEOUT: Duration = Duration::from_secs(120);
/// Ports of the control plane and of kubelet, where their addresses answer.
const API_PORT: u16 = 6443;
const CONTROL_PLANE_PORT: u16 = 6444;
const KUBELET_PORT: u16 = 10_250;

/// That the agent ends as if the kernel had killed it.
const RESTART: &str = "the agent is killed and starts anew";

/// What is asked by its own address, by no Service.
const DIRECT_TARGETS: [Target; 3] = [
    Target { name: "kubelet", address: "192.168.1.1:10250", is_asked_by: [true, true, false] },
    Target { name: "a pod's own address", address: "10.244.1.1:8087", is_asked_by: [true, true, true] },
    Target { name: "the control plane", address: "192.168.1.3:6444", is_asked_by: [false, true, true] },
];

/// Attacks the agent inside the lab.
#[derive(clap::Args)]
pub(crate) struct GuestArgs {
    options: PathBuf,
    results: PathBuf,
}

pub(crate) fn run_guest(args: &GuestArgs) -> Result<ExitCode> {
    let options: AttackOptions = serde_json::from_slice(&fs::read(&args.options).context("cannot read the options")?)?;
    let record = attack(&options)?;
    fs::write(&args.results, record).context("cannot write the results")?;
    Ok(ExitCode::SUCCESS)
}

fn attack(options: &AttackOptions) -> Result<Vec<u8>> {
    let cluster = Cluster::new()?;
    let recorder = Recorder::new(options.seconds, options.seed);
    traffic::serve_services(&cluster)?;
    traffic::serve(&cluster.servers, STRANGER, STRANGER_PORT, |_| b"I am a stranger\n")?;
    traffic::serve(&cluster.node, "192.168.1.1", KUBELET_PORT, |request| request)?;
    traffic::serve(&cluster.client, CONTROL_PLANE, CONTROL_PLANE_PORT, |request| request)?;
    let setup = TestSetup::new(options, &cluster)?;
    let mut victim = Victim { agent: setup.start()?, setup: &setup, recorder: &recorder };
    victim.wait_until_ready(Instant::now())?;
    if !is_whole(&cluster.node)? {
        bail!("the honest Services are not in the kernel before the attack");
    }

    let (running, is_over) = (Running::default(), Arc::new(AtomicBool::new(false)));
    let objects = Objects::new(&setup.server);
    let ends = || is_over.load(Ordering::Relaxed);
    thread::scope(|scope| {
        let targets = TCP_TARGETS.into_iter().chain(DIRECT_TARGETS);
        traffic::start_clients(scope, &cluster, targets, &recorder.traffic, &is_over);
        for weight in [Weight::Light, Weight::Heavy] {
            let objects = &objects;
            let recorder = &recorder;
            scope.spawn(move || hostile::write_objects(weight, objects, options, recorder, ends));
        }
        scope.spawn(|| hostile::flip_services(&objects, options, &recorder, ends));
        scope.spawn(|| hostile::change_nodes(&setup.server, options, &recorder, ends));
        scope.spawn(|| recorder.watch_stalls(ends));
        scope.spawn(|| honest::probe(&recorder, &running, ends));
        let changes = scope.spawn(|| honest::change(&setup.server, options.seed, &recorder, &running, ends));
        let played = victim.play(&running);
        is_over.store(true, Ordering::Relaxed);
        // A thread that has panicked says so itself.
        changes.join().unwrap_or_else(|_| bail!("the honest changes did not come to their end")).and(played)
    })?;
    objects.clear();
    victim.compare()?;
    victim.end_life();
    Ok(serde_json::to_vec_pretty(&recorder.result())?)
}

/// What the agent needs to run, and the API server it listens to.
struct TestSetup<'a> {
    options: &'a AttackOptions,
    cluster: &'a Cluster,
    server: Server,
    dir: Scratch,
}

impl<'a> TestSetup<'a> {
    /// The control plane is another machine, behind the node's network device.
    fn new(options: &'a AttackOptions, cluster: &'a Cluster) -> Result<Self> {
        let server = Server::new();
        let kubernetes = objects::service("kubernetes", &["10.96.0.1"], &[port("https", "TCP", 443)]);
        let created = json!({"metadata": {"creationTimestamp": "2024-01-01T00:00:00Z"}});
        server.apply(with(kubernetes, created));
        let https = [port("https", "TCP", API_PORT)];
        server.apply(objects::slice("kubernetes", "kubernetes", &https, &objects::ready([CONTROL_PLANE])));
        for object in hostile::nodes().into_iter().chain(cluster::services()) {
            if let Some("Service") = object["kind"].as_str() {
                let name = object["metadata"]["name"].as_str().unwrap_or_default();
                server.apply(cluster::slice(name, &STABLE_ENDPOINTS, &[]));
            }
            server.apply(object);
        }
        for object in (0..VICTIMS).flat_map(cluster::victim) {
            server.apply(object);
        }
        let setup = Self { options, cluster, server, dir: Scratch::new()? };
        let address: SocketAddr = format!("{CONTROL_PLANE}:{API_PORT}").parse().context("this is no address")?;
        cluster.client.run(|| setup.listen("kubeconfig", Some(address)))??;
        Ok(setup)
    }

    /// Has the API server listen in the namespace of this thread too, and writes a kubeconfig that leads there.
    fn listen(&self, file: &str, address: Option<SocketAddr>) -> Result<PathBuf> {
        let address = match address {
            Some(address) => self.server.listen_in_thread_at(address),
            None => self.server.listen_in_thread(),
        };
        let path = self.dir.path().join(file);
        Server::write_kubeconfig(&path, address.context("cannot start the API server")?);
        Ok(path)
    }

    fn flags(&self, kubeconfig: &Path) -> Vec<String> {
        let mut flags = vec![
            format!("--kubeconfig={}", kubeconfig.display()),
            "--nodeport-addresses=192.168.1.0/24".to_owned(),
            "--watch-all-nodes".to_owned(),
        ];
        flags.extend(self.options.agent_flags.iter().cloned());
        flags
    }

    fn start(&self) -> Result<Agent> {
        Agent::start(&self.options.agent, &self.flags(&self.dir.path().join("kubeconfig")))
    }

    /// What a fresh start makes.
    fn expected_state(&self) -> Result<KernelState> {
        let namespace = cluster::namespace_like_node()?;
        namespace.run(|| {
            let kubeconfig = self.listen("fresh", None)?;
            Agent::run_once(&self.options.agent, &self.flags(&kubeconfig))?;
            KernelState::read(&namespace)
        })?
    }
}

/// The agent that is attacked, from its start to its end and again.
struct Victim<'a> {
    agent: Agent,
    setup: &'a TestSetup<'a>,
    recorder: &'a Recorder,
}

impl Victim<'_> {
    /// Root flushes, local users come and go, and the agent is killed and starts anew.
    fn play(&mut self, running: &Running) -> Result<()> {
        let options = self.setup.options;
        let mut rng = Rng::with_seed(options.seed.wrapping_add(4));
        let length = Duration::from_secs(options.seconds);
        while self.recorder.traffic.start.elapsed() < length {
            thread::sleep(Duration::from_millis(rng.u64(2000..6000)));
            match rng.u8(..10) {
                0..3 => {
                    let flush = flush::ALL[rng.usize(..flush::ALL.len())];
                    if options.wants(flush.name()) {
                        flush.run(&self.setup.cluster.node, self.recorder)?;
                    }
                }
                3..5 if options.wants(RESTART) => {
                    running.while_it_restarts(|| self.restart(&mut rng))?;
                }
                _ => {
                    let attack = LocalAttack::WHILE_IT_RUNS[rng.usize(..LocalAttack::WHILE_IT_RUNS.len())];
                    if options.wants(attack.name()) {
                        self.recorder.attacked(attack.name());
                        let _user = attack.start(&mut rng)?;
                        thread::sleep(Duration::from_secs(rng.u64(2..8)));
                    }
                }
            }
            if self.agent.has_ended()? {
                self.recorder.broken("the agent has ended by itself");
                running.while_it_restarts(|| self.restart(&mut rng))?;
            }
            self.print_progress();
        }
        Ok(())
    }

    fn print_progress(&self) {
        let sum = self.recorder.traffic.lock().sum();
        let changes = self.recorder.lock().changes.values().fold(0.0, |longest: f64, it| longest.max(it.longest));
        println!(
            "{:>5.0} s  {} answers, {} lost, {} in flushes; an honest change took at most {changes:.2} s",
            self.recorder.traffic.start.elapsed().as_secs_f64(),
            sum.answered,
            sum.lost,
            sum.lost_in_flush,
        );
    }

    /// Kills it and starts another, with all that is hostile there, and sometimes with the agents' name taken.
    fn restart(&mut self, rng: &mut Rng) -> Result<()> {
        self.recorder.attacked(RESTART);
        let attack = LocalAttack::TakenName;
        let takes_name = rng.bool() && self.setup.options.wants(attack.name());
        let user = takes_name.then(|| attack.start(rng)).transpose()?;
        self.end_life();
        if user.is_some() {
            self.recorder.attacked(attack.name());
            // It takes the name as soon as that is free.
            thread::sleep(Duration::from_millis(500));
        }
        let start = Instant::now();
        self.agent = self.setup.start()?;
        self.wait_until_ready(start)
    }

    /// Until everything was programmed once.
    fn wait_until_ready(&mut self, start: Instant) -> Result<()> {
        while !http::get_within(METRICS, "/readyz", Duration::from_secs(1)).is_ok_and(|it| it.status == 200) {
            if start.elapsed() > START_TIMEOUT || self.agent.has_ended()? {
                bail!("the agent does not come up:\n{}", self.agent.last_lines());
            }
            thread::sleep(Duration::from_millis(50));
        }
        let took = self.recorder.elapsed(start);
        self.recorder.lock().starts.add(took);
        Ok(())
    }

    /// Looks at what this agent needed and said, and kills it.
    fn end_life(&mut self) {
        // One that has ended by itself has no memory.
        let peak = self.agent.usage().map_or(0, |usage| usage.peak);
        self.agent.kill();
        {
            let mut record = self.recorder.lock();
            record.peak_memory = record.peak_memory.max(peak);
        }
        let log = self.agent.log();
        for line in log.lines().filter(|line| line.contains("panicked")) {
            self.recorder.broken(&format!("the agent's log has a panic: {line}"));
        }
        if self.setup.options.show_log {
            print!("{log}");
        }
    }

    /// Nothing hostile is left in the kernel, and of the honest nothing is missing.
    fn compare(&self) -> Result<()> {
        let right = self.setup.expected_state()?;
        let start = Instant::now();
        loop {
            let differences = KernelState::read(&self.setup.cluster.node).map(|kernel| kernel.differences(&right));
            let is_late = start.elapsed() > CONVERGENCE_TIMEOUT;
            match differences {
                Ok(differences) if differences.is_empty() => break,
                Ok(differences) if is_late => {
                    for difference in differences.iter().take(20) {
                        self.recorder
                            .broken(&format!("the kernel differs from what a fresh start makes: {difference}"));
                    }
                    break;
                }
                Err(error) if is_late => return Err(error),
                _ => thread::sleep(Duration::from_secs(1)),
            }
        }
        self.recorder.lock().recovery.add(start.elapsed());
        Ok(())
    }
}
