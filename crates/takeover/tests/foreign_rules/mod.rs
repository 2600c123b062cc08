//! Foreign rules and sets on a node: of Docker, Calico, a network plugin, kube-router's network policies, kubelet, and
//! an administrator.

use std::process::Command;

use crate::kube_proxy::Iptables;

/// Input for `iptables-restore`. The families differ in the addresses alone.
const RULES: &str = "*mangle
:PREROUTING ACCEPT [0:0]
:INPUT ACCEPT [0:0]
:FORWARD ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
:KUBE-IPTABLES-HINT - [0:0]
:KUBE-KUBELET-CANARY - [0:0]
COMMIT
*nat
:PREROUTING ACCEPT [0:0]
:INPUT ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
:DOCKER - [0:0]
:CNI-HOSTPORT-DNAT - [0:0]
:KUBE-KUBELET-CANARY - [0:0]
[7:420] -A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
[8:480] -A PREROUTING -m addrtype --dst-type LOCAL -j CNI-HOSTPORT-DNAT
[1:60] -A POSTROUTING -s POD ! -o docker0 -j MASQUERADE
[0:0] -A DOCKER -i docker0 -j RETURN
[3:180] -A CNI-HOSTPORT-DNAT -p tcp -m comment --comment \"dnat name: \\\"cbr0\\\"\" -m multiport --dports 80 -j ACCEPT
[4:240] -A CNI-HOSTPORT-DNAT -p tcp -m tcp --dport 81 -j RETURN
COMMIT
*filter
:INPUT ACCEPT [0:0]
:FORWARD DROP [0:0]
:OUTPUT ACCEPT [0:0]
:DOCKER-USER - [0:0]
:cali-FORWARD - [0:0]
:cali-fw-pod - [0:0]
:KUBE-ROUTER-FORWARD - [0:0]
:KUBE-POD-FW-ABCDEFGHIJKLMNOP - [0:0]
:KUBE-FIREWALL - [0:0]
:KUBE-KUBELET-CANARY - [0:0]
[11:660] -A INPUT -j KUBE-FIREWALL
[12:720] -A INPUT -m set --match-set SET src -j ACCEPT
[13:780] -A FORWARD -m comment --comment \"cali:-j KUBE-SERVICES\" -j cali-FORWARD
[14:840] -A FORWARD -m comment --comment \"kube-router netpol\" -j KUBE-ROUTER-FORWARD
[15:900] -A FORWARD -j DOCKER-USER
[16:960] -A OUTPUT -j KUBE-FIREWALL
[0:0] -A DOCKER-USER -j RETURN
[1:1] -A cali-FORWARD -i pod1 -g cali-fw-pod
[2:2] -A cali-fw-pod -j MARK --set-xmark 0x10000/0x10000
[3:3] -A KUBE-ROUTER-FORWARD -d POD -j KUBE-POD-FW-ABCDEFGHIJKLMNOP
[4:4] -A KUBE-POD-FW-ABCDEFGHIJKLMNOP -j DROP
[5:5] -A KUBE-FIREWALL -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP
COMMIT
";

/// The foreign rules and sets of a node.
pub(crate) struct ForeignRules {
    save: String,
    /// Their state before kube-proxy's rules were installed.
    pub before: String,
}

impl ForeignRules {
    /// Installs them in this thread's network namespace.
    pub(crate) fn new(iptables: Iptables) -> Self {
        let kind = match iptables {
            Iptables::Nft => "nft",
            Iptables::Legacy => "legacy",
        };
        for (name, family, address) in [("mine", "inet", "192.0.2.1"), ("KUBE-SRC-A", "inet6", "2001:db8::1")] {
            run(&format!("ipset create -exist {name} hash:ip family {family} && ipset add -exist {name} {address}"));
        }
        for (program, pod, set) in
            [("iptables", "10.244.0.0/16", "mine"), ("ip6tables", "fd00:10:244::/56", "KUBE-SRC-A")]
        {
            let rules = RULES.replace("POD ", &format!("{pod} ")).replace("SET ", &format!("{set} "));
            run(&format!("{program}-{kind}-restore -c --noflush <<'EOF'\n{rules}EOF"));
        }
        run("nft add table inet mine && nft add chain inet mine KUBE-SERVICES && \
             nft add rule inet mine KUBE-SERVICES counter packets 5 bytes 300");
        let save = format!(
            "iptables-{kind}-save -c | grep -v '^#'; ip6tables-{kind}-save -c | grep -v '^#'; \
             ipset save; nft -a list table inet mine"
        );
        let before = run(&save);
        assert!(before.contains("[14:840] -A FORWARD"), "{before}");
        Self { save, before }
    }

    /// The state of all rules with their counters and of all sets.
    pub(crate) fn state(&self) -> String {
        run(&self.save)
    }
}

/// Runs a command of the shell in this thread's network namespace.
pub(crate) fn run(command: &str) -> String {
    let output = Command::new("sh").args(["-ec", command]).output().expect("a shell");
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text")
}
