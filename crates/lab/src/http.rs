//! What the agent answers over HTTP: one request on one connection.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::time::Duration;

use serde_json::Value;

use crate::error::{Context, Error, Result};
use crate::wait::LIMIT;

/// Where the agent answers about its health by default.
pub const HEALTH: &str = "127.0.0.1:10256";
/// Where the agent has its metrics by default.
pub const METRICS: &str = "127.0.0.1:10249";

/// An answer.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The status code.
    pub status: u16,
    /// Names in lower case, and values.
    pub headers: Vec<(String, String)>,
    /// What follows the headers.
    pub body: String,
}

impl Answer {
    /// The value of a header, by its name in lower case.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    /// The body, where it is JSON.
    pub fn json(&self) -> Result<Value> {
        serde_json::from_str(&self.body).map_err(|error| Error::Usage(format!("`{}` is no JSON: {error}", self.body)))
    }

    fn parse(text: &str) -> Option<Self> {
        let (head, body) = text.split_once("\r\n\r\n")?;
        let mut lines = head.lines();
        let status = lines.next()?.split(' ').nth(1)?.parse().ok()?;
        let headers = lines.filter_map(|line| line.split_once(": "));
        let headers = headers.map(|(name, value)| (name.to_lowercase(), value.to_owned())).collect();
        Some(Self { status, headers, body: body.to_owned() })
    }
}

/// `GET`, from the network namespace of this thread.
pub fn get(address: &str, path: &str) -> Result<Answer> {
    request("GET", address, path, "")
}

/// The same, with another limit for each wait than [`LIMIT`].
pub fn get_within(address: &str, path: &str, limit: Duration) -> Result<Answer> {
    request_within("GET", address, path, "", limit)
}

/// A request with a body. It is an error too if the connection ends without an answer.
pub fn request(method: &str, address: &str, path: &str, body: &str) -> Result<Answer> {
    request_within(method, address, path, body, LIMIT)
}

fn request_within(method: &str, address: &str, path: &str, body: &str, limit: Duration) -> Result<Answer> {
    let to = address.to_socket_addrs().context("resolve", address)?.next();
    let to = to.ok_or_else(|| Error::Usage(format!("`{address}` has no address")))?;
    let mut stream = TcpStream::connect_timeout(&to, limit).context("connect to", address)?;
    stream.set_read_timeout(Some(limit)).context("set a timeout for", address)?;
    let length = body.len();
    let head = format!("{method} {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\nContent-Length: {length}");
    stream.write_all(format!("{head}\r\n\r\n{body}").as_bytes()).context("send a request to", address)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).context("read the answer of", address)?;
    Answer::parse(&answer).ok_or_else(|| Error::Usage(format!("{address} does not answer {method} {path} in HTTP")))
}

/// Values of metrics, by name with labels.
#[derive(Clone, Debug)]
pub struct Metrics(BTreeMap<String, f64>);

impl Metrics {
    /// Those of the agent in the network namespace of this thread.
    pub fn read() -> Result<Self> {
        get(METRICS, "/metrics").map(|answer| Self::parse(&answer.body))
    }

    /// Understands Prometheus' text format.
    pub fn parse(text: &str) -> Self {
        let lines = text.lines().filter(|line| !line.starts_with('#'));
        let values = lines.filter_map(|line| line.rsplit_once(' '));
        Self(values.filter_map(|(name, value)| Some((name.to_owned(), value.parse().ok()?))).collect())
    }

    /// The value of a metric, by its name with labels as it stands in the text.
    pub fn get(&self, name: &str) -> Option<f64> {
        self.0.get(name).copied()
    }

    /// The sum over all labels.
    pub fn sum(&self, name: &str) -> f64 {
        let with_labels = |key: &str| key == name || key.strip_prefix(name).is_some_and(|rest| rest.starts_with('{'));
        self.0.iter().filter(|(key, _)| with_labels(key)).map(|(_, value)| value).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_have_a_status_headers_and_a_body() {
        let answer = Answer::parse("HTTP/1.1 503 Service Unavailable\r\nX-One: 1\r\n\r\nbody\r\n\r\n").unwrap();
        assert_eq!((answer.status, answer.header("x-one"), answer.body.as_str()), (503, Some("1"), "body\r\n\r\n"));
        assert!(Answer::parse("").is_none());
    }

    #[test]
    fn metrics_are_found_by_name_with_labels_and_summed_over_them() {
        let metrics = Metrics::parse("# HELP a b\na{x=\"1 2\"} 3\na{x=\"2\"} 4\nab 5\nbad\n");
        assert_eq!((metrics.get("a{x=\"1 2\"}"), metrics.get("a"), metrics.sum("a")), (Some(3.0), None, 7.0));
    }
}
