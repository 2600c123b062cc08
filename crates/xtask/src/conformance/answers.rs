//! What the agent answers over HTTP on the node of a case: a metric, and the ports that load balancers ask.

use std::collections::BTreeSet;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result};
use serde::Deserialize;
use serde_json::Value;

const TIMEOUT: Duration = Duration::from_secs(5);
const METRICS: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 10249);
const METRIC: &str = "kubeproxy_sync_proxy_rules_no_local_endpoints_total";

/// A number of Services without local endpoints.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub(crate) struct NoLocalEndpoints {
    family: String,
    traffic_policy: String,
    value: u64,
}

/// What somebody on the node gets who asks a health-check node port.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub(crate) struct HealthCheck {
    port: u16,
    family: String,
    status: Option<u16>,
    weight_header: Option<String>,
    body: Option<Value>,
    /// By the name that Python has for it.
    error: Option<String>,
}

/// The metric as the agent has it, in lines.
pub(crate) fn no_local_endpoints() -> Result<BTreeSet<String>> {
    let (_, text) = get(METRICS, "/metrics").context("cannot get the agent's metrics")?;
    let lines = text.lines().filter(|line| line.starts_with(METRIC));
    lines
        .map(|line| {
            let label = |name: &str| {
                let (_, after) = line.split_once(&format!("{name}=\""))?;
                Some(after.split_once('"')?.0.to_owned())
            };
            let value = line.rsplit(' ').next().unwrap_or_default();
            let (family, policy) = label("ip_family").zip(label("traffic_policy")).context("a label is missing")?;
            Ok(format!("no local endpoints, {family} {policy}: {value}"))
        })
        .collect()
}

pub(crate) fn no_local_lines(expected: &[NoLocalEndpoints]) -> BTreeSet<String> {
    let line = |it: &NoLocalEndpoints| format!("no local endpoints, {} {}: {}", it.family, it.traffic_policy, it.value);
    expected.iter().map(line).collect()
}

/// Asks each port that something is known of.
pub(crate) fn health_checks(expected: &[HealthCheck]) -> BTreeSet<String> {
    let ask = |it: &HealthCheck| {
        let address = if it.family == "IPv6" { Ipv6Addr::LOCALHOST.into() } else { Ipv4Addr::LOCALHOST.into() };
        let (mut status, mut weight_header, mut body, mut error) = (None, None, None, None);
        match get(SocketAddr::new(address, it.port), "/") {
            Ok((head, text)) => {
                status = head.split(' ').nth(1).and_then(|word| word.parse().ok());
                let weight = "x-load-balancing-endpoint-weight: ";
                let mut lines = head.lines().map(str::to_ascii_lowercase);
                weight_header = lines.find_map(|line| Some(line.strip_prefix(weight)?.to_owned()));
                body = serde_json::from_str(&text).ok();
            }
            Err(problem) if problem.kind() == ErrorKind::ConnectionRefused => {
                error = Some("ConnectionRefusedError".to_owned());
            }
            Err(problem) => error = Some(problem.to_string()),
        }
        HealthCheck { port: it.port, family: it.family.clone(), status, weight_header, body, error }
    };
    health_check_lines(&expected.iter().map(ask).collect::<Vec<_>>())
}

pub(crate) fn health_check_lines(checks: &[HealthCheck]) -> BTreeSet<String> {
    checks.iter().map(|check| format!("{check:?}")).collect()
}

/// The head and the body of an answer.
fn get(address: SocketAddr, path: &str) -> std::io::Result<(String, String)> {
    let mut stream = TcpStream::connect_timeout(&address, TIMEOUT)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    Ok((head.to_owned(), body.to_owned()))
}
