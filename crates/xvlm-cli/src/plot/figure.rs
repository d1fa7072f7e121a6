//! Losses over iterations: a panel a loss, a curve a run.

use super::scene::{Anchor, Ink, Scene, text_width};

/// Size of a panel with its labels.
const WIDTH: f64 = 360.0;
const HEIGHT: f64 = 220.0;
/// Room for a panel's title and the labels of its axes: left, top, right, bottom.
const MARGIN: [f64; 4] = [50.0, 32.0, 14.0, 24.0];
/// Room around all panels.
const EDGE: f64 = 10.0;
/// Sizes of letters.
const TITLE: f64 = 13.0;
const LABEL: f64 = 11.0;
/// Height of a line of the legend, and the length of the line that shows a run's colour.
const LEGEND: f64 = 20.0;
const SAMPLE: f64 = 18.0;

/// One loss.
#[derive(Clone, Debug)]
pub(crate) struct Panel {
    pub(crate) title: String,
    /// The points (iteration, loss) of each run; none of a run that does not have the loss.
    pub(crate) curves: Vec<Vec<(f64, f64)>>,
}

/// How curves are shown.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Look {
    /// The share of the iterations that a running mean is taken over; 0 for the values alone.
    pub(crate) smooth: f64,
    /// Whether equal distances are equal ratios.
    pub(crate) log: bool,
}

impl Default for Look {
    fn default() -> Self {
        Self { smooth: 0.05, log: false }
    }
}

/// A figure of several panels, with a legend of the names of the runs.
pub(crate) fn figure(panels: &[Panel], runs: &[String], look: Look) -> Scene {
    let columns = match panels.len() {
        n @ 0..=2 => n.max(1),
        4 => 2,
        3..=9 => 3,
        _ => 4,
    };
    let rows = panels.len().div_ceil(columns);
    let width = 2.0 * EDGE + columns as f64 * WIDTH;
    let mut scene = Scene { width, height: 0.0, shapes: Vec::new(), label: "losses over the iterations".to_owned() };
    let (mut x, mut y) = (EDGE + MARGIN[0], EDGE + 0.5 * LEGEND);
    let most = width - EDGE - x - SAMPLE - 6.0;
    for (i, run) in runs.iter().enumerate() {
        let run = shortened(run, TITLE, most);
        let length = SAMPLE + 6.0 + text_width(&run, TITLE);
        if x + length > width - EDGE && x > EDGE + MARGIN[0] {
            (x, y) = (EDGE + MARGIN[0], y + LEGEND);
        }
        scene.line(Ink::Curve(i), [(x, y), (x + SAMPLE, y)]);
        scene.text(Ink::Text, TITLE, Anchor::Start, (x + SAMPLE + 6.0, y + 4.5), run);
        x += length + 18.0;
    }
    let top = y + 0.5 * LEGEND;
    let last = last_iteration(panels);
    for (i, panel) in panels.iter().enumerate() {
        let at = (EDGE + (i % columns) as f64 * WIDTH, top + (i / columns) as f64 * HEIGHT);
        draw(&mut scene, panel, at, last, look);
        // Below the lowest of its column.
        if i + columns >= panels.len() {
            let middle = at.0 + (MARGIN[0] + WIDTH - MARGIN[2]) / 2.0;
            scene.text(Ink::Label, LABEL, Anchor::Middle, (middle, at.1 + HEIGHT + 8.0), "iterations");
        }
    }
    scene.height = top + rows as f64 * HEIGHT + EDGE + 8.0;
    scene
}

/// A text that is at most so wide, by leaving out what is in its middle.
fn shortened(text: &str, size: f64, width: f64) -> String {
    let letters: Vec<char> = text.chars().collect();
    let with = |kept: usize| -> String {
        let (begin, end) = (&letters[..kept.div_ceil(2)], &letters[letters.len() - kept / 2..]);
        begin.iter().chain(&['…']).chain(end).collect()
    };
    match text_width(text, size) <= width {
        true => text.to_owned(),
        false => (0..letters.len()).rev().map(with).find(|text| text_width(text, size) <= width).unwrap_or_default(),
    }
}

/// A single panel without a legend, and without a title where `panel` has none.
pub(crate) fn single(panel: &Panel, label: String, look: Look) -> Scene {
    let mut scene = Scene { width: WIDTH, height: HEIGHT, shapes: Vec::new(), label };
    draw(&mut scene, panel, (0.0, 0.0), last_iteration(std::slice::from_ref(panel)), look);
    scene
}

