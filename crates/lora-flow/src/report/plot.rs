//! The plots of the report, as SVG that stands in the page.
//!
//! Text and grid are drawn in two marker colours that the page's style sheet replaces, so that one
//! picture serves the light and the dark page.

use std::ops::Range;

use lora_flow_core::{Error, Result};
use plotters::prelude::*;

/// Replaced by the page's text colour.
const TEXT: RGBColor = RGBColor(1, 1, 1);
/// Replaced by the page's colour of fine lines.
const GRID: RGBColor = RGBColor(2, 2, 2);
/// Colours of the series; each is legible on white and on black.
const SERIES: [RGBColor; 6] = [
    RGBColor(47, 126, 216),
    RGBColor(216, 107, 32),
    RGBColor(42, 157, 98),
    RGBColor(176, 84, 196),
    RGBColor(200, 62, 77),
    RGBColor(130, 130, 60),
];

const WIDTH: u32 = 480;
const FONT: (&str, u32) = ("sans-serif", 13);

/// A named curve.
#[derive(Debug)]
pub struct Series {
    pub name: String,
    /// Points (x, y) in the order of x; those that are not finite are left out.
    pub points: Vec<(f64, f64)>,
}

/// A value with the interval around it.
#[derive(Debug)]
pub struct Interval {
    pub name: String,
    pub value: f64,
    /// Half the width of the interval, if one is known.
    pub half: Option<f64>,
}

/// Curves over a common x axis, with a legend where there are several.
///
/// # Errors
/// When no point is finite, or the drawing fails.
pub fn lines(x_label: &str, y_label: &str, series: &[Series]) -> Result<String> {
    let finite = |p: &&(f64, f64)| p.0.is_finite() && p.1.is_finite();
    let all: Vec<(f64, f64)> =
        series.iter().flat_map(|s| s.points.iter().filter(finite)).copied().collect();
    let x = span(all.iter().map(|p| p.0), 0.0);
    let y = span(all.iter().map(|p| p.1), 0.05);
    let (Some(x), Some(y)) = (x, y) else {
        return Err(Error::new(format!("`{y_label}` has no finite point to draw")));
    };
    draw(220, |root| {
        let mut chart = ChartBuilder::on(root)
            .margin(8)
            .margin_right(20)
            .x_label_area_size(38)
            .y_label_area_size(62)
            .build_cartesian_2d(x, y.clone())?;
        chart
            .configure_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(GRID)
            .axis_style(GRID)
            .x_labels(6)
            .y_labels(6)
            .x_desc(x_label)
            .y_desc(y_label)
            .label_style(FONT.into_font().color(&TEXT))
            .y_label_formatter(&|v| axis_number(*v, y.end - y.start))
            .x_label_formatter(&|v| axis_number(*v, 10.0))
            .draw()?;
        for (i, s) in series.iter().enumerate() {
            let color = SERIES[i % SERIES.len()];
            let points: Vec<_> = s.points.iter().filter(finite).copied().collect();
            if let [one] = points[..] {
                chart.draw_series([Circle::new(one, 4, color.filled())])?;
            }
            let drawn = chart.draw_series(LineSeries::new(points, color.stroke_width(2)))?;
            if series.len() > 1 {
                drawn.label(&s.name).legend(move |(x, y)| {
                    PathElement::new([(x, y), (x + 16, y)], color.stroke_width(2))
                });
            }
        }
        if series.len() > 1 {
            chart
                .configure_series_labels()
                .position(SeriesLabelPosition::UpperRight)
                .border_style(GRID)
                .label_font(FONT.into_font().color(&TEXT))
                .draw()?;
        }
        Ok(())
    })
}

/// Counts of whole numbers in ranges `from..=to`.
///
/// # Errors
/// When there is no range, or the drawing fails.
pub fn bars(x_label: &str, y_label: &str, bars: &[(u32, u32, u64)]) -> Result<String> {
    let (Some(first), Some(last)) = (bars.first(), bars.last()) else {
        return Err(Error::new(format!("`{x_label}` has no bar to draw")));
    };
    let x = f64::from(first.0) - 0.5..f64::from(last.1) + 0.5;
    let highest = bars.iter().map(|b| b.2).max().unwrap_or(0).max(1) as f64;
    draw(220, |root| {
        let mut chart = ChartBuilder::on(root)
            .margin(8)
            .margin_right(20)
            .x_label_area_size(38)
            .y_label_area_size(62)
            .build_cartesian_2d(x, 0.0..highest * 1.05)?;
        chart
            .configure_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(GRID)
            .axis_style(GRID)
            .disable_x_mesh()
            .x_labels(6)
            .y_labels(6)
            .x_desc(x_label)
            .y_desc(y_label)
            .label_style(FONT.into_font().color(&TEXT))
            .y_label_formatter(&|v| axis_number(*v, highest))
            .x_label_formatter(&|v| axis_number(*v, 100.0))
            .draw()?;
        chart.draw_series(bars.iter().map(|&(from, to, count)| {
            let (from, to) = (f64::from(from) - 0.5, f64::from(to) + 0.5);
            let gap = 0.06 * (to - from);
            let corners = [(from + gap, count as f64), (to - gap, 0.0)];
            Rectangle::new(corners, SERIES[0].filled())
        }))?;
        Ok(())
    })
}

