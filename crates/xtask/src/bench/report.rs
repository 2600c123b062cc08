//! The report: targets, tables and plots.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::figures::{Figure, Unit, show};
use super::load::{Size, grouped};
use super::plot::{self, Line};

/// All that was measured, and where.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Results {
    /// The processor and how many there are.
    pub(crate) machine: String,
    /// The kernel in the lab.
    pub(crate) kernel: String,
    pub(crate) figures: Vec<Figure>,
}

/// The size that targets speak of.
const AT: Size = Size { services: 10_000, endpoints: 10 };
const MORE: Size = Size { services: 10_000, endpoints: 20 };
const LESS: Size = Size { services: 1000, endpoints: 10 };
const LARGE: Size = Size { services: 20_000, endpoints: 10 };

/// A part of the report: what its figures' names begin with, its title, and what is to be known of it.
const PARTS: [(&str, &str, &str); 11] = [
    (
        "cold/",
        "Cold start",
        "From the start of the process until everything is in the kernel. Listing includes the API server's part, which runs on the same processor.",
    ),
    ("manifests/", "Cold start from manifests", "The same from a directory of files."),
    ("tools/", "The usual tools", "The same state by other programs that do nothing else: one after the other."),
    (
        "restart/",
        "Restart",
        "A start where everything is in the kernel already. It is read while the list is still coming. The floor is to read the same and look at nothing.",
    ),
    (
        "audit/",
        "Audit",
        "Reading and comparing everything. At the default `--ipvs-sync-period` there is one each half minute.",
    ),
    (
        "change/",
        "One change",
        "From the end of its gathering until the kernel has acknowledged it. *Gathering before* is the fixed time for which the agent waits for changes that belong to it, and counts in *from the API server*. *Of it the sync* is without the time until the thread that syncs runs, which in the guest shares one processor with the API server and the benchmark. *What follows* is the look whether a real server has drained, a tenth of a second later, and its deletion.",
    ),
    ("churn/", "Churn", "A hundred changes a second, of all four kinds in turn."),
    ("steady/", "Nothing happens", "Audits included."),
    ("memory/", "Memory", "After the cold start."),
    ("growth/", "Growth", "Very many changes."),
    ("binary/", "The program", "Static, stripped."),
];

/// A figure, its name in the plot, and whether its floor is shown too.
type Curve = (&'static str, &'static str, bool);

/// What the plots show: file, title, unit, and figures with their names in the plot; of some the floor too.
const PLOTS: [(&str, &str, Unit, &[Curve]); 7] = [
    (
        "cold-start",
        "Cold start (10 endpoints a Service)",
        Unit::Seconds,
        &[
            ("cold/total", "total", true),
            ("cold/listing", "listing", false),
            ("cold/computing", "computing", false),
            ("cold/writing IPVS", "writing IPVS", false),
            ("cold/binding VIPs", "binding VIPs", false),
            ("tools/total", "ipvsadm, ip and nft", false),
        ],
    ),
    (
        "one-change",
        "One change, p99 (10 endpoints a Service)",
        Unit::Seconds,
        &[
            ("change/one endpoint in/p99", "endpoint in", false),
            ("change/one endpoint out/p99", "endpoint out", false),
            ("change/one Service in/p99", "Service in", false),
            ("change/one Service out/p99", "Service out", false),
        ],
    ),
    (
        "one-change-median",
        "One change, median (10 endpoints a Service)",
        Unit::Seconds,
        &[
            ("change/one endpoint in/p50", "endpoint in", false),
            ("change/one endpoint out/p50", "endpoint out", false),
            ("change/one Service in/p50", "Service in", false),
            ("change/one Service out/p50", "Service out", false),
        ],
    ),
    (
        "restart",
        "Restart and audit (10 endpoints a Service)",
        Unit::Seconds,
        &[("restart/total", "restart", true), ("restart/listing", "listing", false), ("audit/time", "audit", false)],
    ),
    (
        "counts",
        "What a cold start asks of the kernel (10 endpoints a Service)",
        Unit::Count,
        &[
            ("cold/netlink messages", "netlink messages", false),
            ("cold/netlink datagrams", "netlink datagrams", false),
            ("cold/system calls", "system calls", false),
        ],
    ),
    (
        "memory",
        "Memory (10 endpoints a Service)",
        Unit::Bytes,
        &[("memory/peak", "at the most", false), ("memory/resident", "after the start", false)],
    ),
    (
        "processor",
        "Processor, in hundredths of one (10 endpoints a Service)",
        Unit::Percent,
        &[("churn/cpu", "a hundred changes a second", false), ("steady/cpu", "nothing happens", false)],
    ),
];