fn last_iteration(panels: &[Panel]) -> f64 {
    panels.iter().flat_map(|panel| panel.curves.iter().flatten()).fold(1.0, |last, point| point.0.max(last))
}

/// Draws a panel whose upper left corner is at `(left, top)`.
fn draw(scene: &mut Scene, panel: &Panel, (left, top): (f64, f64), last: f64, look: Look) {
    let (x0, x1) = (left + MARGIN[0], left + WIDTH - MARGIN[2]);
    let (y0, y1) = (top + HEIGHT - MARGIN[3], top + MARGIN[1]);
    let shown = |&(_, loss): &(f64, f64)| loss.is_finite() && (!look.log || loss > 0.0);
    let scaled = |points: &[(f64, f64)]| -> Vec<(f64, f64)> {
        let scale = |loss: f64| if look.log { loss.log10() } else { loss };
        points.iter().filter(|point| shown(point)).map(|&(iteration, loss)| (iteration, scale(loss))).collect()
    };
    let curves: Vec<Vec<(f64, f64)>> = panel.curves.iter().map(|points| scaled(points)).collect();
    let (low, high) = range(curves.iter().flatten().map(|point| point.1));
    let x = |iteration: f64| x0 + iteration / last * (x1 - x0);
    let y = |value: f64| y0 + (value - low) / (high - low) * (y1 - y0);

    scene.text(Ink::Text, TITLE, Anchor::Start, (x0, y1 - 12.0), panel.title.as_str());
    let ticks = if look.log { log_ticks(low, high) } else { ticks(low, high, 5) };
    for (value, label) in ticks {
        scene.line(Ink::Grid, [(x0, y(value)), (x1, y(value))]);
        scene.text(Ink::Label, LABEL, Anchor::End, (x0 - 7.0, y(value) + 4.0), label);
    }
    scene.line(Ink::Grid, [(x0, y1), (x0, y0), (x1, y0)]);
    for (iteration, label) in ticks_of_iterations(last) {
        scene.line(Ink::Grid, [(x(iteration), y0), (x(iteration), y0 + 4.0)]);
        scene.text(Ink::Label, LABEL, Anchor::Middle, (x(iteration), y0 + 16.0), label);
    }
    let to_scene = |points: &[(f64, f64)]| -> Vec<(f64, f64)> {
        thin(&points.iter().map(|&(iteration, value)| (x(iteration), y(value))).collect::<Vec<_>>())
    };
    // Means last: no run's values hide those of another.
    let smooth = look.smooth > 0.0;
    for (i, points) in curves.iter().enumerate().filter(|(_, points)| !points.is_empty()) {
        scene.line(if smooth { Ink::Raw(i) } else { Ink::Curve(i) }, to_scene(points));
    }
    for (i, points) in curves.iter().enumerate().filter(|(_, points)| smooth && !points.is_empty()) {
        scene.line(Ink::Curve(i), to_scene(&running_mean(points, look.smooth * last / 2.0)));
    }
}

/// What an axis goes from and to, so that it has some length.
fn range(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| (low.min(v), high.max(v)));
    if low > high {
        return (0.0, 1.0);
    }
    let length = high - low;
    let margin = if length > 1e-9 * high.abs() { 0.04 * length } else { 0.5 * high.abs().max(1.0) };
    (low - margin, high + margin)
}

/// The distance between ticks, 1, 2 or 5 times a power of ten, that gives at most `most` of them over a length.
fn tick_step(length: f64, most: usize) -> f64 {
    let least = length / most as f64;
    let power = 10f64.powf(least.log10().floor());
    power * [1.0, 2.0, 5.0].into_iter().find(|step| step * power >= least * (1.0 - 1e-9)).unwrap_or(10.0)
}

/// Round numbers from `low` to `high`, as they are written.
fn ticks(low: f64, high: f64, most: usize) -> Vec<(f64, String)> {
    let step = tick_step(high - low, most);
    let decimals = (-step.log10() - 1e-9).ceil().max(0.0) as usize;
    let first = (low / step).ceil() as i64;
    // 0 is written without a sign.
    let tick = |i: i64| (i as f64 * step, format!("{:.decimals$}", i as f64 * step + 0.0));
    (first..).map(tick).take_while(|(value, _)| *value <= high).collect()
}

