//! A chart with two logarithmic axes, as SVG.

use std::fmt::Write;

/// What is drawn in one colour.
pub(crate) struct Series {
    pub(crate) name: String,
    pub(crate) dots: Vec<(f64, f64)>,
    pub(crate) line: Vec<(f64, f64)>,
}

pub(crate) struct Chart<'a> {
    pub(crate) title: &'a str,
    pub(crate) x: &'a str,
    pub(crate) y: &'a str,
    pub(crate) series: &'a [Series],
}

const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 480.0;
/// Left, right, top and bottom of the field.
const FIELD: [f64; 4] = [64.0, 650.0, 40.0, 430.0];
/// Colours that the colour-blind tell apart (Tol's "bright").
const COLOURS: [&str; 7] = ["#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#777777"];

/// One axis: the numbers at its ends, and where these are.
struct Axis {
    numbers: [f64; 2],
    places: [f64; 2],
}

impl Axis {
    fn over(numbers: impl Iterator<Item = f64>, places: [f64; 2]) -> Self {
        /// Free on either side.
        const ROOM: f64 = 1.25;
        let (least, most) = numbers.fold((f64::INFINITY, 0.0f64), |(least, most), n| (least.min(n), most.max(n)));
        Self { numbers: [least / ROOM, most * ROOM], places }
    }

    fn place(&self, number: f64) -> f64 {
        let [first, last] = self.places;
        let [least, most] = self.numbers.map(f64::ln);
        first + (number.ln() - least) / (most - least) * (last - first)
    }

    /// Powers of a number, within the axis.
    fn marks(&self, base: f64) -> impl Iterator<Item = f64> {
        let [least, most] = self.numbers;
        let power = move |number: f64| number.ln() / base.ln();
        (power(least).ceil() as i32..=power(most).floor() as i32).map(move |exponent| base.powi(exponent))
    }
}

impl Chart<'_> {
    pub(crate) fn to_svg(&self) -> String {
        let mut out = String::new();
        // Writing to a string does not fail.
        let _ = self.draw(&mut out);
        out
    }

    fn draw(&self, out: &mut String) -> std::fmt::Result {
        let [left, right, top, bottom] = FIELD;
        let points = || self.series.iter().flat_map(|series| series.dots.iter().chain(&series.line));
        let x = Axis::over(points().map(|(x, _)| *x), [left, right]);
        let y = Axis::over(points().map(|(_, y)| *y), [bottom, top]);
        writeln!(
            out,
            r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="13" fill="#222">
<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>
<text x="{left}" y="22" font-size="14">{}</text>"##,
            self.title
        )?;
        for mark in x.marks(4.0) {
            let at = x.place(mark);
            writeln!(out, r##"<path d="M{at:.1} {top}V{bottom}" stroke="#ddd"/>"##)?;
            writeln!(out, r#"<text x="{at:.1}" y="{}" text-anchor="middle">{mark}</text>"#, bottom + 18.0)?;
        }
        for mark in y.marks(10.0) {
            let at = y.place(mark);
            writeln!(out, r##"<path d="M{left} {at:.1}H{right}" stroke="#ddd"/>"##)?;
            writeln!(out, r#"<text x="{}" y="{:.1}" text-anchor="end">{mark}</text>"#, left - 6.0, at + 4.0)?;
        }
        writeln!(
            out,
            r#"<text x="{}" y="{}" text-anchor="middle">{}</text>"#,
            (left + right) / 2.0,
            bottom + 40.0,
            self.x
        )?;
        let middle = (top + bottom) / 2.0;
        writeln!(
            out,
            r#"<text transform="translate(18 {middle}) rotate(-90)" text-anchor="middle">{}</text>"#,
            self.y
        )?;
        for (i, series) in self.series.iter().enumerate() {
            let colour = COLOURS[i % COLOURS.len()];
            let corners: Vec<String> =
                series.line.iter().map(|&(a, b)| format!("{:.1},{:.1}", x.place(a), y.place(b))).collect();
            writeln!(out, r#"<polyline points="{}" fill="none" stroke="{colour}"/>"#, corners.join(" "))?;
            for &(a, b) in &series.dots {
                writeln!(out, r#"<circle cx="{:.1}" cy="{:.1}" r="4" fill="{colour}"/>"#, x.place(a), y.place(b))?;
            }
            let at = top + 12.0 + 20.0 * i as f64;
            writeln!(out, r#"<circle cx="{}" cy="{}" r="4" fill="{colour}"/>"#, right + 16.0, at - 4.0)?;
            writeln!(out, r#"<text x="{}" y="{at}">{}</text>"#, right + 26.0, series.name)?;
        }
        writeln!(out, "</svg>")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_ratios_are_equally_far_apart() {
        let axis = Axis::over([1.0, 64.0].into_iter(), [0.0, 100.0]);
        let step = |a: f64, b: f64| axis.place(b) - axis.place(a);
        assert!((step(1.0, 8.0) - step(8.0, 64.0)).abs() < 1e-9);
        assert_eq!(axis.marks(4.0).collect::<Vec<_>>(), [1.0, 4.0, 16.0, 64.0]);
    }
}