impl Results {
    fn figure(&self, name: &str, size: Size) -> Option<&Figure> {
        self.figures.iter().find(|figure| figure.name == name && figure.size == size)
    }

    fn value(&self, name: &str, size: Size) -> Option<f64> {
        self.figure(name, size).map(|figure| figure.value)
    }
}

/// Writes `README.md`, `figures.json` and the plots.
pub(crate) fn write(directory: &Path, results: &Results) -> Result<()> {
    fs::create_dir_all(directory).with_context(|| format!("cannot create {}", directory.display()))?;
    for (file, title, unit, lines) in PLOTS {
        let path = directory.join(format!("{file}.svg"));
        plot::draw(&path, title, unit, &lines.iter().flat_map(|line| lines_of(results, *line)).collect::<Vec<_>>())?;
    }
    fs::write(directory.join("figures.json"), serde_json::to_vec_pretty(results)?)
        .context("cannot write the figures")?;
    fs::write(directory.join("README.md"), text(results)).context("cannot write the report")
}

/// A figure over the number of Services, and its floor.
fn lines_of(results: &Results, (figure, name, with_floor): Curve) -> Vec<Line> {
    let mut found: Vec<&Figure> =
        results.figures.iter().filter(|it| it.name == figure && it.size.endpoints == 10).collect();
    found.sort_by_key(|it| it.size);
    let services = |it: &Figure| f64::from(u32::try_from(it.size.services).unwrap_or(u32::MAX));
    let mut lines = vec![Line {
        name: name.to_owned(),
        points: found.iter().map(|it| (services(it), it.value)).collect(),
        is_floor: false,
    }];
    if with_floor {
        let points = found.iter().filter_map(|it| Some((services(it), it.floor?))).collect();
        lines.push(Line { name: format!("{name}: the kernel alone"), points, is_floor: true });
    }
    lines
}

fn text(results: &Results) -> String {
    let mut out = String::from(
        "# Performance\n\nWhat the agent needs, beside what the kernel itself needs for the same: the *floor*, measured by sending the same \
         messages in the same batches from a program that does nothing else. `cargo xtask bench` measures all this and writes this \
         page; `cargo xtask bench --help` says how to measure one size or one thing. All figures are in [figures.json](figures.json).\n\n",
    );
    let _ = writeln!(
        out,
        "Measured on {}, in the lab's guest (User-Mode Linux {}, one processor for the agent, the API server and the kernel \
         together). A guest of this kind makes system calls and page faults several times as dear as they are, and computes as \
         fast as the machine: so counts (messages, system calls, instructions) stand beside times. The instructions of the pure \
         core are in crates/reconciler/benches/instructions.txt.\n",
        results.machine, results.kernel
    );
    targets(results, &mut out);
    for (file, title, _, _) in PLOTS {
        let _ = writeln!(out, "![{title}]({file}.svg)\n");
    }
    for (prefix, title, note) in PARTS {
        part(results, prefix, title, note, &mut out);
        if prefix == "memory/" {
            each(results, &mut out);
        }
    }
    if let Ok(notes) = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/performance/notes.md")) {
        out += &notes;
    }
    out
}

/// How many bytes a further endpoint takes; `None` without the figures for it.
fn bytes_an_endpoint(results: &Results) -> Option<f64> {
    let [more, less] = [MORE, AT].map(|size| results.value("memory/resident", size));
    Some((more? - less?) / f64::from(u32::try_from(MORE.services * (MORE.endpoints - AT.endpoints)).ok()?))
}

/// What of the memory one endpoint takes, and one Service.
fn each(results: &Results, out: &mut String) {
    let [more, less] = [AT, LESS].map(|size| results.value("memory/resident", size));
    let between = u32::try_from(AT.services - LESS.services).map(f64::from);
    if let (Some(endpoint), Some(more), Some(less), Ok(between)) = (bytes_an_endpoint(results), more, less, between) {
        let service = (more - less) / between;
        let _ = writeln!(
            out,
            "A further endpoint takes {endpoint:.0} bytes, a further Service with its ten endpoints {service:.0}, of which {:.0} \
             are the Service's own.\n",
            service - 10.0 * endpoint
        );
    }
}

