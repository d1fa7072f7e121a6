//! What a figure is made of, and the two ways to write it: as SVG and as PNG.

use std::fmt::Write;

use tiny_skia::{Color, FillRule, LineCap, LineJoin, Paint, Path, PathBuilder, Pixmap, Stroke as Pen, Transform};
use ttf_parser::{Face, OutlineBuilder};
use xvlm::Picture;

use crate::draw;
use crate::output::escape;

/// Pixels of a PNG for one unit of a figure.
const SCALE: f32 = 2.0;

/// What something is drawn with: a class in an SVG, so that the style sheet of a page can say otherwise, and a colour.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ink {
    /// What is below everything.
    Ground,
    /// Lines to read values by.
    Grid,
    /// Titles.
    Text,
    /// Labels.
    Label,
    /// The values of the curve of this number.
    Raw(usize),
    /// Their running mean.
    Curve(usize),
}

impl Ink {
    fn class(self) -> String {
        match self {
            Self::Ground => "ground".to_owned(),
            Self::Grid => "grid".to_owned(),
            Self::Text => "title".to_owned(),
            Self::Label => "label".to_owned(),
            Self::Raw(i) => format!("raw run{i}"),
            Self::Curve(i) => format!("curve run{i}"),
        }
    }

    fn rgb(self) -> [u8; 3] {
        match self {
            Self::Ground => [255; 3],
            Self::Grid => [227, 224, 218],
            Self::Text => [28, 27, 26],
            Self::Label => [94, 91, 87],
            // The first is blue, as the page's.
            Self::Raw(i) | Self::Curve(i) => draw::colour(i + 1),
        }
    }

    fn opacity(self) -> f32 {
        if let Self::Raw(_) = self { 0.3 } else { 1.0 }
    }

    /// Of lines.
    fn width(self) -> f32 {
        if let Self::Curve(_) = self { 1.6 } else { 1.0 }
    }

    /// Radius of the circle that a dot is drawn around with, so that its line covers its middle.
    fn dot(self) -> f32 {
        self.width() / 2.0
    }
}

/// Where a text has the point it is placed at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Anchor {
    Start,
    Middle,
    End,
}

/// One thing in a figure; places are units from the upper left corner.
#[derive(Clone, Debug)]
pub(crate) enum Shape {
    /// Lines from point to point; a dot, if there is one point.
    Line { points: Vec<(f64, f64)>, ink: Ink },
    /// A text on a base line.
    Text { at: (f64, f64), anchor: Anchor, size: f64, ink: Ink, text: String },
}

/// A figure.
#[derive(Clone, Debug)]
pub(crate) struct Scene {
    pub(crate) width: f64,
    pub(crate) height: f64,
    pub(crate) shapes: Vec<Shape>,
    /// What it is, for those who do not see it.
    pub(crate) label: String,
}

impl Scene {
    pub(crate) fn line(&mut self, ink: Ink, points: impl Into<Vec<(f64, f64)>>) {
        self.shapes.push(Shape::Line { points: points.into(), ink });
    }

    pub(crate) fn text(&mut self, ink: Ink, size: f64, anchor: Anchor, at: (f64, f64), text: impl Into<String>) {
        self.shapes.push(Shape::Text { at, anchor, size, ink, text: text.into() });
    }

