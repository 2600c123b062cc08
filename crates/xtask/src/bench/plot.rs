//! Plots of quantities over the number of Services, as SVG.

use std::path::Path;

use anyhow::{Result, anyhow};
use plotters::prelude::*;

use super::figures::{Unit, show};

/// One line of a plot.
pub(crate) struct Line {
    pub(crate) name: String,
    /// The number of Services, and the value.
    pub(crate) points: Vec<(f64, f64)>,
    /// What the kernel itself needs is drawn thin.
    pub(crate) is_floor: bool,
}

const SIZE: (u32, u32) = (760, 420);
/// Told apart by people who see colours otherwise, too (Okabe and Ito).
const COLOURS: [RGBColor; 7] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
    RGBColor(230, 159, 0),
    RGBColor(0, 0, 0),
];
const GREY: RGBColor = RGBColor(120, 120, 120);

/// Both axes are logarithmic: what is proportional to the size is a line of slope 1, what does not depend on it is level.
pub(crate) fn draw(path: &Path, title: &str, unit: Unit, lines: &[Line]) -> Result<()> {
    plot(path, title, unit, lines).map_err(|error| anyhow!("cannot draw {}: {error}", path.display()))
}

fn plot(path: &Path, title: &str, unit: Unit, lines: &[Line]) -> Result<(), Box<dyn std::error::Error>> {
    let points = || lines.iter().flat_map(|line| &line.points).filter(|point| point.1 > 0.0);
    let range = |values: Vec<f64>, room: f64| {
        let least = values.iter().copied().fold(f64::INFINITY, f64::min);
        let most = values.iter().copied().fold(0.0, f64::max);
        (least / room)..(most * room)
    };
    if points().next().is_none() {
        return Ok(());
    }
    let x = range(points().map(|point| point.0).collect(), 1.1);
    let y = range(points().map(|point| point.1).collect(), 1.8);
    // The names of the lines stand above them.
    let y = y.start..y.end * (y.end / y.start).powf(0.3);
    let area = SVGBackend::new(path, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&area)
        .caption(title, ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(80)
        .build_cartesian_2d(x.log_scale(), y.log_scale())?;
    chart
        .configure_mesh()
        .x_desc("Services")
        .light_line_style(RGBColor(238, 238, 238))
        .x_label_formatter(&|services| format!("{services:.0}"))
        .y_label_formatter(&|value| show(*value, unit))
        .label_style(("sans-serif", 12))
        .draw()?;
    for (number, line) in lines.iter().enumerate() {
        let colour = if line.is_floor { GREY } else { COLOURS[number % COLOURS.len()] };
        let style = colour.stroke_width(if line.is_floor { 1 } else { 2 });
        let points: Vec<(f64, f64)> = line.points.iter().copied().filter(|point| point.1 > 0.0).collect();
        chart
            .draw_series(LineSeries::new(points.iter().copied(), style).point_size(3))?
            .label(line.name.as_str())
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], style));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE.mix(0.85))
        .label_font(("sans-serif", 12))
        .draw()?;
    area.present()?;
    Ok(())
}
