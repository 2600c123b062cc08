//! kube-proxy's chains in iptables-legacy. Its kernel interface replaces whole tables in a layout that only the
//! iptables tools know, so this module runs them; and only if the kernel has such tables already, since the tools would
//! create them.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::io::{self, Write as _};
use std::process::{Command, Output, Stdio};

use crate::Action;
use crate::kube_proxy_names::{self, TABLES};
use crate::report::{Backend, Error, Family, Iptables, RETRY_ADVICE, Report};
use crate::rules::{Jump, Plan, Table};

/// How often a table is attempted when other processes change it meanwhile.
const ATTEMPTS: u32 = 3;

pub(crate) fn clean_up(action: Action, report: &mut Report) {
    for family in Family::BOTH {
        if let Err(problem) = clean_up_family(family, version, action, report) {
            report.problems.push(problem);
        }
    }
}

/// `version` is as [`Tools::find`] takes it.
fn clean_up_family(
    family: Family,
    version: impl Fn(&str) -> Option<String>,
    action: Action,
    report: &mut Report,
) -> Result<(), Error> {
    let iptables = Iptables { backend: Backend::Legacy, family };
    let cannot_inspect = |reason: String, advice: String| Error::CannotInspect {
        location: format!("the rules of {iptables}"),
        reason,
        advice,
    };
    let in_use = tables_in_use(family).map_err(|error| cannot_inspect(error.to_string(), RETRY_ADVICE.into()))?;
    if in_use.is_empty() {
        return Ok(());
    }
    let Some(tools) = Tools::find(family, version) else {
        let reason = format!("the kernel has tables of it ({}), and its tools are not installed", in_use.join(" "));
        report.unchecked.push(cannot_inspect(reason, manual_command(family)));
        return Ok(());
    };
    let read = || tools.save().map_err(|reason| cannot_inspect(reason, manual_command(family)));
    for table in parse(iptables, &read()?) {
        if let Err(problem) = clean_up_table(&tools, table, &read, action, report) {
            report.problems.push(problem);
        }
    }
    Ok(())
}

/// One table is one transaction.
fn clean_up_table(
    tools: &Tools,
    mut table: Table<String>,
    read: &impl Fn() -> Result<String, Error>,
    action: Action,
    report: &mut Report,
) -> Result<(), Error> {
    let mut attempts = 0;
    loop {
        let plan = table.plan(&BTreeSet::new());
        if action == Action::Find || plan.is_empty() {
            plan.report(report);
            return Ok(());
        }
        let Err(reason) = tools.restore(&restore_input(&plan, &table.name)) else {
            plan.report(report);
            return Ok(());
        };
        attempts += 1;
        if attempts == ATTEMPTS {
            plan.report_kept(report);
            return Err(Error::CannotRemoveChains {
                iptables: table.iptables,
                table: table.name.clone(),
                chains: plan.chains.iter().map(|&chain| chain.to_owned()).collect(),
                reason,
                advice: manual_command(table.iptables.family),
            });
        }
        let (iptables, name) = (table.iptables, table.name);
        let tables = parse(iptables, &read()?);
        // A table that no longer exists needs no cleanup.
        let Some(reread) = tables.into_iter().find(|table| table.name == name) else { return Ok(()) };
        table = reread;
    }
}

