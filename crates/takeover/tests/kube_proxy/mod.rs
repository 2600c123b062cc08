//! Installs kube-proxy's rules and sets from a recording, with the real tools.
//!
//! A recording (`tests/conformance/*/raw-*.txt`) has the rules and the entries of sets; the definitions of chains and
//! sets, which are always the same, were left out of it and are made here. The tests of the agent include this file
//! too.

#![allow(
    dead_code,
    unreachable_pub,
    clippy::allow_attributes,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a fixture of tests, of which each uses a part"
)]

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};

/// The chains kube-proxy makes at each start, in its mode ipvs.
const CHAINS: [(&str, &[&str]); 2] = [
    (
        "filter",
        &[
            "KUBE-FORWARD",
            "KUBE-IPVS-FILTER",
            "KUBE-IPVS-OUT-FILTER",
            "KUBE-NODE-PORT",
            "KUBE-PROXY-FIREWALL",
            "KUBE-SOURCE-RANGES-FIREWALL",
        ],
    ),
    ("nat", &["KUBE-LOAD-BALANCER", "KUBE-MARK-MASQ", "KUBE-NODE-PORT", "KUBE-POSTROUTING", "KUBE-SERVICES"]),
];

/// The sets kube-proxy makes at each start for a family, by type. IPv6 has `KUBE-6-` for `KUBE-`, cut to 31 characters.
const SETS: [(&str, &[&str]); 5] = [
    ("hash:ip", &["KUBE-IPVS-IPS"]),
    (
        "hash:ip,port",
        &[
            "KUBE-CLUSTER-IP",
            "KUBE-EXTERNAL-IP",
            "KUBE-EXTERNAL-IP-LOCAL",
            "KUBE-LOAD-BALANCER",
            "KUBE-LOAD-BALANCER-FW",
            "KUBE-LOAD-BALANCER-LOCAL",
            "KUBE-NODE-PORT-SCTP-HASH",
            "KUBE-NODE-PORT-LOCAL-SCTP-HASH",
        ],
    ),
    ("hash:ip,port,ip", &["KUBE-LOOP-BACK", "KUBE-LOAD-BALANCER-SOURCE-IP"]),
    ("hash:ip,port,net", &["KUBE-LOAD-BALANCER-SOURCE-CIDR"]),
    (
        "bitmap:port",
        &[
            "KUBE-HEALTH-CHECK-NODE-PORT",
            "KUBE-NODE-PORT-TCP",
            "KUBE-NODE-PORT-UDP",
            "KUBE-NODE-PORT-LOCAL-TCP",
            "KUBE-NODE-PORT-LOCAL-UDP",
        ],
    ),
];

/// The kind of iptables that kube-proxy ran.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Iptables {
    /// The rules are in `nf_tables`.
    Nft,
    /// The rules are in `ip_tables` and `ip6_tables`.
    Legacy,
}

/// The recording of kube-proxy's rules after the first step of a conformance case.
pub fn recording(case: &str) -> String {
    // The package that includes this file is the agent's, at the root, or this crate.
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    let root = if package.ends_with("crates/takeover") { package.join("../..") } else { package.to_owned() };
    let path = root.join("tests/conformance").join(case).join("raw-1.txt");
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Makes the sets, chains and rules of a recording in the calling thread's network namespace, beside what is there.
///
/// As kube-proxy does, its rules are inserted before the others. Rules with the match `physdev` are left out: the
/// guest's kernel has none.
pub fn install_recording(recording: &str, iptables: Iptables) {
    let kind = match iptables {
        Iptables::Nft => "nft",
        Iptables::Legacy => "legacy",
    };
    feed("ipset", &["restore", "-exist"], &sets(section(recording, "ipset save")));
    for program in ["iptables", "ip6tables"] {
        let rules = rules(section(recording, &format!("{program}-save")));
        feed(&format!("{program}-{kind}-restore"), &["--wait", "--noflush"], &rules);
    }
}

/// The lines of a recording between a heading and the next.
fn section<'a>(recording: &'a str, heading: &str) -> impl Iterator<Item = &'a str> {
    let heading = format!("### {heading}");
    let lines = recording.lines().skip_while(move |line| *line != heading).skip(1);
    lines.take_while(|line| !line.starts_with("### "))
}

