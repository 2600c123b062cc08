use super::*;

const IPTABLES: Iptables = Iptables { backend: Backend::Legacy, family: Family::Ip };

/// What would be given to `iptables-restore`, of all tables.
fn input(saved: &str) -> String {
    let tables = parse(IPTABLES, saved);
    let plans = tables.iter().map(|table| (table.plan(&BTreeSet::new()), &table.name));
    plans.filter(|(plan, _)| !plan.is_empty()).map(|(plan, name)| restore_input(&plan, name)).collect()
}

#[test]
fn saved_rules_become_the_input_that_removes_them() {
    struct Case {
        name: &'static str,
        saved: &'static str,
        input: &'static str,
    }
    let cases = [
        Case {
            name: "a rule is deleted as it was saved, quotes and all",
            saved: r#"*nat
:OUTPUT ACCEPT [5:300]
:KUBE-SERVICES - [0:0]
-A OUTPUT -m comment --comment "kubernetes \"service\" portals" -j KUBE-SERVICES
-A KUBE-SERVICES -s 127.0.0.0/8 -j RETURN
COMMIT
"#,
            input: r#"*nat
:KUBE-SERVICES - [0:0]
-D OUTPUT -m comment --comment "kubernetes \"service\" portals" -j KUBE-SERVICES
-X KUBE-SERVICES
COMMIT
"#,
        },
        Case {
            name: "goto is as good as jump, and what a chain of somebody else goes by stays",
            saved: "*nat\n:OUTPUT ACCEPT [0:0]\n:CNI-X - [0:0]\n:KUBE-MARK-MASQ - [0:0]\n:KUBE-SERVICES - [0:0]\n\
                    -A OUTPUT -j CNI-X\n-A OUTPUT -s 10.0.0.1/32 -g KUBE-SERVICES\n-A CNI-X -g KUBE-MARK-MASQ\n\
                    -A KUBE-SERVICES -j KUBE-MARK-MASQ\nCOMMIT\n",
            input: "*nat\n:KUBE-SERVICES - [0:0]\n-D OUTPUT -s 10.0.0.1/32 -g KUBE-SERVICES\n-X KUBE-SERVICES\nCOMMIT\n",
        },
        Case {
            name: "what only looks like a jump stays",
            saved: "*filter\n:INPUT ACCEPT [0:0]\n:KUBE-FORWARD - [0:0]\n\
                    -A INPUT -m comment --comment \"was: -j KUBE-FORWARD\" -j ACCEPT\n\
                    -A INPUT -j LOG --log-prefix KUBE-FORWARD\n-A INPUT -m comment --comment KUBE-FORWARD\n\
                    -A INPUT -m comment --comment \"-j KUBE-FORWARD\"\nCOMMIT\n",
            input: "*filter\n:KUBE-FORWARD - [0:0]\n-X KUBE-FORWARD\nCOMMIT\n",
        },
        Case {
            name: "kubelet's chains stay, with what they lead to",
            saved: "*filter\n:OUTPUT ACCEPT [0:0]\n:KUBE-FIREWALL - [0:0]\n:KUBE-MARK-DROP - [0:0]\n\
                    :KUBE-SERVICES - [0:0]\n-A OUTPUT -j KUBE-FIREWALL\n-A OUTPUT -j KUBE-SERVICES\n\
                    -A KUBE-FIREWALL -j KUBE-MARK-DROP\n-A KUBE-SERVICES -j KUBE-MARK-DROP\nCOMMIT\n",
            input: "*filter\n:KUBE-SERVICES - [0:0]\n-D OUTPUT -j KUBE-SERVICES\n-X KUBE-SERVICES\nCOMMIT\n",
        },
        Case {
            name: "two rules alike are two deletions",
            saved: "*nat\n:OUTPUT ACCEPT [0:0]\n:KUBE-SERVICES - [0:0]\n-A OUTPUT -j KUBE-SERVICES\n\
                    -A OUTPUT -j KUBE-SERVICES\nCOMMIT\n",
            input: "*nat\n:KUBE-SERVICES - [0:0]\n-D OUTPUT -j KUBE-SERVICES\n-D OUTPUT -j KUBE-SERVICES\n\
                    -X KUBE-SERVICES\nCOMMIT\n",
        },
        Case {
            name: "each table is by itself, and tables kube-proxy has nothing in are not looked at",
            saved: "# Generated\n*security\n:KUBE-SERVICES - [0:0]\nCOMMIT\n*raw\n:OUTPUT ACCEPT [0:0]\nCOMMIT\n\
                    *mangle\n:KUBE-PROXY-CANARY - [0:0]\n:KUBE-KUBELET-CANARY - [0:0]\nCOMMIT\n\
                    *nat\n:KUBE-SVC-A - [0:0]\n:KUBE-SEP-A - [0:0]\n-A KUBE-SVC-A -j KUBE-SEP-A\nCOMMIT\n",
            input: "*mangle\n:KUBE-PROXY-CANARY - [0:0]\n-X KUBE-PROXY-CANARY\nCOMMIT\n\
                    *nat\n:KUBE-SEP-A - [0:0]\n:KUBE-SVC-A - [0:0]\n-X KUBE-SEP-A\n-X KUBE-SVC-A\nCOMMIT\n",
        },
        Case { name: "nothing of kube-proxy's is nothing to do", saved: "*nat\n:DOCKER - [0:0]\nCOMMIT\n", input: "" },
        Case {
            name: "nonsense is nothing to do",
            saved: ":KUBE-SERVICES\n-A\n*\n:\n-A X\n-j KUBE-SERVICES\n",
            input: "",
        },
    ];
    for case in cases {
        assert_eq!(input(case.saved), case.input, "{}", case.name);
    }
}