/// The tables in the kernel. Not from `/proc/net`, which has the namespace of the process's main thread.
fn tables_in_use(family: Family) -> io::Result<Vec<String>> {
    match fs::read_to_string(format!("/proc/thread-self/net/{family}_tables_names")) {
        Ok(names) => Ok(names.lines().map(str::to_owned).collect()),
        // The kernel has no iptables-legacy, or has not loaded it.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// The command for an administrator to run where the tools are installed.
fn manual_command(family: Family) -> String {
    let program = program(family);
    format!(
        "where the tools are installed, run `{program}-legacy-save -c | grep -vE '{}' | {program}-legacy-restore -c`",
        kube_proxy_names::pattern()
    )
}

fn program(family: Family) -> &'static str {
    match family {
        Family::Ip => "iptables",
        Family::Ip6 => "ip6tables",
    }
}

/// The programs of one family.
#[derive(Debug, PartialEq, Eq)]
struct Tools {
    save: String,
    restore: String,
}

impl Tools {
    /// The tools with `-legacy` in their names, or plain ones whose version has the legacy backend. `version` returns
    /// the output of a program with `--version`, if it exists.
    fn find(family: Family, version: impl Fn(&str) -> Option<String>) -> Option<Self> {
        let program = program(family);
        [format!("{program}-legacy"), program.to_owned()].into_iter().find_map(|name| {
            let tools = Self { save: format!("{name}-save"), restore: format!("{name}-restore") };
            let is_legacy = |tool: &String| version(tool).is_some_and(|version| version.contains("legacy"));
            (is_legacy(&tools.save) && is_legacy(&tools.restore)).then_some(tools)
        })
    }

    /// The rules of all tables in use. Without a table name the program creates none.
    fn save(&self) -> Result<String, String> {
        let output = Command::new(&self.save).stdin(Stdio::null()).output();
        output_of(&self.save, output).map(|output| String::from_utf8_lossy(&output.stdout).into_owned())
    }

    fn restore(&self, input: &str) -> Result<(), String> {
        let run = || {
            let mut command = Command::new(&self.restore);
            command.args(["--wait=5", "--noflush"]).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
            let mut child = command.spawn()?;
            // A program that exits early reports why on stderr.
            if let Some(mut stdin) = child.stdin.take() {
                let _ = stdin.write_all(input.as_bytes());
            }
            child.wait_with_output()
        };
        output_of(&self.restore, run()).map(drop)
    }
}

fn output_of(program: &str, output: io::Result<Output>) -> Result<Output, String> {
    let output = output.map_err(|error| format!("cannot run {program}: {error}"))?;
    if output.status.success() {
        return Ok(output);
    }
    let words = String::from_utf8_lossy(&output.stderr);
    let words: Vec<&str> = words.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    Err(format!("{program} failed ({}): {}", output.status, words.join(" ")))
}

fn version(program: &str) -> Option<String> {
    let output = Command::new(program).arg("--version").stdin(Stdio::null()).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Parses the output of `iptables-save`. A rule is identified by its line.
pub(crate) fn parse(iptables: Iptables, saved: &str) -> Vec<Table<String>> {
    let mut tables: Vec<Table<String>> = Vec::new();
    for line in saved.lines() {
        if let Some(name) = line.strip_prefix('*') {
            tables.push(Table { iptables, name: name.to_owned(), chains: BTreeSet::new(), jumps: Vec::new() });
        }
        let Some(table) = tables.last_mut() else { continue };
        if let Some(chain) = line.strip_prefix(':') {
            table.chains.extend(chain.split_whitespace().next().map(str::to_owned));
        } else if let Some((chain, target)) = jump(line) {
            table.jumps.push(Jump { chain: chain.to_owned(), target: target.to_owned(), rule: line.to_owned() });
        }
    }
    tables.retain(|table| TABLES.contains(&table.name.as_str()) && table.has_kubernetes_chains());
    tables
}

/// The chain of a rule and its target chain. A chain as target has no options, so it comes last. A name in a comment or
/// a log prefix does not follow `-j` as a word of its own.
fn jump(line: &str) -> Option<(&str, &str)> {
    let chain = line.strip_prefix("-A ")?.split(' ').next()?;
    let (rest, target) = line.rsplit_once(' ')?;
    let (_, option) = rest.rsplit_once(' ')?;
    (matches!(option, "-j" | "-g") && kube_proxy_names::is_chain(target)).then_some((chain, target))
}

/// The input for `iptables-restore --noflush`, which flushes declared chains and keeps all others.
pub(crate) fn restore_input(plan: &Plan<'_, String>, table: &str) -> String {
    let mut input = format!("*{table}\n");
    for chain in &plan.chains {
        let _ = writeln!(input, ":{chain} - [0:0]");
    }
    for jump in &plan.jumps {
        // The line is already quoted as the program expects.
        let _ = writeln!(input, "{}", jump.rule.replacen("-A ", "-D ", 1));
    }
    for chain in &plan.chains {
        let _ = writeln!(input, "-X {chain}");
    }
    input.push_str("COMMIT\n");
    input
}

#[cfg(test)]
mod tests;
