//! The report: what was done, what came of it, and plots over time.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, anyhow};
use plotters::prelude::*;

use super::record::SoakRecord;
use crate::workload::record::INTERVAL;

const MIB: f64 = (1 << 20) as f64;

/// In words and tables.
pub(crate) fn text(record: &SoakRecord) -> String {
    let mut text = String::new();
    let sum = record.clients.sum();
    let _ = writeln!(
        text,
        "{} minutes: {} connections, {} answers, **{} lost**. Compared {} times with what a fresh start makes: \
         **{} differences**.\n",
        record.seconds / 60,
        sum.opened,
        sum.answered,
        sum.lost,
        record.comparisons,
        record.differences.len()
    );
    table(
        &mut text,
        &["Clients", "Connections", "Answers", "Lost", "Longest"],
        record.clients.traffic.iter().map(|(who, it)| {
            vec![
                who.clone(),
                it.opened.to_string(),
                it.answered.to_string(),
                it.lost.to_string(),
                format!("{:.2} s", it.longest),
            ]
        }),
    );
    table(
        &mut text,
        &["Changes", "Number"],
        record.changes.iter().map(|(kind, count)| vec![kind.clone(), count.to_string()]),
    );
    table(
        &mut text,
        &["Trouble", "Times"],
        record.disruptions.iter().map(|(kind, count)| vec![kind.clone(), count.to_string()]),
    );
    table(
        &mut text,
        &["Changed by somebody else", "Times", "Repaired", "Longest"],
        record.drifts.iter().map(|(kind, it)| {
            vec![kind.clone(), it.made.to_string(), it.repaired.to_string(), format!("{:.1} s", it.longest)]
        }),
    );
    let _ = writeln!(text, "The agent itself counted {} such findings over all its starts.\n", record.drift_found);
    let settled = record.settled();
    if let (Some(first), Some(last), Some(growth)) = (settled.first(), settled.last(), record.growth()) {
        let most = settled.iter().map(|it| it.resident).max().unwrap_or(0);
        let files = (settled.iter().map(|it| it.files).min(), settled.iter().map(|it| it.files).max());
        let _ = writeln!(
            text,
            "The longest life, but for its first fifth ({:.0} minutes): {:.1} MiB at its beginning, {:.1} at its end, {:.1} at the most; \
             by the line that fits best {:+.2} MiB an hour. Open files: {} to {}; threads: {}.",
            (last.at - first.at) / 60.0,
            mib(first.resident),
            mib(last.resident),
            mib(most),
            growth / MIB,
            files.0.unwrap_or(0),
            files.1.unwrap_or(0),
            last.threads,
        );
    }
    for failure in record.failures() {
        let _ = writeln!(text, "- {failure}");
    }
    text
}

#[expect(clippy::cast_precision_loss, reason = "memory is not counted to 2^53 bytes")]
pub(super) fn mib(bytes: u64) -> f64 {
    bytes as f64 / MIB
}

fn table(text: &mut String, head: &[&str], rows: impl Iterator<Item = Vec<String>>) {
    let _ = writeln!(text, "| {} |\n|---|{}", head.join(" | "), "--:|".repeat(head.len() - 1));
    for row in rows {
        let _ = writeln!(text, "| {} |", row.join(" | "));
    }
    text.push('\n');
}

/// Writes the page with its plots.
pub(crate) fn write(dir: &Path, record: &SoakRecord) -> Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let page = format!(
        "# Soak\n\nThe agent with changes, kills, faults and traffic all at once, in the lab: `cargo xtask soak --minutes {}` writes this page. \
         In the first third it is killed with SIGKILL again and again; the agent that lives then is looked at for memory. Clients are outside \
         the cluster, in a pod, and on the node; a connection that is refused or breaks, or an answer that does not come within 20 s, \
         is lost. Somebody changes virtual servers, real servers, addresses and the packet filter of Services all the time, and the sync \
         period is 10 s. Every two minutes everything comes to rest, and is compared with what a fresh start makes on a node of the same \
         addresses; a virtual server and a table of somebody else's stand beside it all the time.\n\n{}\n\
         ![Memory](memory.svg)\n\n![Open files](files.svg)\n\n![Answers](answers.svg)\n",
        record.seconds / 60,
        text(record)
    );
    fs::write(dir.join("README.md"), page).context("cannot write the report")?;
    let memory: Vec<Vec<(f64, f64)>> = record
        .samples
        .chunk_by(|a, b| a.life == b.life)
        .map(|life| life.iter().map(|it| (it.at / 60.0, mib(it.resident))).collect())
        .collect();
    #[expect(clippy::cast_precision_loss, reason = "nor are files")]
    let files: Vec<(f64, f64)> = record.samples.iter().map(|it| (it.at / 60.0, it.files as f64)).collect();
    #[expect(clippy::cast_precision_loss, reason = "nor answers")]
    let answers: Vec<(f64, f64)> = record
        .clients
        .answers
        .iter()
        .enumerate()
        .map(|(place, (answered, _))| (place as f64 * INTERVAL as f64 / 60.0, *answered as f64 / INTERVAL as f64))
        .collect();
    draw(&dir.join("memory.svg"), "Memory of the agent (MiB), a line for each life", &memory)?;
    draw(&dir.join("files.svg"), "Open files of the agent", &[files])?;
    draw(&dir.join("answers.svg"), "Answers to clients a second", &[answers])
}

/// Lines over minutes; both axes begin at 0.
fn draw(path: &Path, title: &str, lines: &[Vec<(f64, f64)>]) -> Result<()> {
    plot(path, title, lines).map_err(|error| anyhow!("cannot draw {}: {error}", path.display()))
}

fn plot(path: &Path, title: &str, lines: &[Vec<(f64, f64)>]) -> Result<(), Box<dyn std::error::Error>> {
    let most = |pick: fn(&(f64, f64)) -> f64| lines.iter().flatten().map(pick).fold(1.0, f64::max);
    let area = SVGBackend::new(path, (760, 300)).into_drawing_area();
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&area)
        .caption(title, ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(60)
        .build_cartesian_2d(0.0..most(|it| it.0), 0.0..most(|it| it.1) * 1.1)?;
    chart
        .configure_mesh()
        .x_desc("Minutes")
        .light_line_style(RGBColor(238, 238, 238))
        .x_label_formatter(&|it| format!("{it:.0}"))
        .y_label_formatter(&|it| format!("{it:.0}"))
        .label_style(("sans-serif", 12))
        .draw()?;
    for line in lines {
        chart.draw_series(LineSeries::new(line.iter().copied(), RGBColor(0, 114, 178).stroke_width(2)))?;
    }
    area.present()?;
    Ok(())
}
