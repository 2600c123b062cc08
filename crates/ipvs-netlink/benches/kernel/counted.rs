//! Counts in what strace writes.

/// What was done between two marks.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counts {
    /// System calls.
    pub(crate) calls: u64,
    /// Bytes that were sent on sockets.
    pub(crate) sent: u64,
    /// Bytes that were received on sockets; not those that were only looked at.
    pub(crate) received: u64,
}

/// The system call that marks where a work begins and ends: nobody else makes it.
const MARK: &str = "getppid";

/// The clock, which elsewhere takes no system call, and this benchmark alone asks for.
const CLOCK: &str = "clock_gettime";

const MSG_PEEK: u64 = 2;

impl Counts {
    /// Reads the lines of `strace -f -e raw=all`.
    pub(crate) fn of(lines: impl Iterator<Item = String>) -> Self {
        let mut counts = Self::default();
        let mut is_counting = false;
        // All lines are read, or strace would wait.
        for line in lines {
            let line =
                line.strip_prefix("[pid").and_then(|line| line.split_once("] ")).map_or(&line[..], |(_, line)| line);
            let Some((name, rest)) = line.split_once('(') else { continue };
            if !name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_') {
                continue;
            }
            if name == MARK {
                is_counting = !is_counting;
                continue;
            }
            if !is_counting || name == CLOCK {
                continue;
            }
            counts.calls += 1;
            let Some((arguments, result)) = rest.rsplit_once(") = ").or_else(|| rest.rsplit_once(" = ")) else {
                continue;
            };
            let arguments: Vec<u64> = arguments.trim_end_matches([')', ' ']).split(", ").map(number).collect();
            let bytes = number(result);
            match (name, &arguments[..]) {
                ("sendto" | "sendmsg", _) => counts.sent += bytes,
                ("recvfrom", [_, _, _, flags, ..]) | ("recvmsg", [_, _, flags]) if flags & MSG_PEEK == 0 => {
                    counts.received += bytes;
                }
                _ => {}
            }
        }
        counts
    }
}

/// A number as strace writes it; 0 for what is none, such as errors.
fn number(text: &str) -> u64 {
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).unwrap_or_default(),
        None => text.parse().unwrap_or_default(),
    }
}
