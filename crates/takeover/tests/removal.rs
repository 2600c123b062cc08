//! Removal of kube-proxy's rules on a node that has foreign rules too.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod foreign_rules;
mod kube_proxy;

use std::process::Command;

use foreign_rules::{ForeignRules, run};
use kube_proxy::{Iptables, install_recording, recording};
use lab::netns::isolate;
use takeover::{Report, find, remove};

/// Plain Services, source ranges, IPv6, NodePorts of both families, everything masqueraded.
const CASES: [&str; 5] =
    ["clusterip-tcp", "lb-source-ranges", "v6-only-service", "dualstack-nodeport", "masquerade-all"];

/// The objects of a report, sorted.
fn objects(report: &Report) -> Vec<String> {
    let mut objects: Vec<String> = report.objects.iter().map(ToString::to_string).collect();
    objects.sort();
    objects
}

fn kept(report: &Report) -> Vec<String> {
    report.kept.iter().map(ToString::to_string).collect()
}

/// Removes everything without problems, and checks that nothing is found afterwards.
fn removed() -> Report {
    let found = find();
    assert!(found.problems.is_empty(), "{:#?}", found.problems);
    let removed = remove();
    assert!(removed.problems.is_empty(), "{:#?}", removed.problems);
    assert_eq!(objects(&removed), objects(&found), "found and removed");
    assert_eq!(kept(&removed), kept(&found), "found and left");
    for again in [find(), remove()] {
        assert!(again.is_empty(), "{again:#?}");
        assert_eq!(kept(&again), kept(&removed));
    }
    removed
}

fn assert_has(all: &[String], wanted: &[&str]) {
    for wanted in wanted {
        assert!(all.iter().any(|it| it == wanted), "no {wanted:?} in {all:#?}");
    }
}