    /// As an SVG element. Colours are attributes, over which any style sheet wins.
    pub(crate) fn svg(&self) -> String {
        let Self { width, height, .. } = self;
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" role=\"img\" aria-label=\"{}\" \
             font-family=\"Ubuntu, system-ui, sans-serif\"><rect class=\"ground\" width=\"{width}\" height=\"{height}\" \
             fill=\"{}\"/>",
            escape(&self.label),
            hex(Ink::Ground),
        );
        for shape in &self.shapes {
            let _ = match shape {
                Shape::Line { points, ink } => {
                    let opacity =
                        if ink.opacity() < 1.0 { format!(" opacity=\"{}\"", ink.opacity()) } else { String::new() };
                    let (class, colour, width) = (ink.class(), hex(*ink), ink.width());
                    let style = format!(
                        "class=\"{class}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"{width}\"{opacity}"
                    );
                    match points.as_slice() {
                        [(x, y)] => write!(svg, "<circle {style} cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"{}\"/>", ink.dot()),
                        points => {
                            let points: Vec<String> = points.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
                            let points = points.join(" ");
                            write!(
                                svg,
                                "<polyline {style} stroke-linejoin=\"round\" stroke-linecap=\"round\" \
                                 points=\"{points}\"/>"
                            )
                        }
                    }
                }
                Shape::Text { at: (x, y), anchor, size, ink, text } => {
                    let anchor = match anchor {
                        Anchor::Start => "",
                        Anchor::Middle => " text-anchor=\"middle\"",
                        Anchor::End => " text-anchor=\"end\"",
                    };
                    let (class, fill, text) = (ink.class(), hex(*ink), escape(text));
                    write!(
                        svg,
                        "<text class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\" font-size=\"{size}\"{anchor} \
                         fill=\"{fill}\">{text}</text>"
                    )
                }
            };
        }
        svg + "</svg>"
    }

    /// As a picture of twice as many pixels as units; none if they are more than there can be.
    pub(crate) fn picture(&self) -> Option<Picture> {
        let [width, height] = [self.width, self.height].map(|length| (length as f32 * SCALE).ceil() as u32);
        let mut pixels = Pixmap::new(width, height)?;
        let [r, g, b] = Ink::Ground.rgb();
        pixels.fill(Color::from_rgba8(r, g, b, 255));
        let scale = Transform::from_scale(SCALE, SCALE);
        let font = font();
        for shape in &self.shapes {
            match shape {
                Shape::Line { points, ink } => {
                    let pen = Pen {
                        width: ink.width(),
                        line_cap: LineCap::Round,
                        line_join: LineJoin::Round,
                        ..Pen::default()
                    };
                    if let Some(path) = path(points, ink.dot()) {
                        pixels.stroke_path(&path, &paint(*ink), &pen, scale, None);
                    }
                }
                Shape::Text { at, anchor, size, ink, text } => {
                    let Some(outlines) = font.as_ref().and_then(|font| outlines(font, *at, *anchor, *size, text))
                    else {
                        continue;
                    };
                    let ink = paint(*ink);
                    pixels.fill_path(&outlines, &ink, FillRule::Winding, scale, None);
                    // The font is a light one; on a screen it needs some more.
                    let pen = Pen { width: 0.03 * *size as f32, ..Pen::default() };
                    pixels.stroke_path(&outlines, &ink, &pen, scale, None);
                }
            }
        }
        // The ground is opaque, and so is everything.
        let rgb = pixels.pixels().iter().flat_map(|pixel| [pixel.red(), pixel.green(), pixel.blue()]).collect();
        Picture::from_rgb(width, height, rgb)
    }
}

fn hex(ink: Ink) -> String {
    let [r, g, b] = ink.rgb();
    format!("#{r:02x}{g:02x}{b:02x}")
}

fn paint(ink: Ink) -> Paint<'static> {
    let ([r, g, b], opacity) = (ink.rgb(), (255.0 * ink.opacity()) as u8);
    let mut paint = Paint { anti_alias: true, ..Paint::default() };
    paint.set_color_rgba8(r, g, b, opacity);
    paint
}

fn path(points: &[(f64, f64)], dot: f32) -> Option<Path> {
    let mut path = PathBuilder::new();
    let (first, rest) = points.split_first()?;
    let (x, y) = (first.0 as f32, first.1 as f32);
    if rest.is_empty() {
        path.push_circle(x, y, dot);
    } else {
        path.move_to(x, y);
        rest.iter().for_each(|&(x, y)| path.line_to(x as f32, y as f32));
    }
    path.finish()
}

/// The font of figures.
fn font() -> Option<Face<'static>> {
    Face::parse(epaint_default_fonts::UBUNTU_LIGHT, 0).ok()
}

/// Width of a text.
pub(crate) fn text_width(text: &str, size: f64) -> f64 {
    font().map_or(0.0, |font| width(&font, size, text))
}

fn width(font: &Face, size: f64, text: &str) -> f64 {
    let advance = |c| f64::from(font.glyph_index(c).and_then(|glyph| font.glyph_hor_advance(glyph)).unwrap_or(0));
    text.chars().map(advance).sum::<f64>() * size / f64::from(font.units_per_em())
}