#[test]
fn tools_must_report_the_legacy_backend() {
    let legacy = |_: &str| Some("v1.8.9 (legacy)".to_owned());
    let by_name = Tools { save: "ip6tables-legacy-save".into(), restore: "ip6tables-legacy-restore".into() };
    assert_eq!(Tools::find(Family::Ip6, legacy), Some(by_name));

    let plain_alone = |tool: &str| legacy(tool).filter(|_| !tool.contains("-legacy"));
    let plain = Tools { save: "iptables-save".into(), restore: "iptables-restore".into() };
    assert_eq!(Tools::find(Family::Ip, plain_alone), Some(plain));

    let nft = |tool: &str| (!tool.contains("-legacy")).then(|| "iptables-save v1.8.9 (nf_tables)".to_owned());
    assert_eq!(Tools::find(Family::Ip, nft), None);
    assert_eq!(Tools::find(Family::Ip, |tool| legacy(tool).filter(|_| tool.ends_with("-save"))), None);
}

#[test]
fn the_manual_command_keeps_foreign_rules() {
    let saved = "*nat
:OUTPUT ACCEPT [5:300]
:KUBE-SERVICES - [0:0]
:KUBE-SVC-ABC - [0:0]
:KUBE-FIREWALL - [0:0]
:KUBE-ROUTER-INPUT - [0:0]
[1:2] -A OUTPUT -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A OUTPUT -j KUBE-FIREWALL
-A OUTPUT -g KUBE-SVC-ABC
-A OUTPUT -j KUBE-ROUTER-INPUT
[0:0] -A KUBE-SERVICES -s 127.0.0.0/8 -j RETURN
-A KUBE-SVC-ABC -j ACCEPT
COMMIT
";
    let mut grep = Command::new("grep")
        .args(["-vE", &kube_proxy_names::pattern()])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    grep.stdin.take().unwrap().write_all(saved.as_bytes()).unwrap();
    let kept = String::from_utf8(grep.wait_with_output().unwrap().stdout).unwrap();
    let expected = "*nat
:OUTPUT ACCEPT [5:300]
:KUBE-FIREWALL - [0:0]
:KUBE-ROUTER-INPUT - [0:0]
-A OUTPUT -j KUBE-FIREWALL
-A OUTPUT -j KUBE-ROUTER-INPUT
COMMIT
";
    assert_eq!(kept, expected);
    assert!(manual_command(Family::Ip6).contains("ip6tables-legacy-restore"));
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn without_tools_the_report_has_a_command_to_remove_the_rules() {
    let sh = |command: &str| {
        let output = Command::new("sh").args(["-c", command]).output().unwrap();
        assert!(output.status.success(), "{command}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    lab::netns::isolate().unwrap();
    let save = || sh("iptables-legacy-save | grep -v '^#'");
    sh("iptables-legacy -N KUBE-FIREWALL && iptables-legacy -A INPUT -j KUBE-FIREWALL");
    let before = save();
    sh("iptables-legacy -N KUBE-SVC-A && iptables-legacy -I INPUT -j KUBE-SVC-A && iptables-legacy -A KUBE-SVC-A");
    let mut report = Report::default();
    let missing = |_: &str| None;
    clean_up_family(Family::Ip6, missing, Action::Remove, &mut report).unwrap();
    clean_up_family(Family::Ip, missing, Action::Remove, &mut report).unwrap();
    let problem = report.unchecked[0].to_string();
    assert!(report.is_empty() && save().contains("KUBE-SVC-A"));
    assert!(problem.contains("cannot inspect the rules of iptables-legacy (ip): the kernel has tables of it (filter)"));
    let (_, command) = problem.split_once('`').unwrap();
    sh(command.trim_end_matches('`'));
    assert_eq!(save(), before);
}
