//! What one sees of the demo: titles, commands, tables and checks, with colour where it is wanted.

use std::cell::Cell;
use std::fmt::Write;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use super::network::{BACKENDS, Backend, SERVICE};

const PLAIN: &str = "";
const BOLD: &str = "1";
const DIM: &str = "2";
const RED: &str = "1;31";
const GREEN: &str = "32";
const CYAN: &str = "1;36";
/// One for each backend.
const NAMES: [&str; 3] = ["34", "33", "35"];

/// Where notes begin in a table.
const NOTE: usize = 68;
/// How long the line under a title is with its title.
const WIDTH: usize = 100;

/// Standard output.
#[derive(Debug)]
pub(crate) struct Screen {
    is_colored: bool,
    pause: Duration,
    started: Instant,
    step: u32,
    checks: u32,
    /// Whether the last line is an empty one.
    is_apart: Cell<bool>,
}

impl Screen {
    pub(crate) fn new(is_colored: bool, pause: Duration) -> Self {
        Self { is_colored, pause, started: Instant::now(), step: 0, checks: 0, is_apart: Cell::new(false) }
    }

    fn paint(&self, style: &str, text: &str) -> String {
        if self.is_colored && !style.is_empty() && !text.is_empty() {
            format!("\x1b[{style}m{text}\x1b[0m")
        } else {
            text.to_owned()
        }
    }

    fn line(&self, style: &str, text: &str) {
        let text = if text.is_empty() { String::new() } else { format!("   {}", self.paint(style, text)) };
        println!("{text}");
        self.is_apart.set(text.is_empty());
    }

    /// An empty line, unless there is one.
    fn gap(&self) {
        if !self.is_apart.get() {
            self.line(PLAIN, "");
        }
    }

    /// The name of a backend, in its colour.
    pub(crate) fn name(&self, name: &str) -> String {
        match BACKENDS.iter().position(|backend| backend.name == name) {
            Some(index) => self.paint(NAMES[index], name),
            None => name.to_owned(),
        }
    }

    /// Begins a step with its title and what one sees in it.
    pub(crate) fn step(&mut self, title: &str, sentence: &str) {
        self.step += 1;
        let title = format!("── {} {title} ", self.step);
        let rule = "─".repeat(WIDTH.saturating_sub(title.chars().count()));
        self.gap();
        println!("{}", self.paint(CYAN, &(title + &rule)));
        self.line(PLAIN, sentence);
        self.gap();
    }

    /// Ends a step.
    pub(crate) fn rest(&self) {
        std::thread::sleep(self.pause);
    }

    /// Lines of text.
    pub(crate) fn text(&self, text: &str) {
        self.gap();
        self.output(text);
    }

    /// Words and what they mean.
    pub(crate) fn facts(&self, facts: &[(&str, String)]) {
        for (word, meaning) in facts {
            self.line(PLAIN, &format!("{}{meaning}", self.paint(BOLD, &format!("{word:<12}"))));
        }
        self.gap();
    }

    /// Something as one would type it on the node.
    pub(crate) fn command(&self, command: &str) {
        for (index, line) in wrap(command, WIDTH - 8).iter().enumerate() {
            self.line(BOLD, &format!("{}{line}", if index == 0 { "node# " } else { "      " }));
        }
    }

    /// What a command wrote, or a drawing.
    pub(crate) fn output(&self, output: &str) {
        for line in output.lines() {
            self.line(PLAIN, line.trim_end());
        }
        self.gap();
    }

    /// What `ipvsadm` wrote, with the names of what stands in it.
    pub(crate) fn table(&self, table: &str) {
        for line in table.lines().map(str::trim_end) {
            match note(line) {
                Some(note) => self.line(PLAIN, &format!("{line:<NOTE$}{}", self.name(note))),
                None => self.line(DIM, line),
            }
        }
        self.gap();
    }

    /// How a manifest was changed.
    pub(crate) fn difference(&self, file: &str, lines: &[String]) {
        self.line(BOLD, file);
        for line in lines {
            self.line(if line.starts_with('+') { GREEN } else { RED }, line);
        }
        self.gap();
    }