fn sets<'a>(entries: impl Iterator<Item = &'a str>) -> String {
    let mut input = String::new();
    for (kind, names) in SETS {
        for name in names {
            let options = |family| match kind {
                "bitmap:port" => "range 0-65535".to_owned(),
                _ => format!("family {family} hashsize 1024 maxelem 65536"),
            };
            let mut ipv6 = name.replacen("KUBE-", "KUBE-6-", 1);
            ipv6.truncate(31);
            let _ = writeln!(input, "create {name} {kind} {}", options("inet"));
            let _ = writeln!(input, "create {ipv6} {kind} {}", options("inet6"));
        }
    }
    for entry in entries {
        let _ = writeln!(input, "{entry}");
    }
    input
}

/// The input of `iptables-restore --noflush` for lines of `iptables-save`.
fn rules<'a>(saved: impl Iterator<Item = &'a str>) -> String {
    let saved: Vec<&str> = saved.filter(|line| !line.contains("-m physdev")).collect();
    let mut input = String::new();
    for (table, chains) in CHAINS {
        let start = format!("*{table}");
        let lines = saved.iter().skip_while(|line| **line != start).skip(1);
        let added: Vec<(&str, &str)> = lines
            .take_while(|line| !line.starts_with('*'))
            .filter_map(|line| line.strip_prefix("-A ")?.split_once(' '))
            .collect();
        let _ = writeln!(input, "{start}");
        for chain in chains {
            let _ = writeln!(input, ":{chain} - [0:0]");
        }
        let mut foreign = BTreeSet::new();
        // The last one first, so that each goes to the head.
        for (chain, rule) in added.iter().rev().filter(|(chain, _)| !chains.contains(chain)) {
            foreign.insert(chain);
            let _ = writeln!(input, "-I {chain} 1 {rule}");
        }
        for (chain, rule) in added.iter().filter(|(chain, _)| !foreign.contains(chain)) {
            let _ = writeln!(input, "-A {chain} {rule}");
        }
        let _ = writeln!(input, "COMMIT");
    }
    input
}

/// Runs a program that reads commands, to its end.
fn feed(program: &str, arguments: &[&str], input: &str) {
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap_or_else(|error| panic!("cannot run {program}: {error}"));
    if let Some(mut stdin) = child.stdin.take() {
        // A program that stops reading says why.
        let _ = stdin.write_all(input.as_bytes());
    }
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
}

#[cfg(test)]
mod tests {
    use super::*;

    const RECORDING: &str = "\
### iptables-save
*filter
-A INPUT -j KUBE-NODE-PORT
-A INPUT -j KUBE-PROXY-FIREWALL
-A KUBE-NODE-PORT -j ACCEPT
*nat
-A KUBE-SERVICES -m physdev ! --physdev-is-in -j ACCEPT

### ip6tables-save
*filter
-A OUTPUT -j KUBE-IPVS-OUT-FILTER

### ipset save
add KUBE-IPVS-IPS 10.96.0.10
";

    #[test]
    fn rules_in_foreign_chains_are_inserted_in_order() {
        let input = rules(section(RECORDING, "iptables-save"));
        let inserted =
            "-I INPUT 1 -j KUBE-PROXY-FIREWALL\n-I INPUT 1 -j KUBE-NODE-PORT\n-A KUBE-NODE-PORT -j ACCEPT\nCOMMIT";
        assert!(input.contains(inserted), "{input}");
        assert!(input.contains(":KUBE-SERVICES - [0:0]\nCOMMIT"), "{input}");
        assert!(!input.contains("physdev") && !input.contains("OUT-FILTER\nCOMMIT"), "{input}");
    }

    #[test]
    fn each_family_has_17_sets_with_valid_names() {
        let input = sets(section(RECORDING, "ipset save"));
        let names: BTreeSet<&str> =
            input.lines().filter_map(|line| line.strip_prefix("create ")?.split(' ').next()).collect();
        assert_eq!(names.len(), 34);
        assert!(names.iter().all(|name| name.len() <= 31));
        assert!(input.contains("create KUBE-6-LOAD-BALANCER-SOURCE-CID hash:ip,port,net family inet6"));
        assert!(
            input.ends_with("add KUBE-IPVS-IPS 10.96.0.10\n\n") || input.ends_with("add KUBE-IPVS-IPS 10.96.0.10\n")
        );
    }
}