/// A target, what was measured, and whether that is within it.
fn targets(results: &Results, out: &mut String) {
    *out += "## Targets\n\nAt 10,000 Services with 10 endpoints each, where nothing else is said.\n\n| Target | Measured | |\n|---|--:|---|\n";
    let mut row = |target: &str, unit: Unit, measured: Option<f64>, limit: f64| {
        let Some(measured) = measured else { return };
        let verdict = if measured <= limit { "yes" } else { "**no**" };
        let _ = writeln!(out, "| {target} | {} | {verdict} |", show(measured, unit));
    };
    let ratio = |name: &str, size| results.figure(name, size).and_then(|it| Some(it.value / it.floor?));
    let value = |name: &str, size| results.value(name, size);
    row("Cold start: at most 1.3 x its floor", Unit::Times, ratio("cold/total", AT), 1.3);
    row("Cold start without listing: at most 1.3 x its floor", Unit::Times, ratio("cold/first audit", AT), 1.3);
    row(
        "`default/kubernetes` served within 100 ms of its arrival",
        Unit::Seconds,
        value("cold/kubernetes served after", AT),
        0.1,
    );
    for kind in ["one endpoint in", "one endpoint out"] {
        let name = |what: &str| format!("change/{kind}/{what}");
        row(&format!("{kind}: at most 3 messages"), Unit::Count, value(&name("messages"), AT), 3.0);
        row(&format!("{kind}: at most 2 batches"), Unit::Count, value(&name("batches"), AT), 2.0);
        row(&format!("{kind}: p99 under 2 ms at 20,000 Services"), Unit::Seconds, value(&name("p99"), LARGE), 0.002);
        let growth = value(&name("p50"), LARGE).zip(value(&name("p50"), LESS)).map(|(large, small)| large / small);
        row(&format!("{kind}: median flat within 20 % from 1,000 to 20,000"), Unit::Times, growth, 1.2);
    }
    row(
        "one endpoint in: no list is read",
        Unit::Count,
        value("change/one endpoint in/lists read with what follows", AT),
        0.0,
    );
    row("Restart: nothing written", Unit::Count, value("restart/datagrams that write", AT), 0.0);
    row("Restart: at most 1.5 x a plain reading", Unit::Times, ratio("restart/total", AT), 1.5);
    let parts = ["restart/reading the kernel", "restart/first audit"].map(|name| value(name, AT));
    let floor = results.figure("restart/total", AT).and_then(|figure| figure.floor);
    let after_listing = parts.into_iter().sum::<Option<f64>>().zip(floor).map(|(both, floor)| both / floor);
    row("Restart without listing: at most 1.5 x a plain reading", Unit::Times, after_listing, 1.5);
    row("Nothing happens: under 1 % of a processor", Unit::Percent, value("steady/cpu", AT), 1.0);
    for (when, name) in [("the start", "memory/resident"), ("audits", "steady/resident")] {
        row(&format!("Memory after {when}: at most 48 MiB"), Unit::Bytes, value(name, AT), 48.0 * 1024.0 * 1024.0);
    }
    row("Memory: at most 300 bytes for each further endpoint", Unit::Bytes, bytes_an_endpoint(results), 300.0);
    let growth = value("growth/resident after all", LESS).zip(value("growth/resident after 5 tenths", LESS));
    row(
        "A million changes: no growth (after all against after half of them, 2 % of noise)",
        Unit::Times,
        growth.map(|(late, early)| late / early),
        1.02,
    );
    row("The program: at most 10 MB", Unit::Bytes, value("binary/size", AT), 10e6);
    row("First line of the log within 30 ms", Unit::Seconds, value("cold/first log line", AT), 0.03);
    *out += "\n";
}

/// One table: a row for each figure, a column for each size.
fn part(results: &Results, prefix: &str, title: &str, note: &str, out: &mut String) {
    let figures: Vec<&Figure> = results.figures.iter().filter(|it| it.name.starts_with(prefix)).collect();
    if figures.is_empty() {
        return;
    }
    let mut names: Vec<&str> = Vec::new();
    for figure in &figures {
        if !names.contains(&figure.name.as_str()) {
            names.push(&figure.name);
        }
    }
    let sizes: BTreeSet<Size> = figures.iter().map(|it| it.size).collect();
    let _ = writeln!(out, "## {title}\n\n{note}\n");
    let heads: Vec<String> =
        sizes.iter().map(|it| format!("{} × {}", grouped(it.services), grouped(it.endpoints))).collect();
    let _ = writeln!(out, "| | {} |\n|---|{}", heads.join(" | "), "--:|".repeat(heads.len()));
    for name in names {
        let cell = |size: &Size| {
            let Some(figure) = results.figure(name, *size) else { return String::new() };
            let floor = figure.floor.map(|floor| format!(" (floor {})", show(floor, figure.unit))).unwrap_or_default();
            format!("{}{floor}", show(figure.value, figure.unit))
        };
        let cells: Vec<String> = sizes.iter().map(cell).collect();
        let _ = writeln!(out, "| {} | {} |", name.strip_prefix(prefix).unwrap_or(name), cells.join(" | "));
    }
    *out += "\n";
}
