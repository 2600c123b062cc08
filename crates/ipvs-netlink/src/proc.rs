//! The files below `/proc` in which the kernel tells of IPVS, as lines and words.

use std::fmt;
use std::fs::File;
use std::io::{self, BufRead, BufReader};

/// How much of a line an error shows.
const SHOWN: usize = 160;

/// A file of `/proc` that cannot be opened, read or understood. The text has the cause in it, so there is no `source`
/// that would be shown twice.
#[derive(Debug)]
#[non_exhaustive]
pub enum ProcError {
    /// It cannot be opened: `NotFound` where the kernel has no IPVS, or has not loaded it.
    Open {
        /// The file.
        path: &'static str,
        /// Why.
        cause: io::Error,
    },
    /// It cannot be read on.
    Read {
        /// The number of the line, from 1.
        line: u64,
        /// Why.
        cause: io::Error,
    },
    /// A line is not as the kernel writes it.
    Line {
        /// Its number, from 1.
        line: u64,
        /// Its start; what is not UTF-8 is replaced.
        text: String,
        /// What is wrong with it.
        fault: &'static str,
    },
}

impl fmt::Display for ProcError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Open { path, cause } => {
                write!(f, "cannot open {path}: {cause}")?;
                if cause.kind() == io::ErrorKind::NotFound {
                    f.write_str(": this kernel has no IPVS: load it with `modprobe ip_vs` (CONFIG_IP_VS)")?;
                }
                Ok(())
            }
            Self::Read { line, cause } => write!(f, "cannot read line {line}: {cause}"),
            Self::Line { line, text, fault } => write!(f, "cannot understand line {line}, {text:?}: {fault}"),
        }
    }
}

impl std::error::Error for ProcError {}

/// Opens a file of the calling thread's network namespace. `/proc/net` would be that of the process' first thread.
pub(crate) fn open(path: &'static str) -> Result<BufReader<File>, ProcError> {
    File::open(path).map(BufReader::new).map_err(|cause| ProcError::Open { path, cause })
}

/// Lines, each in the place of the one before. Nothing comes after an error of the reader.
#[derive(Debug)]
pub(crate) struct Lines<R> {
    reader: R,
    line: Vec<u8>,
    number: u64,
    failed: bool,
}

impl<R: BufRead> Lines<R> {
    pub(crate) fn new(reader: R) -> Self {
        Self { reader, line: Vec::new(), number: 0, failed: false }
    }

    pub(crate) fn next(&mut self) -> Option<Result<Line<'_>, ProcError>> {
        if self.failed {
            return None;
        }
        self.line.clear();
        self.number += 1;
        match self.reader.read_until(b'\n', &mut self.line) {
            Ok(0) => None,
            Ok(_) => {
                let text = self.line.strip_suffix(b"\n").unwrap_or(&self.line);
                Some(Ok(Line { number: self.number, text }))
            }
            Err(cause) => {
                self.failed = true;
                Some(Err(ProcError::Read { line: self.number, cause }))
            }
        }
    }

    /// A line that has to be there.
    pub(crate) fn expect(&mut self, missing: &'static str) -> Result<Line<'_>, ProcError> {
        let end = self.number + 1;
        self.next().unwrap_or(Err(ProcError::Line { line: end, text: String::new(), fault: missing }))
    }
}

/// One line, without its end.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Line<'a> {
    pub(crate) number: u64,
    pub(crate) text: &'a [u8],
}

impl Line<'_> {
    pub(crate) fn error(self, fault: &'static str) -> ProcError {
        let shown = &self.text[..self.text.len().min(SHOWN)];
        ProcError::Line { line: self.number, text: String::from_utf8_lossy(shown).into_owned(), fault }
    }

    pub(crate) fn words(&self) -> Words<'_> {
        Words(self.text)
    }
}

/// What spaces separate.
#[derive(Clone, Debug)]
pub(crate) struct Words<'a>(&'a [u8]);

impl<'a> Words<'a> {
    /// All that is left, with its spaces.
    pub(crate) fn rest(&self) -> &'a [u8] {
        self.0
    }
}

impl<'a> Iterator for Words<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        let start = self.0.iter().position(|byte| *byte != b' ')?;
        let text = &self.0[start..];
        let (word, rest) = text.split_at(text.iter().position(|byte| *byte == b' ').unwrap_or(text.len()));
        self.0 = rest;
        Some(word)
    }
}

/// A number of digits alone: no sign, nothing around it.
pub(crate) fn number(word: &[u8], radix: u32) -> Option<u64> {
    let text = str::from_utf8(word).ok()?;
    let all_digits = text.chars().all(|digit| digit.is_digit(radix));
    all_digits.then(|| u64::from_str_radix(text, radix).ok()).flatten()
}

/// A number of so many hexadecimal digits, filled up with zeros.
pub(crate) fn padded_hex(word: &[u8], digits: usize) -> Option<u64> {
    if word.len() == digits { number(word, 16) } else { None }
}
