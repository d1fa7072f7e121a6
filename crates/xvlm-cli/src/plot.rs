//! Loss curves as SVG, to stand in a page whose style sheet has the classes `axis`, `curve` and `raw`.

use std::fmt::Write;

use xvlm::train::LossCurve;

const WIDTH: f64 = 300.0;
const HEIGHT: f64 = 150.0;
/// Room for the labels of the axes: left, top, right, bottom.
const MARGIN: [f64; 4] = [44.0, 10.0, 8.0, 20.0];

/// A small plot of one loss over the iterations: every value, and over it a running mean.
pub(crate) fn curve(curve: &LossCurve) -> String {
    let points: Vec<(f64, f64)> = curve.points.iter().map(|&(iteration, loss)| (iteration as f64, loss)).collect();
    let [left, top, right, bottom] = MARGIN;
    let last = points.last().map_or(1.0, |point| point.0).max(1.0);
    let range = points.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), p| (low.min(p.1), high.max(p.1)));
    let (low, high) = if range.0 < range.1 { range } else { (0.0, range.1.max(1.0)) };
    let x = |iteration: f64| left + iteration / last * (WIDTH - left - right);
    let y = |loss: f64| top + (high - loss) / (high - low) * (HEIGHT - top - bottom);
    let line = |class: &str, points: &[(f64, f64)]| {
        let at = |&(iteration, loss): &(f64, f64)| format!("{:.1},{:.1}", x(iteration), y(loss));
        let points: Vec<String> = points.iter().map(at).collect();
        format!("<polyline class=\"{class}\" points=\"{}\"/>", points.join(" "))
    };

    let mut svg = format!("<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"loss {}\">", curve.name);
    let (x0, x1, y0, y1) = (left, WIDTH - right, HEIGHT - bottom, top);
    for loss in [low, (low + high) / 2.0, high] {
        let at = y(loss);
        let _ = write!(svg, "<line class=\"axis\" x1=\"{x0}\" x2=\"{x1}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/>");
        let _ = write!(svg, "<text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{loss:.2}</text>", x0 - 6.0, at + 3.5);
    }
    let _ = write!(svg, "<line class=\"axis\" x1=\"{x0}\" x2=\"{x0}\" y1=\"{y0}\" y2=\"{y1}\"/>");
    for (iteration, anchor) in [(0.0, "start"), (last, "end")] {
        let (at, below) = (x(iteration), HEIGHT - 5.0);
        let _ = write!(svg, "<text x=\"{at:.1}\" y=\"{below}\" text-anchor=\"{anchor}\">{iteration:.0}</text>");
    }
    svg + &line("raw", &points) + &line("curve", &smooth(&points)) + "</svg>"
}

/// Running mean over about a twentieth of the points.
fn smooth(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let reach = points.len() / 40;
    let mean = |i: usize| {
        let near = &points[i.saturating_sub(reach)..(i + reach + 1).min(points.len())];
        near.iter().map(|point| point.1).sum::<f64>() / near.len() as f64
    };
    (0..points.len()).map(|i| (points[i].0, mean(i))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plots_have_no_strange_numbers() {
        let curves: [&[(u64, f64)]; 4] = [&[], &[(5, 0.0)], &[(1, 2.0), (2, 2.0)], &[(50, 4.0), (100, 1.0)]];
        for points in curves {
            let svg = curve(&LossCurve { name: "itc".to_owned(), points: points.to_vec() });
            assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        }
    }

    #[test]
    fn the_lowest_loss_is_lowest() {
        let svg = curve(&LossCurve { name: "itc".to_owned(), points: vec![(50, 4.0), (100, 1.0)] });
        assert!(svg.contains("points=\"168.0,10.0 292.0,130.0\""), "{svg}");
    }
}