/// Round numbers of which the logarithms lie from `low` to `high`.
fn log_ticks(low: f64, high: f64) -> Vec<(f64, String)> {
    let label = |value: f64| if (1e-4..1e5).contains(&value) { format!("{value}") } else { format!("{value:.0e}") };
    let within = |digits: &[i32]| -> Vec<(f64, String)> {
        let powers = low.floor() as i32..=high.ceil() as i32;
        let values = powers.flat_map(|power| digits.iter().map(move |&digit| (digit, power)));
        let tick = |(digit, power): (i32, i32)| {
            // Read from its digits, so that it is written with no more of them.
            let value: f64 = format!("{digit}e{power}").parse().unwrap_or(f64::NAN);
            (value.log10(), label(value))
        };
        values.map(tick).filter(|(value, _)| (low..=high).contains(value)).collect()
    };
    match (within(&[1]), within(&[1, 2, 5])) {
        (tens, _) if tens.len() >= 4 => tens,
        (_, some) if some.len() >= 3 => some,
        // Less than a power of ten: even steps of the values themselves.
        _ => ticks(10f64.powf(low), 10f64.powf(high), 5).into_iter().map(|(v, label)| (v.log10(), label)).collect(),
    }
}

fn ticks_of_iterations(last: f64) -> Vec<(f64, String)> {
    let step = tick_step(last, 6).max(1.0);
    let (unit, sign) = match last {
        10_000_000.0.. => (1e6, "M"),
        10_000.0.. => (1e3, "k"),
        _ => (1.0, ""),
    };
    let tick = |i: u32| {
        let at = f64::from(i) * step;
        (at, if i == 0 { "0".to_owned() } else { format!("{}{sign}", at / unit) })
    };
    (0..).map(tick).take_while(|(at, _)| *at <= last).collect()
}

/// For each point the mean of those at most `reach` before and after it.
fn running_mean(points: &[(f64, f64)], reach: f64) -> Vec<(f64, f64)> {
    let (mut first, mut end, mut sum) = (0, 0, 0.0);
    let mean = |&(iteration, _): &(f64, f64)| {
        while let Some(point) = points.get(end).filter(|point| point.0 <= iteration + reach) {
            sum += point.1;
            end += 1;
        }
        while points[first].0 < iteration - reach {
            sum -= points[first].1;
            first += 1;
        }
        (iteration, sum / (end - first) as f64)
    };
    points.iter().map(mean).collect()
}