    /// Lines of the agent's log.
    pub(crate) fn log(&self, title: &str, lines: &[String]) {
        if lines.is_empty() {
            return;
        }
        self.line(DIM, &format!("┌ {title} says"));
        for line in lines {
            for (index, part) in wrap(line, WIDTH - 10).iter().enumerate() {
                self.line(DIM, &format!("│ {}{part}", if index == 0 { "" } else { "     " }));
            }
        }
        self.gap();
    }

    /// Who answered the client's requests.
    pub(crate) fn answers(&self, names: &[String]) {
        let mut line = String::new();
        for name in names {
            let _ = write!(line, "  {}", self.name(name));
        }
        self.line(PLAIN, &format!("{} {} requests to {SERVICE}:{line}", self.paint(BOLD, "client:"), names.len()));
    }

    /// The connections of a real server that drains; `None` once it is gone.
    pub(crate) fn progress(&self, since: Duration, backend: Backend, connections: Option<(u32, u32)>) {
        let now = match connections {
            Some((active, inactive)) => format!("ActiveConn {active}  InActConn {inactive}"),
            None => "gone".to_owned(),
        };
        self.line(PLAIN, &format!("{:>5.1} s  {}  {now}", since.as_secs_f32(), self.name(backend.name)));
        if connections.is_none() {
            self.gap();
        }
    }

    /// A fact that was checked.
    pub(crate) fn passed(&mut self, fact: &str) {
        self.checks += 1;
        self.line(GREEN, &format!("✓ {fact}"));
    }

    /// Shows a fact if it holds. If not, that is an error, which says what there is instead.
    pub(crate) fn check(&mut self, holds: bool, fact: &str, instead: &str) -> Result<()> {
        if !holds {
            bail!("this should be so: {fact}; but {instead}");
        }
        self.passed(fact);
        Ok(())
    }

    /// The last line.
    pub(crate) fn end(&self) {
        let seconds = self.started.elapsed().as_secs_f32();
        let line = format!(
            "PASSED: the Service came, scaled, drained, kept its client and outlived its agent; all {} checks hold ({seconds:.1} s)",
            self.checks
        );
        self.gap();
        println!("{}", self.paint(GREEN, &line));
    }

    /// The last line if something is not as it should be.
    pub(crate) fn failed(&self, error: &anyhow::Error) {
        self.gap();
        println!("{}", self.paint(RED, &format!("FAILED in step {}: {error:#}", self.step)));
    }
}

/// Breaks a text between words into lines of this width, where its words let it.
fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split(' ') {
        match lines.last_mut() {
            Some(line) if line.is_empty() => line.push_str(word),
            Some(line) if line.chars().count() + 1 + word.chars().count() <= width => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

/// Whose line of the table this is.
fn note(line: &str) -> Option<&'static str> {
    let words: Vec<&str> = line.split_whitespace().collect();
    match words.as_slice() {
        ["->", address, ..] => {
            BACKENDS.iter().find(|backend| backend.socket().to_string() == *address).map(|backend| backend.name)
        }
        ["TCP", address, ..] => (*address == SERVICE.to_string()).then_some("default/hello"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_table_are_recognized() {
        assert_eq!(note("TCP  10.96.0.10:80 rr"), Some("default/hello"));
        assert_eq!(note("  -> 10.244.2.2:8080   Masq    1      0          0"), Some("backend-b"));
        assert_eq!(note("  -> RemoteAddress:Port           Forward Weight ActiveConn InActConn"), None);
        assert_eq!(note("Prot LocalAddress:Port Scheduler Flags"), None);
    }

    #[test]
    fn lines_break_between_words() {
        assert_eq!(wrap("one two three", 7), ["one two", "three"]);
        assert_eq!(wrap("extraordinary it is", 5), ["extraordinary", "it is"]);
        assert_eq!(wrap("", 5), [""]);
    }

    #[test]
    fn colour_is_only_where_it_is_wanted() {
        assert_eq!(Screen::new(false, Duration::ZERO).name("backend-a"), "backend-a");
        assert_eq!(Screen::new(true, Duration::ZERO).name("backend-a"), "\x1b[34mbackend-a\x1b[0m");
        assert_eq!(Screen::new(true, Duration::ZERO).name("default/hello"), "default/hello");
    }
}
