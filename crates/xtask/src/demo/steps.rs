//! The six steps of the demo, and the checks in them. Nothing here depends on how fast the machine is, only on what
//! happens.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::agent::{Agent, FLAGS, Manifests};
use super::network::{self, BACKENDS, Backend, Connection, Network, SERVICE};
use super::screen::Screen;

/// The longest that anything is waited for. Everything takes a fraction of it, unless something is broken.
const STEP_TIMEOUT: Duration = Duration::from_secs(15);

/// How many requests the client makes to see who answers.
const REQUESTS: usize = 6;

/// All that is needed to play the steps.
pub(super) struct Demo<'a> {
    pub(super) screen: &'a mut Screen,
    pub(super) network: &'a Network,
    pub(super) manifests: &'a Manifests,
    pub(super) agent: Agent,
}

impl Demo<'_> {
    pub(super) fn steps(&mut self) -> Result<()> {
        self.network();
        self.service_appears()?;
        self.scale_up()?;
        let left = self.scale_down()?;
        self.affinity(&left)?;
        self.agent_dies()
    }

    fn network(&mut self) {
        self.screen.step(
            "The network",
            "Each box is a network namespace with a network of its own, each line a pair of veth devices.",
        );
        self.screen.output(network::DRAWING.trim_start_matches('\n'));
        self.screen.text(
            "A Service will appear, scale up and down, keep its clients with their servers, and outlive its agent.",
        );
        self.screen.rest();
    }

    fn service_appears(&mut self) -> Result<()> {
        self.screen.step(
            "A Service appears",
            "kube-ipvs reads the manifests of examples/hello and makes a virtual server with two real ones of them.",
        );
        let [first, second, _] = BACKENDS;
        self.screen.facts(&[
            ("Service", "default/hello, ClusterIP, sessionAffinity: None".to_owned()),
            ("address", format!("{SERVICE}, TCP")),
            ("endpoints", format!("{} ({}), {} ({})", first.socket(), first.name, second.socket(), second.name)),
        ]);
        self.screen.command(&format!("kube-ipvs {} &", FLAGS.join(" ")));
        let started = Instant::now();
        self.agent.start(self.network)?;
        self.wait_for_weights(&[first, second])?;
        let took = started.elapsed();
        let log = self.wait_for_log("audited")?;
        self.screen.log("the agent", &log);
        self.table()?;
        let command = "ip -br addr show kube-ipvs0";
        self.screen.command(command);
        let addresses = self.network.node().exec(command)?;
        self.screen.output(&addresses);
        self.screen
            .text("(DOWN is as it should be: nothing is sent there; it makes the address one of the node's own.)");
        let vip = SERVICE.ip().to_string();
        self.screen.check(
            addresses.contains(&format!(" {vip}/32")),
            &format!("the Service is in the kernel {} after the start of the agent", millis(took)),
            &format!("{vip} is not on kube-ipvs0"),
        )?;
        self.requests_spread_over(&[first, second])?;
        self.screen.rest();
        Ok(())
    }

    fn scale_up(&mut self) -> Result<()> {
        self.screen.step("Scale up", "A third endpoint in the manifest becomes a third real server.");
        let written = Instant::now();
        let difference = self.manifests.add(BACKENDS[2])?;
        self.wait_for_weights(&BACKENDS)?;
        let took = written.elapsed();
        self.screen.difference("endpointslice.yaml", &difference);
        let log = self.wait_for_log("synced")?;
        self.screen.log("the agent", &log);
        self.table()?;
        self.screen.passed(&format!("the real server is in the kernel {} after the manifest changed", millis(took)));
        self.requests_spread_over(&BACKENDS)?;
        self.screen.rest();
        Ok(())
    }

    /// Returns the backends that are left.
    fn scale_down(&mut self) -> Result<Vec<Backend>> {
        self.screen.step(
            "Scale down with a connection open",
            "A real server that must go takes nothing new, but keeps its connections: it drains (weight 0).",
        );
        let mut connection = self.network.open_connection()?;
        let (gone, left) = split(connection.name())?;
        self.screen.text(&format!(
            "The client opens a connection, which {} answers; then that endpoint leaves the manifest.",
            self.screen.name(gone.name)
        ));
        let difference = self.manifests.remove(gone)?;
        self.until("let the real server drain", |demo| {
            let found = demo.network.real_server(gone)?;
            Ok(found.is_some_and(|entry| entry.server.weight == 0))
        })?;
        self.screen.difference("endpointslice.yaml", &difference);
        let log = self.wait_for_log("draining=1")?;
        self.screen.log("the agent", &log);
        self.table()?;
        let entry =
            self.network.real_server(gone)?.with_context(|| format!("{} left while it was in use", gone.name))?;
        self.screen.check(
            entry.active_connections == 1,
            &format!("{} drains: weight 0, and its 1 active connection stays", gone.name),
            &format!("it has {} active connections", entry.active_connections),
        )?;
        let answer = connection.request("still there?")?;
        self.screen.check(
            answer == gone.name,
            &format!("the open connection works: {} answers on it", gone.name),
            &format!("the answer was `{answer}`"),
        )?;
        self.requests_spread_over(&left)?;
        self.wait_for_close(gone, connection)?;
        self.screen.rest();
        Ok(left)
    }

    /// Ends the connection to a backend and waits until the agent has taken its real server away.
    fn wait_for_close(&mut self, gone: Backend, mut connection: Connection) -> Result<()> {
        self.screen.text(&format!(
            "The client says goodbye, and {} hangs up. The kernel remembers the connection (InActConn): for 2 s\n\
             after the server's FIN (--ipvs-tcpfin-timeout), and for 2 minutes had the client hung up too (TIME_WAIT).",
            self.screen.name(gone.name)
        ));
        let hung_up = Instant::now();
        connection.close()?;
        let mut shown = None;
        self.until("take the drained real server away", |demo| {
            let now =
                demo.network.real_server(gone)?.map(|entry| (entry.active_connections, entry.inactive_connections));
            if shown != Some(now) {
                shown = Some(now);
                demo.screen.progress(hung_up.elapsed(), gone, now);
            }
            Ok(now.is_none())
        })?;
        let log = self.wait_for_log("synced")?;
        self.screen.log("the agent", &log);
        self.table()?;
        self.screen.passed(&format!("{} is out of the table, and no connection was cut", gone.name));
        // Only now may the client hang up: see above.
        drop(connection);
        Ok(())
    }

    fn affinity(&mut self, backends: &[Backend]) -> Result<()> {
        self.screen
            .step("Session affinity", "With sessionAffinity: ClientIP a client stays with the server it met first.");
        let difference = self.manifests.set_affinity()?;
        self.until("make the virtual server persistent", |demo| {
            Ok(demo.network.virtual_server()?.and_then(|server| server.persistence).map(|it| it.timeout)
                == Some(10_800))
        })?;
        self.screen.difference("service.yaml", &difference);
        let log = self.wait_for_log("synced")?;
        self.screen.log("the agent", &log);
        let answers = self.requests()?;
        self.table()?;
        let first = answers.first().cloned().unwrap_or_default();
        self.screen.check(
            answers.iter().all(|name| *name == first) && backends.iter().any(|backend| backend.name == first),
            &format!("the table says `persistent 10800` (seconds), and {first} answered all {REQUESTS} requests"),
            &format!("the answers came from {}", answers.join(", ")),
        )?;
        self.screen.rest();
        Ok(())
    }

    fn agent_dies(&mut self) -> Result<()> {
        self.screen.step(
            "The agent dies and comes back",
            "The kernel does the work. Without the agent all goes on; a new one takes over without a change.",
        );
        let before = self.state()?;
        let over = AtomicBool::new(false);
        let (answered, state) = std::thread::scope(|scope| {
            let network = self.network;
            let over = &over;
            let traffic = scope.spawn(move || {
                let mut answered = 0_u32;
                while !over.load(Ordering::Relaxed) {
                    network.ask().with_context(|| format!("after {answered} requests that were answered"))?;
                    answered += 1;
                    std::thread::sleep(Duration::from_millis(10));
                }
                anyhow::Ok(answered)
            });
            let restarted = self.kill_and_restart();
            over.store(true, Ordering::Relaxed);
            let answered = traffic.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            anyhow::Ok((answered, restarted?))
        })?;
        let answered = answered.context("a request failed while the agent was dead or starting")?;
        self.screen.check(
            answered > 0,
            &format!("the client made {answered} requests meanwhile, and all were answered"),
            "it could make none",
        )?;
        let log = self.agent.new_log_lines();
        self.screen.log("the new agent", &log);
        self.screen.check(
            state == before && log.iter().any(|line| line.contains("audited, nothing to change")),
            "the new agent changed nothing: it says so, and the kernel's state is the same",
            &format!("before:\n{before}\nafter:\n{state}"),
        )?;
        self.screen.text("It is up to date: an endpoint that comes back is the only thing it writes.");
        let difference = self.add_missing()?;
        self.wait_for_weights(&BACKENDS)?;
        self.screen.difference("endpointslice.yaml", &difference);
        let log = self.wait_for_log("real_servers=")?;
        self.screen.log("the agent", &log);
        self.screen.check(
            log.iter().any(|line| line.contains("synced real_servers=\"+1\" filter=\"+1\" total=")),
            "one real server was written, and that this pod may ask itself; nothing else",
            "the agent's log says otherwise",
        )?;
        self.screen.rest();
        Ok(())
    }

    /// Returns the kernel's state once the new agent has looked at it.
    fn kill_and_restart(&mut self) -> Result<String> {
        self.screen.command("kill -9 $(pidof kube-ipvs)");
        self.agent.kill();
        std::thread::sleep(Duration::from_millis(500));
        self.screen.command(&format!("kube-ipvs {} &", FLAGS.join(" ")));
        self.agent.start(self.network)?;
        self.until("compare", |demo| Ok(demo.agent.has_logged("audited")))?;
        self.state()
    }

    /// Puts the endpoint that scaling down removed back into the manifest.
    fn add_missing(&mut self) -> Result<Vec<String>> {
        for backend in BACKENDS {
            if self.network.real_server(backend)?.is_none() {
                return self.manifests.add(backend);
            }
        }
        bail!("no endpoint is missing")
    }

    /// What the agent manages, without counters.
    fn state(&self) -> Result<String> {
        let node = self.network.node();
        Ok(node.exec("ipvsadm -Sn")? + &node.exec("ip -br addr show kube-ipvs0")?)
    }

    fn table(&mut self) -> Result<()> {
        let command = "ipvsadm -Ln";
        self.screen.command(command);
        let table = self.network.node().exec(command)?;
        self.screen.table(&table);
        Ok(())
    }

    fn requests(&mut self) -> Result<Vec<String>> {
        let answers = (0..REQUESTS).map(|_| self.network.ask()).collect::<Result<Vec<_>>>()?;
        self.screen.answers(&answers);
        Ok(answers)
    }

    /// Makes requests and checks that each of the backends gets the same share, and nobody else anything.
    fn requests_spread_over(&mut self, backends: &[Backend]) -> Result<()> {
        let answers = self.requests()?;
        let share = REQUESTS / backends.len();
        let is_fair =
            backends.iter().all(|backend| answers.iter().filter(|name| *name == backend.name).count() == share);
        let names: Vec<&str> = backends.iter().map(|backend| backend.name).collect();
        self.screen.check(
            is_fair,
            &format!("new requests go round {}: {share} to each", names.join(", ")),
            &format!("the answers came from {}", answers.join(", ")),
        )
    }

    /// Waits until these backends and no others are real servers, with weight 1.
    fn wait_for_weights(&mut self, backends: &[Backend]) -> Result<()> {
        self.until("bring the endpoints to the kernel", |demo| {
            let servers = demo.network.real_servers()?;
            let has = |backend: &Backend| {
                servers
                    .iter()
                    .any(|entry| entry.server.socket_address() == backend.socket() && entry.server.weight == 1)
            };
            Ok(servers.len() == backends.len() && backends.iter().all(has))
        })
    }

    /// Waits until the agent says something with these words; returns all that it said since last asked.
    fn wait_for_log(&mut self, words: &str) -> Result<Vec<String>> {
        self.until(&format!("log `{words}`"), |demo| Ok(demo.agent.has_logged(words)))?;
        Ok(self.agent.new_log_lines())
    }

    fn until(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> Result<bool>) -> Result<()> {
        let start = Instant::now();
        while !done(self)? {
            if let Some(status) = self.agent.ended() {
                bail!("the agent was to {what}, but ended ({status})");
            }
            if start.elapsed() > STEP_TIMEOUT {
                bail!("the agent did not {what} within {} s", STEP_TIMEOUT.as_secs());
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }
}

/// The backend of this name, and the others.
fn split(name: &str) -> Result<(Backend, Vec<Backend>)> {
    let (found, others): (Vec<Backend>, Vec<Backend>) = BACKENDS.iter().partition(|backend| backend.name == name);
    match found.first() {
        Some(found) => Ok((*found, others)),
        None => bail!("`{name}` answered, which is no backend"),
    }
}

fn millis(time: Duration) -> String {
    format!("{} ms", time.as_millis())
}
