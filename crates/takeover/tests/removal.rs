//! A node that kube-proxy has left, with others on it, before and after the removal.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod kube_proxy;
mod node;

use std::process::Command;

use kube_proxy::{Iptables, leave, recording};
use lab::netns::isolate;
use node::{Neighbours, run};
use takeover::{Report, find, remove};

/// Plain Services, source ranges, IPv6, NodePorts of both families, everything masqueraded.
const CASES: [&str; 5] =
    ["clusterip-tcp", "lb-source-ranges", "v6-only-service", "dualstack-nodeport", "masquerade-all"];

/// The names of what a report says is kube-proxy's, sorted.
fn objects(report: &Report) -> Vec<String> {
    let mut objects: Vec<String> = report.objects.iter().map(ToString::to_string).collect();
    objects.sort();
    objects
}

fn left(report: &Report) -> Vec<String> {
    report.left.iter().map(ToString::to_string).collect()
}

/// Removes what there is, without any problem. Then nothing is found and nothing to be done.
fn removed() -> Report {
    let found = find();
    assert!(found.problems.is_empty(), "{:#?}", found.problems);
    let removed = remove();
    assert!(removed.problems.is_empty(), "{:#?}", removed.problems);
    assert_eq!(objects(&removed), objects(&found), "found and removed");
    assert_eq!(left(&removed), left(&found), "found and left");
    for again in [find(), remove()] {
        assert!(again.is_empty(), "{again:#?}");
        assert_eq!(left(&again), left(&removed));
    }
    removed
}

fn assert_has(all: &[String], wanted: &[&str]) {
    for wanted in wanted {
        assert!(all.iter().any(|it| it == wanted), "no {wanted:?} in {all:#?}");
    }
}

