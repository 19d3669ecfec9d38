//! Two plots as SVG: what quality costs, and what time a length costs.

use std::error::Error;
use std::path::Path;

use plotters::prelude::*;

use super::rows::{Results, first_token, quality};
use super::stats::Estimate;
use crate::exit::{Failure, RUN_TIME};
use crate::files;
use crate::variant::Variant;

const SIZE: (u32, u32) = (760, 480);

/// A named line, or points of one colour: x, y and the interval of y.
struct Series {
    name: String,
    points: Vec<(f64, Estimate)>,
}

struct Chart {
    file: &'static str,
    title: &'static str,
    x: &'static str,
    y: &'static str,
    x_range: (f64, f64),
    y_range: (f64, f64),
}

/// Writes both plots into a folder.
pub(crate) fn write(
    dir: &Path,
    results: &Results,
    variants: &[Variant],
    lens: &[usize],
) -> Result<(), Failure> {
    let by_len = |&len: &usize| Series {
        name: format!("{len} tokens"),
        points: (0..variants.len()).filter_map(|v| quality(results, v, len)).collect(),
    };
    let chart = Chart {
        file: "quality-share.svg",
        title: "Quality against work",
        x: "share of (token, layer) pairs of the prompt that were computed",
        y: "mean score of all tasks",
        x_range: (0.0, 1.05),
        y_range: (0.0, 1.0),
    };
    draw(dir, &chart, lens.iter().map(by_len).collect())?;

    #[allow(clippy::cast_precision_loss)] // lengths
    let by_variant = |(idx, variant): (usize, &Variant)| Series {
        name: variant.name.clone(),
        points: lens
            .iter()
            .filter_map(|&len| Some((len as f64, first_token(results, idx, len)?)))
            .collect(),
    };
    let series: Vec<Series> = variants.iter().enumerate().map(by_variant).collect();
    let points = || series.iter().flat_map(|s| &s.points);
    let chart = Chart {
        file: "ttft-length.svg",
        title: "Time to first token",
        x: "tokens of the prompt",
        y: "milliseconds",
        x_range: (0.0, points().map(|(x, _)| *x).fold(1.0, f64::max) * 1.05),
        y_range: (0.0, points().map(|(_, e)| e.mean.max(e.hi)).fold(1.0, f64::max) * 1.05),
    };
    draw(dir, &chart, series)
}

fn draw(dir: &Path, chart: &Chart, series: Vec<Series>) -> Result<(), Failure> {
    let path = dir.join(chart.file);
    let svg = svg(chart, series)
        .map_err(|e| Failure::new(RUN_TIME, format!("{}: cannot draw: {e}", path.display())))?;
    files::write(files::create(&path)?, &svg)
}

fn svg(chart: &Chart, series: Vec<Series>) -> Result<String, Box<dyn Error>> {
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        area.fill(&WHITE)?;
        let (x, y) = (chart.x_range, chart.y_range);
        let mut axes = ChartBuilder::on(&area)
            .caption(chart.title, ("sans-serif", 20))
            .margin(14)
            .x_label_area_size(46)
            .y_label_area_size(64)
            .build_cartesian_2d(x.0..x.1, y.0..y.1)?;
        axes.configure_mesh()
            .light_line_style(TRANSPARENT)
            .x_desc(chart.x)
            .y_desc(chart.y)
            .label_style(("sans-serif", 13))
            .draw()?;
        for (idx, series) in series.into_iter().enumerate() {
            let color = Palette99::pick(idx).to_rgba();
            let mut points = series.points;
            points.sort_by(|a, b| a.0.total_cmp(&b.0));
            axes.draw_series(LineSeries::new(points.iter().map(|(x, e)| (*x, e.mean)), &color))?
                .label(series.name)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], color));
            axes.draw_series(
                points.iter().map(|(x, e)| Circle::new((*x, e.mean), 4, color.filled())),
            )?;
            let bars = points.iter().filter(|(_, e)| e.lo.is_finite());
            axes.draw_series(bars.map(|(x, e)| PathElement::new([(*x, e.lo), (*x, e.hi)], color)))?;
        }
        axes.configure_series_labels()
            .position(SeriesLabelPosition::LowerRight)
            .label_font(("sans-serif", 13))
            .background_style(WHITE.mix(0.8))
            .border_style(BLACK.mix(0.3))
            .draw()?;
        area.present()?;
    }
    Ok(svg)
}