/// Leaves out points that cannot be told apart: of each half unit along x the first, lowest, highest and last remain.
fn thin(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let mut kept = Vec::new();
    for column in points.chunk_by(|a, b| (2.0 * a.0).floor() == (2.0 * b.0).floor()) {
        let by_height = |a: &&(f64, f64), b: &&(f64, f64)| a.1.total_cmp(&b.1);
        let place = |point: Option<&(f64, f64)>| point.and_then(|point| column.iter().position(|other| other == point));
        let (lowest, highest) = (column.iter().min_by(by_height), column.iter().max_by(by_height));
        let mut places: Vec<usize> =
            [Some(0), place(lowest), place(highest), column.len().checked_sub(1)].into_iter().flatten().collect();
        places.sort_unstable();
        places.dedup();
        kept.extend(places.into_iter().map(|i| column[i]));
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::super::scene::Shape;
    use super::*;

    fn panel(curves: &[&[(f64, f64)]]) -> Panel {
        Panel { title: "itc".to_owned(), curves: curves.iter().map(|points| points.to_vec()).collect() }
    }

    fn lines(scene: &Scene, wanted: Ink) -> Vec<Vec<(f64, f64)>> {
        let line = |shape: &Shape| match shape {
            Shape::Line { points, ink } if *ink == wanted => Some(points.clone()),
            _ => None,
        };
        scene.shapes.iter().filter_map(line).collect()
    }

    fn labels(ticks: Vec<(f64, String)>) -> Vec<String> {
        ticks.into_iter().map(|(_, label)| label).collect()
    }

    #[test]
    fn figures_have_no_strange_numbers() {
        let curves: [&[(f64, f64)]; 6] = [
            &[],
            &[(5.0, 0.0)],
            &[(1.0, 2.0), (2.0, 2.0)],
            &[(50.0, 4.0), (100.0, 1.0)],
            &[(1.0, -1.0)],
            &[(1.0, 1e-9)],
        ];
        for points in curves {
            for log in [false, true] {
                let scene = figure(&[panel(&[points])], &["run".to_owned()], Look { log, ..Look::default() });
                let svg = scene.svg();
                assert!(!svg.contains("NaN") && !svg.contains("inf"), "{points:?}: {svg}");
                scene.picture().unwrap();
            }
        }
    }

    #[test]
    fn the_lowest_loss_is_lowest() {
        let scene = single(&panel(&[&[(50.0, 4.0), (100.0, 1.0)]]), String::new(), Look { smooth: 0.0, log: false });
        let curve = &lines(&scene, Ink::Curve(0))[0];
        assert_eq!((curve[0].0, curve[1].0), (198.0, 346.0), "half way and at the end");
        assert!(curve[0].1 < 42.0 && curve[1].1 > 185.0, "{curve:?}");
    }

    #[test]
    fn ticks_are_round() {
        assert_eq!(labels(ticks(0.13, 2.07, 5)), ["0.5", "1.0", "1.5", "2.0"]);
        assert_eq!(labels(ticks(-0.03, 0.021, 5)), ["-0.02", "0.00", "0.02"]);
        assert_eq!(labels(ticks(0.0, 0.31, 5)), ["0.0", "0.1", "0.2", "0.3"]);
        assert_eq!(labels(ticks(3.0, 1200.0, 5)), ["500", "1000"]);
        assert_eq!(labels(log_ticks(-3.1, 1.2)), ["0.001", "0.01", "0.1", "1", "10"]);
        assert_eq!(labels(log_ticks(0.0, 1.0)), ["1", "2", "5", "10"]);
        assert_eq!(labels(log_ticks(0.31, 0.47)), ["2.2", "2.4", "2.6", "2.8"]);
        assert_eq!(labels(ticks_of_iterations(3.0)), ["0", "1", "2", "3"]);
        assert_eq!(labels(ticks_of_iterations(2600.0)), ["0", "500", "1000", "1500", "2000", "2500"]);
        assert_eq!(labels(ticks_of_iterations(200_000.0)), ["0", "50k", "100k", "150k", "200k"]);
    }

    #[test]
    fn means_are_taken_over_iterations() {
        let points = [(0.0, 1.0), (10.0, 3.0), (20.0, 5.0), (100.0, 9.0)];
        assert_eq!(running_mean(&points, 10.0), [(0.0, 2.0), (10.0, 3.0), (20.0, 4.0), (100.0, 9.0)]);
        assert_eq!(running_mean(&points, 0.0), points);
    }

    #[test]
    fn many_points_keep_their_extremes() {
        let wave = |i: u32| (f64::from(i) / 100.0, (f64::from(i) * 0.7).sin() + if i == 5432 { 9.0 } else { 0.0 });
        let points: Vec<_> = (0..10_000).map(wave).collect();
        let kept = thin(&points);
        assert!(kept.len() <= 4 * 200, "{}", kept.len());
        assert!(kept.contains(&points[5432]) && kept.first() == points.first() && kept.last() == points.last());
        assert!(kept.is_sorted_by(|a, b| a.0 < b.0));
        assert_eq!(thin(&points[..1]), points[..1]);
    }

    #[test]
    fn a_run_has_one_colour_everywhere() {
        let panels = [panel(&[&[(1.0, 1.0)], &[(1.0, 2.0)]]), panel(&[&[], &[(1.0, 2.0)]])];
        let scene = figure(&panels, &["one".to_owned(), "two".to_owned()], Look::default());
        assert_eq!(lines(&scene, Ink::Curve(0)).len(), 1 + 1, "in the legend and the panel that has it");
        assert_eq!(lines(&scene, Ink::Curve(1)).len(), 1 + 2);
        assert_eq!(lines(&scene, Ink::Raw(1)).len(), 2);
    }

    #[test]
    fn long_names_are_shortened_in_the_middle() {
        assert_eq!(shortened("a run", TITLE, 100.0), "a run");
        let name = format!("begin{}end", "-".repeat(200));
        let scene = figure(&[panel(&[&[(1.0, 1.0)]])], &[name], Look::default());
        let of_legend = |shape: &Shape| match shape {
            Shape::Text { text, at, .. } if text.starts_with("begin") => Some((text.clone(), at.0)),
            _ => None,
        };
        let (text, x) = scene.shapes.iter().find_map(of_legend).unwrap();
        assert!(text.contains('…') && text.ends_with("end"), "{text}");
        let end = x + text_width(&text, TITLE);
        assert!(end <= scene.width - EDGE && end > scene.width - EDGE - 2.0 * TITLE, "{end} of {}", scene.width);
    }

    #[test]
    fn long_legends_take_several_lines() {
        let runs: Vec<String> = (0..12).map(|i| format!("a run with a long name {i}")).collect();
        let curves = vec![vec![(1.0, 1.0)]; runs.len()];
        let of = |runs: &[String]| {
            figure(&[Panel { title: "itc".to_owned(), curves: curves.clone() }], runs, Look::default())
        };
        assert!(of(&runs).height > of(&runs[..1]).height + 3.0 * LEGEND);
    }
}