/// Runs each case in its own network namespace.
fn leaves_only_foreign_rules(iptables: Iptables, word: &str) {
    for case in CASES {
        isolate().unwrap();
        let foreign = ForeignRules::new(iptables);
        install_recording(&recording(case), iptables);
        let with_kube_proxy = foreign.state();
        assert_ne!(with_kube_proxy, foreign.before, "{case}: there is something to be removed");
        find();
        assert_eq!(foreign.state(), with_kube_proxy, "{case}: to find changes nothing");
        let report = removed();
        assert_eq!(foreign.state(), foreign.before, "{case}");
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
            assert_has(&kept(&report), &kubelets.each_ref().map(String::as_str));
        }
    }
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn iptables_nft_rules_are_removed_and_foreign_ones_kept() {
    leaves_only_foreign_rules(Iptables::Nft, "nft");
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn iptables_legacy_rules_are_removed_and_foreign_ones_kept() {
    leaves_only_foreign_rules(Iptables::Legacy, "legacy");
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn rules_in_both_iptables_backends_are_removed() {
    isolate().unwrap();
    let (nft, legacy) = (ForeignRules::new(Iptables::Nft), ForeignRules::new(Iptables::Legacy));
    let (nft_before, legacy_before) = (nft.state(), legacy.state());
    install_recording(&recording("dualstack-nodeport"), Iptables::Nft);
    install_recording(&recording("lb-source-ranges"), Iptables::Legacy);
    let objects = objects(&removed());
    assert_has(&objects, &["chain nat/KUBE-SERVICES of iptables-nft (ip6)"]);
    assert_has(&objects, &["chain nat/KUBE-SERVICES of iptables-legacy (ip6)"]);
    assert_eq!((nft.state(), legacy.state()), (nft_before, legacy_before));
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn other_proxy_modes_are_removed_and_kube_ipvs_tables_kept() {
    isolate().unwrap();
    let foreign = ForeignRules::new(Iptables::Nft);
    run("nft add table ip kube-ipvs && nft add chain ip kube-ipvs c");
    let before = (foreign.state(), run("nft -a list table ip kube-ipvs"));
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
    assert_eq!((foreign.state(), run("nft -a list table ip kube-ipvs")), before);
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

/// With rules of a foreign chain that jump to a chain of kube-proxy.
fn a_chain_that_foreign_rules_use_is_kept(iptables: Iptables, word: &str) {
    isolate().unwrap();
    let foreign = ForeignRules::new(iptables);
    install_recording(&recording("clusterip-tcp"), iptables);
    run(&format!(
        "iptables-{word} -t nat -I CNI-HOSTPORT-DNAT 2 -s 10.0.0.1 -m comment --comment 'say \"-j\" twice' -j KUBE-MARK-MASQ
         iptables-{word} -t nat -A CNI-HOSTPORT-DNAT -s 10.0.0.2 -g KUBE-MARK-MASQ"
    ));
    let report = removed();
    let chain = format!("chain nat/KUBE-MARK-MASQ of iptables-{word} (ip)");
    assert_has(&kept(&report), &[&format!("{chain}: CNI-HOSTPORT-DNAT, which is not kube-proxy's, leads there")]);
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
    assert_eq!(foreign.state(), foreign.before);
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_chain_is_kept_while_foreign_rules_jump_to_it() {
    a_chain_that_foreign_rules_use_is_kept(Iptables::Nft, "nft");
    a_chain_that_foreign_rules_use_is_kept(Iptables::Legacy, "legacy");
}

/// kubelet had `KUBE-MARK-DROP` until Kubernetes 1.28.
fn a_chain_that_kubelet_uses_is_kept(iptables: Iptables, word: &str) {
    isolate().unwrap();
    let foreign = ForeignRules::new(iptables);
    run(&format!(
        "iptables-{word} -N KUBE-MARK-DROP
         iptables-{word} -A KUBE-MARK-DROP -j MARK --set-xmark 0x8000/0x8000
         iptables-{word} -A KUBE-FIREWALL -s 192.0.2.1 -j KUBE-MARK-DROP"
    ));
    let before = foreign.state();
    install_recording(&recording("clusterip-tcp"), iptables);
    run(&format!("iptables-{word} -A KUBE-FORWARD -s 192.0.2.2 -j KUBE-MARK-DROP"));
    let report = removed();
    assert_eq!(foreign.state(), before);
    let chain = format!("chain filter/KUBE-MARK-DROP of iptables-{word} (ip)");
    assert_has(&kept(&report), &[&format!("{chain}: KUBE-FIREWALL, which stays, leads there")]);
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_chain_that_kubelet_leads_to_stays() {
    a_chain_that_kubelet_uses_is_kept(Iptables::Nft, "nft");
    a_chain_that_kubelet_uses_is_kept(Iptables::Legacy, "legacy");
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_set_used_by_a_foreign_rule_is_kept_and_reported() {
    isolate().unwrap();
    install_recording(&recording("clusterip-tcp"), Iptables::Nft);
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

/// As with the sets of deleted rules, which `nf_tables` releases asynchronously.
#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_set_released_a_moment_later_is_removed() {
    isolate().unwrap();
    install_recording(&recording("clusterip-tcp"), Iptables::Nft);
    run("iptables-nft -A INPUT -m set --match-set KUBE-CLUSTER-IP dst,dst -j ACCEPT");
    let mut letting_go = Command::new("sh").args(["-c", "sleep 1; iptables-nft -F INPUT"]).spawn().unwrap();
    let report = remove();
    assert!(letting_go.wait().unwrap().success());
    assert!(report.problems.is_empty(), "{:#?}", report.problems);
    assert_eq!(run("ipset list -n"), "");
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_chain_used_by_a_verdict_map_is_kept_and_reported() {
    isolate().unwrap();
    install_recording(&recording("clusterip-tcp"), Iptables::Nft);
    run("nft add map ip nat mine '{ type inet_service : verdict; elements = { 80 : jump KUBE-LOAD-BALANCER }; }'");
    let report = remove();
    let [problem] = &report.problems[..] else { panic!("{:#?}", report.problems) };
    let expected = "cannot remove chain nat/KUBE-LOAD-BALANCER of iptables-nft (ip): Device or resource busy";
    assert!(problem.to_string().starts_with(expected), "{problem}");
    assert_eq!(
        kept(&report),
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
fn without_rules_nothing_is_changed_and_no_table_created() {
    isolate().unwrap();
    for report in [find(), remove()] {
        assert!(report.is_empty() && report.kept.is_empty(), "{report:#?}");
    }
    assert_eq!(run("nft list ruleset; ipset save; cat /proc/net/ip_tables_names /proc/net/ip6_tables_names"), "");
}
