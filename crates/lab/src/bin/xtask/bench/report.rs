//! The report: tables and plots.

use std::path::Path;

use anyhow::Result;

use super::figures::Figure;

pub(crate) fn write(_directory: &Path, _figures: &[Figure]) -> Result<()> {
    Ok(())
}
