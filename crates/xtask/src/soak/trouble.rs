//! What happens to the agent: kills, an API server that misbehaves, and somebody with ipvsadm, ip and nft.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use fastrand::Rng;
use lab::netns::Namespace;
use test_apiserver::Server;

use super::tally::{Repairs, Shared};
use super::world::{VICTIMS, victim_vip};

/// How long anything may take to be repaired: the sync period of the soak several times.
const PATIENCE: Duration = Duration::from_secs(90);

/// What an API server can do.
const MISBEHAVIOURS: [&str; 10] = [
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
pub(crate) fn misbehave(server: &Server, rng: &mut Rng, shared: &Shared) {
    let kind = MISBEHAVIOURS[rng.usize(..MISBEHAVIOURS.len())];
    shared.trouble(&format!("API server: {kind}"));
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

/// Somebody who changes what the agent has made, and looks how long that stays so.
pub(crate) struct Vandal<'a> {
    node: &'a Namespace,
    shared: &'a Shared,
    /// What each victim looks like when it is as it should be.
    right: Vec<String>,
    drifted: Vec<Drifted>,
}

impl<'a> Vandal<'a> {
    /// All victims are as they should be now.
    pub(crate) fn new(node: &'a Namespace, shared: &'a Shared) -> Result<Self> {
        let mut vandal = Self { node, shared, right: Vec::new(), drifted: Vec::new() };
        let kernel = vandal.look()?;
        vandal.right = (0..VICTIMS).map(|victim| of(&kernel, victim)).collect();
        Ok(vandal)
    }

    /// All that there is of victims, a line each.
    fn look(&self) -> Result<String> {
        let servers = self.node.exec("ipvsadm -Sn")?;
        let addresses = self.node.exec("ip -oneline address show dev kube-ipvs0")?;
        let vips = self.node.exec("nft list set ip kube-ipvs vips")?;
        Ok(format!("{servers}{addresses}{}", vips.replace([',', '{', '}'], "\n")))
    }

    /// Changes something of a victim that is as it should be.
    pub(crate) fn strike(&mut self, rng: &mut Rng) {
        let victim = rng.usize(..VICTIMS);
        if self.drifted.iter().any(|it| it.victim == victim) {
            return;
        }
        let (kind, command) = DRIFTS[rng.usize(..DRIFTS.len())];
        // Where the agent was faster with something else there may be nothing to change.
        if self.node.exec(&command.replace("VIP", &victim_vip(victim))).is_ok() {
            self.shared.note(&format!("victim {victim}: {kind}"));
            self.shared.lock().drifts.entry(kind.to_owned()).or_default().made += 1;
            self.drifted.push(Drifted { victim, kind, since: Instant::now() });
        }
    }

    /// Looks who is as it should be again.
    pub(crate) fn inspect(&mut self) {
        if self.drifted.is_empty() {
            return;
        }
        // A set that is being made anew is none at that moment.
        let Ok(kernel) = self.look() else { return };
        self.drifted.retain(|it| {
            let took = it.since.elapsed();
            let is_right = of(&kernel, it.victim) == self.right[it.victim];
            if is_right {
                let mut tally = self.shared.lock();
                let repairs: &mut Repairs = tally.drifts.entry(it.kind.to_owned()).or_default();
                repairs.repaired += 1;
                repairs.longest = repairs.longest.max(took.as_secs_f64());
            } else if took > PATIENCE {
                self.shared.differs(&format!("{} of victim {} is not repaired", it.kind, it.victim));
            }
            !is_right && took <= PATIENCE
        });
    }

    /// Waits until nothing is otherwise than it should be.
    pub(crate) fn settle(&mut self) {
        while !self.drifted.is_empty() {
            self.inspect();
            thread::sleep(Duration::from_millis(300));
        }
    }
}

/// The lines about a victim, sorted.
fn of(kernel: &str, victim: usize) -> String {
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
    fn a_victim_has_the_lines_with_its_vip_and_not_those_of_one_that_begins_so() {
        let kernel =
            "-A -t 10.98.0.1:80 -s rr\n-A -t 10.98.0.10:80 -s rr\n10.98.0.1\n-a -t 10.98.0.1:80 -r 10.245.0.1:8080\n";
        assert_eq!(of(kernel, 0), "-A -t 10.98.0.1:80 -s rr\n-a -t 10.98.0.1:80 -r 10.245.0.1:8080\n10.98.0.1");
    }
}