/// One dot with its interval a line, from top to bottom.
///
/// # Errors
/// When no value is finite, or the drawing fails.
pub fn intervals(x_label: &str, rows: &[Interval]) -> Result<String> {
    let ends = rows.iter().flat_map(|r| {
        let half = r.half.filter(|h| h.is_finite()).unwrap_or(0.0);
        [r.value - half, r.value + half]
    });
    let Some(x) = span(ends, 0.08) else {
        return Err(Error::new(format!("`{x_label}` has no finite value to draw")));
    };
    let count = rows.len() as i32;
    let widest = rows.iter().map(|r| r.name.chars().count()).max().unwrap_or(0) as u32;
    draw(60 + 28 * rows.len() as u32, |root| {
        let y = (-0.6)..(f64::from(count) - 0.4);
        let mut chart = ChartBuilder::on(root)
            .margin(8)
            .margin_right(20)
            .x_label_area_size(38)
            .y_label_area_size((widest * 8 + 14).min(WIDTH / 3))
            .build_cartesian_2d(x.clone(), y)?;
        // Row labels stand at whole numbers; the first row is on top.
        let name = |v: &f64| {
            let row = f64::from(count - 1) - v;
            let at = row.round();
            let whole = (row - at).abs() < 1e-6 && at >= 0.0;
            if whole {
                rows.get(at as usize).map_or_else(String::new, |r| r.name.clone())
            } else {
                String::new()
            }
        };
        chart
            .configure_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(GRID)
            .axis_style(GRID)
            .disable_y_mesh()
            .x_labels(6)
            .y_labels(rows.len() + 1)
            .x_desc(x_label)
            .label_style(FONT.into_font().color(&TEXT))
            .x_label_formatter(&|v| axis_number(*v, x.end - x.start))
            .y_label_formatter(&name)
            .draw()?;
        for (i, row) in rows.iter().enumerate().filter(|(_, r)| r.value.is_finite()) {
            let y = f64::from(count - 1 - i as i32);
            let color = SERIES[i % SERIES.len()];
            if let Some(half) = row.half.filter(|h| h.is_finite()) {
                let ends = [(row.value - half, y), (row.value + half, y)];
                chart.draw_series(LineSeries::new(ends, color.stroke_width(3)))?;
            }
            chart.draw_series([Circle::new((row.value, y), 5, color.filled())])?;
        }
        Ok(())
    })
}

type Root<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;
type Drawn = std::result::Result<(), Box<dyn std::error::Error>>;

/// An SVG of the page's width, scaled by the page.
fn draw(height: u32, picture: impl FnOnce(&Root<'_>) -> Drawn) -> Result<String> {
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, (WIDTH, height)).into_drawing_area();
        picture(&root).and_then(|()| Ok(root.present()?)).map_err(|e| Error::new(e.to_string()))?;
    }
    // The page gives the size; the view box keeps the proportions.
    let size = format!("width=\"{WIDTH}\" height=\"{height}\"");
    Ok(svg.replacen(&size, "role=\"img\"", 1))
}

/// The range of finite values, widened by a share of it on both sides; never empty.
fn span(values: impl Iterator<Item = f64>, margin: f64) -> Option<Range<f64>> {
    let (mut least, mut most) = (f64::INFINITY, f64::NEG_INFINITY);
    for v in values.filter(|v| v.is_finite()) {
        (least, most) = (least.min(v), most.max(v));
    }
    if least > most {
        return None;
    }
    let width = most - least;
    let pad = if width > 0.0 { width * margin } else { least.abs().max(1.0) * 0.1 };
    Some(least - pad..most + pad)
}

/// A number on an axis, with the digits that tell its neighbours apart.
fn axis_number(v: f64, width: f64) -> String {
    let size = v.abs().max(width.abs());
    if v == 0.0 {
        return "0".to_owned();
    }
    if !(1e-3..1e7).contains(&size) {
        return format!("{v:.1e}");
    }
    let decimals = (2.0 - width.abs().max(1e-9).log10().floor()).clamp(0.0, 6.0) as usize;
    let text = format!("{v:.decimals$}");
    match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plot_shows_its_series_and_leaves_out_what_is_not_finite() {
        let series = |name: &str, points: &[(f64, f64)]| Series {
            name: name.to_owned(),
            points: points.to_vec(),
        };
        let svg = lines(
            "step",
            "loss",
            &[
                series("a<b", &[(1.0, 3.0), (2.0, f64::NAN), (3.0, 1.0)]),
                series("c", &[(1.0, 2.0), (3.0, 2.5)]),
            ],
        )
        .unwrap();
        assert!(svg.starts_with("<svg"), "{svg}");
        assert!(svg.contains("a&lt;b") && !svg.contains("NaN"), "{svg}");
        assert_eq!(svg.matches("stroke=\"#2F7ED8\"").count(), 2, "{svg}");
        assert!(lines("x", "y", &[series("a", &[(1.0, f64::NAN)])]).is_err());
    }

    #[test]
    fn an_interval_without_a_width_is_a_dot() {
        let row = |name: &str, value, half| Interval { name: name.to_owned(), value, half };
        let svg =
            intervals("acc", &[row("base", 0.5, Some(0.1)), row("tuned", 0.7, None)]).unwrap();
        assert_eq!(svg.matches("<circle").count(), 2, "{svg}");
        assert!(svg.contains(">\nbase\n<") && svg.contains(">\ntuned\n<"), "{svg}");
    }

    #[test]
    fn a_histogram_has_a_bar_for_each_range() {
        let svg = bars("tokens", "documents", &[(1, 4, 2), (5, 8, 1), (9, 12, 4)]).unwrap();
        assert_eq!(svg.matches("fill=\"#2F7ED8\"").count(), 3, "{svg}");
        assert!(bars("tokens", "documents", &[]).is_err());
    }

    #[test]
    fn axis_numbers_are_as_long_as_needed() {
        assert_eq!(axis_number(0.25, 0.5), "0.25");
        assert_eq!(axis_number(20000.0, 40000.0), "20000");
        assert_eq!(axis_number(2e-5, 1e-4), "2.0e-5");
        assert_eq!(axis_number(1.5, 3.0), "1.5");
    }
}