/// The letters of a text; a letter that the font lacks is left out.
fn outlines(font: &Face, (x, y): (f64, f64), anchor: Anchor, size: f64, text: &str) -> Option<Path> {
    let scale = size as f32 / f32::from(font.units_per_em());
    let before = match anchor {
        Anchor::Start => 0.0,
        Anchor::Middle => width(font, size, text) / 2.0,
        Anchor::End => width(font, size, text),
    };
    let mut pen = GlyphPen { path: PathBuilder::new(), x: (x - before) as f32, y: y as f32, scale };
    for glyph in text.chars().filter_map(|c| font.glyph_index(c)) {
        font.outline_glyph(glyph, &mut pen);
        pen.x += f32::from(font.glyph_hor_advance(glyph).unwrap_or(0)) * scale;
    }
    pen.path.finish()
}

/// Puts a glyph, whose y goes up, where it belongs.
struct GlyphPen {
    path: PathBuilder,
    x: f32,
    y: f32,
    scale: f32,
}

impl GlyphPen {
    fn at(&self, x: f32, y: f32) -> (f32, f32) {
        (self.x + x * self.scale, self.y - y * self.scale)
    }
}

impl OutlineBuilder for GlyphPen {
    fn move_to(&mut self, x: f32, y: f32) {
        let (x, y) = self.at(x, y);
        self.path.move_to(x, y);
    }

    fn line_to(&mut self, x: f32, y: f32) {
        let (x, y) = self.at(x, y);
        self.path.line_to(x, y);
    }

    fn quad_to(&mut self, x1: f32, y1: f32, x: f32, y: f32) {
        let ((x1, y1), (x, y)) = (self.at(x1, y1), self.at(x, y));
        self.path.quad_to(x1, y1, x, y);
    }

    fn curve_to(&mut self, x1: f32, y1: f32, x2: f32, y2: f32, x: f32, y: f32) {
        let ((x1, y1), (x2, y2), (x, y)) = (self.at(x1, y1), self.at(x2, y2), self.at(x, y));
        self.path.cubic_to(x1, y1, x2, y2, x, y);
    }

    fn close(&mut self) {
        self.path.close();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scene() -> Scene {
        let mut scene = Scene { width: 60.0, height: 20.0, shapes: Vec::new(), label: "a & b".to_owned() };
        scene.line(Ink::Curve(0), [(5.0, 10.0), (25.0, 10.0)]);
        scene.text(Ink::Text, 12.0, Anchor::End, (58.0, 15.0), "l < 1");
        scene
    }

    #[test]
    fn a_picture_shows_lines_and_letters() {
        let picture = scene().picture().unwrap();
        assert_eq!((picture.width(), picture.height()), (120, 40));
        let pixel = |x: usize, y: usize| picture.rgb()[3 * (y * 120 + x)..][..3].to_vec();
        assert_eq!(pixel(30, 20), draw::colour(1), "on the line");
        assert_eq!(pixel(30, 30), [255; 3], "below it");
        let dark = |columns: std::ops::Range<usize>| {
            columns.flat_map(|x| (0..40).map(move |y| (x, y))).filter(|&(x, y)| pixel(x, y)[0] < 128).count()
        };
        let width = 2.0 * text_width("l < 1", 12.0);
        assert!(width > 30.0 && width < 60.0, "{width}");
        assert!(dark(116 - width as usize..120) > 50, "letters end where they are anchored");
        assert_eq!(dark(60..116 - width as usize), 0);
    }

    #[test]
    fn a_point_is_a_dot() {
        let mut scene = Scene { shapes: Vec::new(), ..scene() };
        scene.line(Ink::Curve(0), [(25.0, 10.0)]);
        let svg = scene.svg();
        assert!(svg.contains("<circle") && svg.contains("cx=\"25.0\" cy=\"10.0\" r=\"0.8\"/>"), "{svg}");
        assert!(!svg.contains("<polyline"), "{svg}");
        let picture = scene.picture().unwrap();
        let pixel = |x: usize, y: usize| picture.rgb()[3 * (y * 120 + x)..][..3].to_vec();
        assert_eq!((pixel(50, 20), pixel(50, 26)), (draw::colour(1).to_vec(), vec![255; 3]));
    }

    #[test]
    fn an_svg_keeps_texts_as_they_are() {
        let svg = scene().svg();
        assert!(svg.contains("l &lt; 1</text>") && svg.contains("aria-label=\"a &amp; b\""), "{svg}");
        assert!(svg.contains("points=\"5.0,10.0 25.0,10.0\""), "{svg}");
    }
}
