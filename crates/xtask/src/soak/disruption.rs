//! Disruptions: faults of the API server, and drift that another program makes with ipvsadm, ip and nft.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use fastrand::Rng;
use lab::netns::Namespace;
use test_apiserver::Server;

use super::record::{Recorder, Repairs};
use crate::workload::cluster::{VICTIMS, victim_vip};

/// How long anything may take to be repaired: the sync period of the soak several times.
const REPAIR_TIMEOUT: Duration = Duration::from_secs(90);

/// What an API server can do.
const API_FAULTS: [&str; 10] = [
    "watches end",
    "watches break off",
    "watches expire",
    "history is compacted",
    "status 500",
    "status 429",
    "forbidden",
    "nonsense",
    "nobody listens",
    "an empty list",
];

/// Lets the API server do one of these things for a while.
pub(crate) fn inject_api_fault(server: &Server, rng: &mut Rng, recorder: &Recorder) {
    let kind = API_FAULTS[rng.usize(..API_FAULTS.len())];
    recorder.disruption(&format!("API server: {kind}"));
    let json = "application/json";
    match kind {
        "watches end" => return server.end_watches(),
        "watches break off" => return server.break_watches(),
        "watches expire" => return server.expire_watches(),
        "history is compacted" => {
            server.compact();
            return server.break_watches();
        }
        "status 500" => server.answer_with(None, 500, json, status(500)),
        "status 429" => server.answer_with(None, 429, json, status(429)),
        "forbidden" => server.forbid(None),
        "nonsense" => server.answer_with(None, 200, json, "{\"kind\": [}"),
        "nobody listens" => server.refuse(),
        _ => {
            let empty = "{\"apiVersion\": \"v1\", \"kind\": \"List\", \"metadata\": {\"resourceVersion\": \"1\"}, \"items\": []}";
            server.answer_with(None, 200, json, empty);
        }
    }
    server.break_watches();
    thread::sleep(Duration::from_secs(rng.u64(1..5)));
    server.recover();
}

fn status(code: u16) -> String {
    format!("{{\"kind\": \"Status\", \"apiVersion\": \"v1\", \"status\": \"Failure\", \"code\": {code}}}")
}

/// What somebody can do to a Service in the kernel: a name, and commands with the VIP in the place of `VIP`.
const DRIFTS: [(&str, &str); 8] = [
    ("virtual server deleted", "ipvsadm -D -t VIP:80"),
    ("scheduler changed", "ipvsadm -E -t VIP:80 -s wlc"),
    ("persistence set", "ipvsadm -E -t VIP:80 -s rr -p 60"),
    ("weight set to 0", "ipvsadm -e -t VIP:80 -r 10.245.0.1:8080 -m -w 0"),
    ("real server deleted", "ipvsadm -d -t VIP:80 -r 10.245.0.2:8080"),
    ("real server added", "ipvsadm -a -t VIP:80 -r 10.245.0.9:8080 -m"),
    ("VIP removed", "ip address del VIP/32 dev kube-ipvs0"),
    ("VIP taken out of the packet filter", "nft delete element ip kube-ipvs vips { VIP }"),
];

/// A Service that somebody has changed, until it is as it was.
#[derive(Debug)]
struct Drifted {
    victim: usize,
    kind: &'static str,
    since: Instant,
}

/// Changes what the agent has programmed, and measures how long the repair takes.
pub(crate) struct DriftInjector<'a> {
    node: &'a Namespace,
    recorder: &'a Recorder,
    /// What each victim looks like when it is as it should be.
    expected: Vec<String>,
    drifted: Vec<Drifted>,
}

impl<'a> DriftInjector<'a> {
    /// All victims are as they should be now.
    pub(crate) fn new(node: &'a Namespace, recorder: &'a Recorder) -> Result<Self> {
        let mut injector = Self { node, recorder, expected: Vec::new(), drifted: Vec::new() };
        let kernel = injector.read_kernel()?;
        injector.expected = (0..VICTIMS).map(|victim| lines_of(&kernel, victim)).collect();
        Ok(injector)
    }

    /// All that there is of victims, a line each.
    fn read_kernel(&self) -> Result<String> {
        let servers = self.node.exec("ipvsadm -Sn")?;
        let addresses = self.node.exec("ip -oneline address show dev kube-ipvs0")?;
        let vips = self.node.exec("nft list set ip kube-ipvs vips")?;
        Ok(format!("{servers}{addresses}{}", vips.replace([',', '{', '}'], "\n")))
    }

    /// Changes something of a victim that is as it should be.
    pub(crate) fn inject(&mut self, rng: &mut Rng) {
        let victim = rng.usize(..VICTIMS);
        if self.drifted.iter().any(|it| it.victim == victim) {
            return;
        }
        let (kind, command) = DRIFTS[rng.usize(..DRIFTS.len())];
        // Where the agent was faster with something else there may be nothing to change.
        if self.node.exec(&command.replace("VIP", &victim_vip(victim))).is_ok() {
            self.recorder.traffic.note(&format!("victim {victim}: {kind}"));
            self.recorder.lock().drifts.entry(kind.to_owned()).or_default().made += 1;
            self.drifted.push(Drifted { victim, kind, since: Instant::now() });
        }
    }

    /// Looks who is as it should be again.
    pub(crate) fn check_repairs(&mut self) {
        if self.drifted.is_empty() {
            return;
        }
        // A set that is being made anew is none at that moment.
        let Ok(kernel) = self.read_kernel() else { return };
        self.drifted.retain(|it| {
            let took = it.since.elapsed();
            let is_repaired = lines_of(&kernel, it.victim) == self.expected[it.victim];
            if is_repaired {
                let mut record = self.recorder.lock();
                let repairs: &mut Repairs = record.drifts.entry(it.kind.to_owned()).or_default();
                repairs.repaired += 1;
                repairs.longest = repairs.longest.max(took.as_secs_f64());
            } else if took > REPAIR_TIMEOUT {
                self.recorder.differs(&format!("{} of victim {} is not repaired", it.kind, it.victim));
            }
            !is_repaired && took <= REPAIR_TIMEOUT
        });
    }

    /// Waits until nothing is otherwise than it should be.
    pub(crate) fn wait_for_repairs(&mut self) {
        while !self.drifted.is_empty() {
            self.check_repairs();
            thread::sleep(Duration::from_millis(300));
        }
    }
}

/// The lines about a victim, sorted.
fn lines_of(kernel: &str, victim: usize) -> String {
    let vip = victim_vip(victim);
    let is_end = |rest: &str| !rest.starts_with(|c: char| c.is_ascii_digit());
    let mut lines: Vec<&str> = kernel
        .lines()
        .map(str::trim)
        .filter(|line| line.match_indices(&vip).any(|(place, _)| is_end(&line[place + vip.len()..])))
        .collect();
    lines.sort_unstable();
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_a_victim_are_those_with_exactly_its_vip() {
        let kernel =
            "-A -t 10.98.0.1:80 -s rr\n-A -t 10.98.0.10:80 -s rr\n10.98.0.1\n-a -t 10.98.0.1:80 -r 10.245.0.1:8080\n";
        assert_eq!(lines_of(kernel, 0), "-A -t 10.98.0.1:80 -s rr\n-a -t 10.98.0.1:80 -r 10.245.0.1:8080\n10.98.0.1");
    }
}
