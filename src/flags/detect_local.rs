//! How to tell that a packet comes from a pod: `--detect-local-mode`, and the flag that goes with each mode.

use ipnet::IpNet;
use reconciler::policy::DetectLocal;

use super::cidr;

/// The longest name the kernel lets an interface have, in bytes.
const INTERFACE_NAME: usize = 15;

#[derive(Debug, clap::Args)]
pub(super) struct DetectLocalFlags {
    /// How to tell pods, whose traffic to ClusterIPs is not masqueraded: `ClusterCIDR`, `NodeCIDR`, `BridgeInterface` or
    /// `InterfaceNamePrefix`
    #[arg(long, value_name = "MODE", default_value = "ClusterCIDR", value_parser = mode)]
    detect_local_mode: Mode,

    /// For `ClusterCIDR`, the range of pod addresses, one a family; without one pods cannot be told from others
    #[arg(long, value_name = "CIDR,...")]
    cluster_cidr: Option<String>,

    /// For `BridgeInterface`, the bridge that pods of this node are connected to
    #[arg(long, value_name = "NAME", default_value = "", hide_default_value = true)]
    pod_bridge_interface: String,

    /// For `InterfaceNamePrefix`, how the names of all interfaces that lead to pods of this node begin
    #[arg(long, value_name = "PREFIX", default_value = "", hide_default_value = true)]
    pod_interface_name_prefix: String,
}

#[derive(Clone, Copy, Debug)]
enum Mode {
    ClusterCidr,
    NodeCidr,
    BridgeInterface,
    InterfaceNamePrefix,
}

impl DetectLocalFlags {
    /// What they come to. As in kube-proxy, the flags of other modes are not looked at.
    pub(super) fn get(&self) -> Result<DetectLocal, String> {
        Ok(match self.detect_local_mode {
            Mode::ClusterCidr => DetectLocal::ClusterCidr(match &self.cluster_cidr {
                Some(text) => cluster_cidr(text)?,
                None => Vec::new(),
            }),
            Mode::NodeCidr => DetectLocal::NodeCidr,
            Mode::BridgeInterface => {
                let name = interface("BridgeInterface", "--pod-bridge-interface", &self.pod_bridge_interface)?;
                DetectLocal::BridgeInterface(name)
            }
            Mode::InterfaceNamePrefix => {
                let flag = "--pod-interface-name-prefix";
                let prefix = interface("InterfaceNamePrefix", flag, &self.pod_interface_name_prefix)?;
                DetectLocal::InterfaceNamePrefix(prefix)
            }
        })
    }
}

/// As in kube-proxy, empty means `ClusterCIDR`.
fn mode(text: &str) -> Result<Mode, String> {
    match text {
        "ClusterCIDR" | "" => Ok(Mode::ClusterCidr),
        "NodeCIDR" => Ok(Mode::NodeCidr),
        "BridgeInterface" => Ok(Mode::BridgeInterface),
        "InterfaceNamePrefix" => Ok(Mode::InterfaceNamePrefix),
        _ => Err("give ClusterCIDR, NodeCIDR, BridgeInterface or InterfaceNamePrefix".to_owned()),
    }
}

/// One range, or one of each family.
fn cluster_cidr(text: &str) -> Result<Vec<IpNet>, String> {
    let ranges = text.split(',').map(|range| Ok(cidr("--cluster-cidr", range)?.trunc()));
    let ranges = ranges.collect::<Result<Vec<_>, String>>()?;
    match ranges.as_slice() {
        [_] => Ok(ranges),
        [a, b] if a.addr().is_ipv4() != b.addr().is_ipv4() => Ok(ranges),
        _ => Err("--cluster-cidr: give one range, or one of each family".to_owned()),
    }
}

fn interface(mode: &str, flag: &str, name: &str) -> Result<String, String> {
    if name.is_empty() {
        return Err(format!("--detect-local-mode={mode} needs {flag}"));
    }
    if name.len() > INTERFACE_NAME {
        return Err(format!(
            "{flag}: {name:?} is longer than the {INTERFACE_NAME} bytes that a name of an interface has"
        ));
    }
    Ok(name.to_owned())
}