/// With each case in a network of its own.
fn leaves_nothing_but_the_neighbours(iptables: Iptables, word: &str) {
    for case in CASES {
        isolate().unwrap();
        let neighbours = Neighbours::new(iptables);
        leave(&recording(case), iptables);
        let with_kube_proxy = neighbours.state();
        assert_ne!(with_kube_proxy, neighbours.before, "{case}: there is something to be removed");
        find();
        assert_eq!(neighbours.state(), with_kube_proxy, "{case}: to find changes nothing");
        let report = removed();
        assert_eq!(neighbours.state(), neighbours.before, "{case}");
        for family in ["ip", "ip6"] {
            let chain = |chain: &str| format!("chain {chain} of iptables-{word} ({family})");
            let rule = |chain: &str, target: &str| {
                format!("rule in {chain} of iptables-{word} ({family}) that leads to {target}")
            };
            let objects = objects(&report);
            assert_has(
                &objects,
                &[
                    &chain("nat/KUBE-SERVICES"),
                    &chain("filter/KUBE-IPVS-OUT-FILTER"),
                    &rule("filter/FORWARD", "KUBE-FORWARD"),
                    &rule("nat/POSTROUTING", "KUBE-POSTROUTING"),
                ],
            );
            assert_eq!(objects.iter().filter(|it| it.starts_with("ipset ")).count(), 34, "{case}: {objects:#?}");
            assert_has(&objects, &["ipset KUBE-6-LOAD-BALANCER-SOURCE-CID", "ipset KUBE-LOOP-BACK"]);
            let kubelets = ["filter/KUBE-FIREWALL", "mangle/KUBE-IPTABLES-HINT", "nat/KUBE-KUBELET-CANARY"];
            let kubelets = kubelets.map(|name| format!("{}: it is kubelet's", chain(name)));
            assert_has(&left(&report), &kubelets.each_ref().map(String::as_str));
        }
    }
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn what_kube_proxy_left_in_iptables_nft_goes_and_what_others_have_stays_as_it_is() {
    leaves_nothing_but_the_neighbours(Iptables::Nft, "nft");
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn what_kube_proxy_left_in_iptables_legacy_goes_and_what_others_have_stays_as_it_is() {
    leaves_nothing_but_the_neighbours(Iptables::Legacy, "legacy");
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn what_was_left_in_both_kinds_of_iptables_goes_from_both() {
    isolate().unwrap();
    let (nft, legacy) = (Neighbours::new(Iptables::Nft), Neighbours::new(Iptables::Legacy));
    let (nft_before, legacy_before) = (nft.state(), legacy.state());
    leave(&recording("dualstack-nodeport"), Iptables::Nft);
    leave(&recording("lb-source-ranges"), Iptables::Legacy);
    let objects = objects(&removed());
    assert_has(&objects, &["chain nat/KUBE-SERVICES of iptables-nft (ip6)"]);
    assert_has(&objects, &["chain nat/KUBE-SERVICES of iptables-legacy (ip6)"]);
    assert_eq!((nft.state(), legacy.state()), (nft_before, legacy_before));
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn what_the_modes_iptables_and_nftables_left_goes_and_the_tables_of_kube_ipvs_stay() {
    isolate().unwrap();
    let neighbours = Neighbours::new(Iptables::Nft);
    run("nft add table ip kube-ipvs && nft add chain ip kube-ipvs c");
    let before = (neighbours.state(), run("nft -a list table ip kube-ipvs"));
    run("iptables-nft-restore --noflush <<'EOF'
*mangle
:KUBE-PROXY-CANARY - [0:0]
COMMIT
*nat
:KUBE-SERVICES - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-MARK-MASQ - [0:0]
:KUBE-SVC-TCOU7JCQXEZGVUNU - [0:0]
:KUBE-SEP-YIL6JZP7A3QYXJU2 - [0:0]
:KUBE-EXT-TCOU7JCQXEZGVUNU - [0:0]
-I PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A KUBE-SERVICES -d 10.96.0.10/32 -p tcp -m comment --comment \"default/web cluster IP\" -j KUBE-SVC-TCOU7JCQXEZGVUNU
-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS
-A KUBE-NODEPORTS -p tcp -m tcp --dport 30080 -j KUBE-EXT-TCOU7JCQXEZGVUNU
-A KUBE-EXT-TCOU7JCQXEZGVUNU -j KUBE-MARK-MASQ
-A KUBE-EXT-TCOU7JCQXEZGVUNU -j KUBE-SVC-TCOU7JCQXEZGVUNU
-A KUBE-SVC-TCOU7JCQXEZGVUNU -j KUBE-SEP-YIL6JZP7A3QYXJU2
-A KUBE-SEP-YIL6JZP7A3QYXJU2 -s 10.244.1.5/32 -j KUBE-MARK-MASQ
-A KUBE-SEP-YIL6JZP7A3QYXJU2 -p tcp -j DNAT --to-destination 10.244.1.5:8080
-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000
COMMIT
EOF");
    for family in ["ip", "ip6"] {
        run(&format!(
            "nft -f - <<'EOF'
table {family} kube-proxy {{
  chain services {{
  }}
  chain service-A {{
    counter
  }}
  map service-ports {{
    type inet_service : verdict
    elements = {{ 80 : goto service-A }}
  }}
  chain nat-prerouting {{
    type nat hook prerouting priority -100
    tcp dport vmap @service-ports
    jump services
  }}
}}
EOF"
        ));
    }
    let objects = objects(&removed());
    assert_eq!((neighbours.state(), run("nft -a list table ip kube-ipvs")), before);
    assert_eq!(
        objects,
        [
            "chain mangle/KUBE-PROXY-CANARY of iptables-nft (ip)",
            "chain nat/KUBE-EXT-TCOU7JCQXEZGVUNU of iptables-nft (ip)",
            "chain nat/KUBE-MARK-MASQ of iptables-nft (ip)",
            "chain nat/KUBE-NODEPORTS of iptables-nft (ip)",
            "chain nat/KUBE-SEP-YIL6JZP7A3QYXJU2 of iptables-nft (ip)",
            "chain nat/KUBE-SERVICES of iptables-nft (ip)",
            "chain nat/KUBE-SVC-TCOU7JCQXEZGVUNU of iptables-nft (ip)",
            "rule in nat/PREROUTING of iptables-nft (ip) that leads to KUBE-SERVICES",
            "table ip kube-proxy of nf_tables",
            "table ip6 kube-proxy of nf_tables",
        ]
    );
}

/// In a chain of somebody else's, with rules on both sides.
fn what_others_go_by_stays(iptables: Iptables, word: &str) {
    isolate().unwrap();
    let neighbours = Neighbours::new(iptables);
    leave(&recording("clusterip-tcp"), iptables);
    run(&format!(
        "iptables-{word} -t nat -I CNI-HOSTPORT-DNAT 2 -s 10.0.0.1 -m comment --comment 'say \"-j\" twice' -j KUBE-MARK-MASQ
         iptables-{word} -t nat -A CNI-HOSTPORT-DNAT -s 10.0.0.2 -g KUBE-MARK-MASQ"
    ));
    let report = removed();
    let chain = format!("chain nat/KUBE-MARK-MASQ of iptables-{word} (ip)");
    assert_has(&left(&report), &[&format!("{chain}: CNI-HOSTPORT-DNAT, which is not kube-proxy's, leads there")]);
    let rules = run(&format!("iptables-{word}-save -t nat"));
    for rule in ["-s 10.0.0.1/32", "-s 10.0.0.2/32", "-A KUBE-MARK-MASQ -j MARK"] {
        assert!(rules.contains(rule), "{rules}");
    }
    assert_eq!(rules.matches("KUBE-").count(), 5, "nothing else is left: {rules}");
    // Once they do not, it goes too.
    run(&format!("iptables-{word} -t nat -D CNI-HOSTPORT-DNAT -s 10.0.0.2 -g KUBE-MARK-MASQ"));
    run(&format!(
        "iptables-{word} -t nat -D CNI-HOSTPORT-DNAT -s 10.0.0.1 -m comment --comment 'say \"-j\" twice' -j KUBE-MARK-MASQ"
    ));
    assert_eq!(objects(&removed()), [chain]);
    assert_eq!(neighbours.state(), neighbours.before);
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_chain_of_kube_proxy_that_others_go_by_stays_until_they_do_not() {
    what_others_go_by_stays(Iptables::Nft, "nft");
    what_others_go_by_stays(Iptables::Legacy, "legacy");
}

/// kubelet marked packets to be dropped, until Kubernetes 1.28.
fn what_kubelet_uses_stays(iptables: Iptables, word: &str) {
    isolate().unwrap();
    let neighbours = Neighbours::new(iptables);
    run(&format!(
        "iptables-{word} -N KUBE-MARK-DROP
         iptables-{word} -A KUBE-MARK-DROP -j MARK --set-xmark 0x8000/0x8000
         iptables-{word} -A KUBE-FIREWALL -s 192.0.2.1 -j KUBE-MARK-DROP"
    ));
    let before = neighbours.state();
    leave(&recording("clusterip-tcp"), iptables);
    run(&format!("iptables-{word} -A KUBE-FORWARD -s 192.0.2.2 -j KUBE-MARK-DROP"));
    let report = removed();
    assert_eq!(neighbours.state(), before);
    let chain = format!("chain filter/KUBE-MARK-DROP of iptables-{word} (ip)");
    assert_has(&left(&report), &[&format!("{chain}: KUBE-FIREWALL, which stays, leads there")]);
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_chain_that_kubelet_leads_to_stays() {
    what_kubelet_uses_stays(Iptables::Nft, "nft");
    what_kubelet_uses_stays(Iptables::Legacy, "legacy");
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_set_that_a_rule_of_somebody_else_uses_is_reported_and_stays_and_the_rest_goes() {
    isolate().unwrap();
    leave(&recording("clusterip-tcp"), Iptables::Nft);
    run("iptables-nft -A INPUT -m set --match-set KUBE-CLUSTER-IP dst,dst -j ACCEPT");
    let report = remove();
    let [problem] = &report.problems[..] else { panic!("{:#?}", report.problems) };
    let problem = problem.to_string();
    assert!(
        problem.starts_with("cannot remove ipset KUBE-CLUSTER-IP: a rule or another set uses it; find "),
        "{problem}"
    );
    assert_eq!(run("ipset list -n"), "KUBE-CLUSTER-IP\n");
    assert!(!run("iptables-nft-save").contains("-A KUBE-"));
    run("iptables-nft -F INPUT");
    assert_eq!(objects(&remove()), ["ipset KUBE-CLUSTER-IP"]);
    assert!(remove().is_empty());
}

/// As those of deleted rules are, which `nf_tables` destroys a moment later.
#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_set_that_is_let_go_of_a_moment_later_goes() {
    isolate().unwrap();
    leave(&recording("clusterip-tcp"), Iptables::Nft);
    run("iptables-nft -A INPUT -m set --match-set KUBE-CLUSTER-IP dst,dst -j ACCEPT");
    let mut letting_go = Command::new("sh").args(["-c", "sleep 1; iptables-nft -F INPUT"]).spawn().unwrap();
    let report = remove();
    assert!(letting_go.wait().unwrap().success());
    assert!(report.problems.is_empty(), "{:#?}", report.problems);
    assert_eq!(run("ipset list -n"), "");
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_chain_that_a_verdict_map_leads_to_is_reported_and_stays_whole_and_the_rest_goes() {
    isolate().unwrap();
    leave(&recording("clusterip-tcp"), Iptables::Nft);
    run("nft add map ip nat mine '{ type inet_service : verdict; elements = { 80 : jump KUBE-LOAD-BALANCER }; }'");
    let report = remove();
    let [problem] = &report.problems[..] else { panic!("{:#?}", report.problems) };
    let expected = "cannot remove chain nat/KUBE-LOAD-BALANCER of iptables-nft (ip): Device or resource busy";
    assert!(problem.to_string().starts_with(expected), "{problem}");
    assert_eq!(
        left(&report),
        ["chain nat/KUBE-MARK-MASQ of iptables-nft (ip): KUBE-LOAD-BALANCER, which stays, leads there"]
    );
    let rules = "-A KUBE-LOAD-BALANCER -j KUBE-MARK-MASQ\n-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000\n";
    assert_eq!(run("iptables-nft -t nat -S | grep -e '-A'"), rules);
    assert_eq!(run("ipset list -n"), "");
    run("nft delete map ip nat mine");
    assert_eq!(
        objects(&remove()),
        ["chain nat/KUBE-LOAD-BALANCER of iptables-nft (ip)", "chain nat/KUBE-MARK-MASQ of iptables-nft (ip)"]
    );
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn where_there_is_nothing_nothing_is_done_and_no_table_of_iptables_legacy_comes_to_be() {
    isolate().unwrap();
    for report in [find(), remove()] {
        assert!(report.is_empty() && report.left.is_empty(), "{report:#?}");
    }
    assert_eq!(run("nft list ruleset; ipset save; cat /proc/net/ip_tables_names /proc/net/ip6_tables_names"), "");
}
