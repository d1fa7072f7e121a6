//! The page that `xvlm demo` writes: one file, with everything in it.

use std::fmt::Write;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use xvlm::Completion;
use xvlm::train::LossCurve;

use crate::demo::Scores;
use crate::draw;
use crate::output::{Rows, escape};
use crate::plot;

/// What the page shows.
pub(crate) struct Report<'a> {
    /// The scores, and the same as rows of a table.
    pub(crate) scores: &'a Scores,
    pub(crate) rows: Rows,
    /// Time that all answers took.
    pub(crate) seconds: f64,
    /// Pictures like those of training, and with pairs of colour and shape that never occurred there.
    pub(crate) held_out: Vec<Shown>,
    pub(crate) unseen: Vec<Shown>,
    pub(crate) rankings: Vec<Ranking>,
    /// Empty if nothing was trained.
    pub(crate) curves: Vec<LossCurve>,
}

/// A picture and what the model says about it.
pub(crate) struct Shown {
    pub(crate) png: Vec<u8>,
    pub(crate) width: u32,
    pub(crate) height: u32,
    pub(crate) phrases: Vec<Phrase>,
    pub(crate) caption: Option<Caption>,
    pub(crate) questions: Vec<Question>,
    pub(crate) blanks: Vec<Blank>,
}

/// A phrase; boxes are `(x, y, w, h)` in pixels.
pub(crate) struct Phrase {
    pub(crate) text: String,
    pub(crate) found: [f32; 4],
    pub(crate) truth: [f32; 4],
    pub(crate) probability: Option<f32>,
    pub(crate) iou: f32,
}

/// A caption that the model wrote.
pub(crate) struct Caption {
    pub(crate) text: String,
    pub(crate) truth: String,
    /// What was checked, and whether it is right.
    pub(crate) marks: [(&'static str, bool); 3],
}

pub(crate) struct Question {
    pub(crate) question: String,
    pub(crate) answer: String,
    pub(crate) truth: String,
}

pub(crate) struct Blank {
    pub(crate) text: String,
    pub(crate) words: Vec<Completion>,
    pub(crate) truths: Vec<String>,
}

/// A text and the pictures that the model finds for it, best first.
pub(crate) struct Ranking {
    pub(crate) text: String,
    pub(crate) pictures: Vec<Ranked>,
}

pub(crate) struct Ranked {
    pub(crate) png: Vec<u8>,
    pub(crate) probability: f32,
    pub(crate) is_right: bool,
}

/// Words and punctuation, which texts of the built-in world separate by spaces, as people write them.
fn sentence(text: &str) -> String {
    escape(&[",", ".", "?"].iter().fold(text.to_owned(), |text, sign| text.replace(&format!(" {sign}"), sign)))
}

fn data_url(png: &[u8]) -> String {
    format!("data:image/png;base64,{}", STANDARD.encode(png))
}

fn percent(probability: f32) -> String {
    format!("{:.0} %", 100.0 * probability)
}

/// A word in the colour of right or wrong, with a sign for those who do not see colours.
fn mark(right: bool, text: &str) -> String {
    let (class, sign) = if right { ("right", "✓") } else { ("wrong", "✗") };
    format!("<span class=\"{class}\">{} {sign}</span>", escape(text))
}

fn all<T>(items: &[T], html: impl Fn(&T) -> String) -> String {
    items.iter().map(html).collect()
}

impl Report<'_> {
    /// The page.
    pub(crate) fn html(&self) -> String {
        let Scores { model, precision, scenes, unseen_scenes, seed, .. } = self.scores;
        let mut page = format!(
            "<!doctype html>\n<html lang=\"en\">\n<meta charset=\"utf-8\">\n\
             <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
             <title>X-VLM demo</title>\n<style>\n{}{}</style>\n<main>\n",
            include_str!("report.css"),
            highlights(),
        );
        let seconds = self.seconds;
        let _ = write!(
            page,
            "<h1>X-VLM, on pictures it has never seen</h1>\n\
             <p class=\"soft\">Model: {}, in {precision}. {scenes} held-out scenes and {unseen_scenes} with \
             colour–shape pairs that are absent from training, seed {seed}. All answers took {seconds:.0} s. The pictures below are the first of \
             each set, not the best.</p>\n",
            escape(model),
        );
        let _ = writeln!(page, "<ul class=\"tiles\">{}</ul>", all(&self.scores.headlines(), tile));
        page += "<h2>Asked about a picture</h2>\n<p>A solid box is the model's, the dashed one is the truth; ✓ where they \
                 overlap enough (IoU ≥ 0.5). Beside each phrase stands the probability that it matches what is inside \
                 the model's box. Point at a phrase to see its boxes alone.</p>\n";
        let _ = writeln!(page, "<div class=\"cards\">{}</div>", all(&self.held_out, card));
        page += "<h2>Combinations it was never shown</h2>\n<p>Each picture has two objects whose pair of colour and shape \
                 is left out of training: the model has to put together what it knows.</p>\n";
        let _ = writeln!(page, "<div class=\"cards\">{}</div>", all(&self.unseen, card));
        let _ = write!(
            page,
            "<h2>Searching among {scenes} pictures</h2>\n<p>The five best pictures for a text: the nearest by embedding, \
             ranked again by matching. The framed picture is the one that the text was written for.</p>\n{}",
            all(&self.rankings, ranking),
        );
        // A table for each heading.
        let tables = self.rows.chunk_by(|_, next| next.1.is_some());
        let tables: String = tables.map(|rows| format!("<table>{}</table>\n", all(rows, row))).collect();
        let _ = write!(page, "<h2>All scores</h2>\n<div class=\"scores\">{tables}</div>\n");
        if !self.curves.is_empty() {
            let plots = all(&self.curves, |curve| format!("<figure>{}</figure>", plot::curve(curve)));
            let _ = write!(
                page,
                "<h2>How it was trained</h2>\n<p>Each loss over the iterations.</p>\n<div class=\"plots\">{plots}</div>\n"
            );
        }
        page + "</main>\n</html>\n"
    }
}

/// Phrases of a card that can be pointed at.
const POINTED: usize = 6;

/// Rules that leave one box when its phrase is pointed at.
fn highlights() -> String {
    let rule = |i| format!(".card:has(.phrase.p{i}:hover) .box:not(.b{i}) {{ opacity: .08; }}\n");
    (0..POINTED).map(rule).collect()
}

fn tile((name, score): &(&str, f64)) -> String {
    format!("<li><b>{score:.1} %</b><span>{name}</span></li>")
}

fn row((name, value): &(String, Option<String>)) -> String {
    match value {
        Some(value) => format!("<tr><td>{}</td><td>{}</td></tr>", escape(name), escape(value)),
        None => format!("<tr><th colspan=\"2\">{}</th></tr>", escape(name)),
    }
}

fn rgb(index: usize) -> String {
    let [r, g, b] = draw::colour(index);
    format!("rgb({r} {g} {b})")
}

fn card(shown: &Shown) -> String {
    let (width, height) = (shown.width, shown.height);
    let mut html = format!(
        "<article class=\"card\"><div><svg viewBox=\"0 0 {width} {height}\" role=\"img\" aria-label=\"picture with boxes\">\
         <image href=\"{}\" width=\"{width}\" height=\"{height}\"/>",
        data_url(&shown.png),
    );
    for (i, phrase) in shown.phrases.iter().enumerate() {
        let (colour, [x, y, ..]) = (rgb(i), phrase.found);
        // The plate stays inside the picture.
        let (x, y) = (x.clamp(0.0, width as f32 - 10.0), y.clamp(0.0, height as f32 - 10.0));
        let _ = write!(
            html,
            "<g class=\"box b{i}\" stroke=\"{colour}\">{}{}{}<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"10\" height=\"10\" \
             rx=\"2\" fill=\"{colour}\" stroke=\"none\"/><text class=\"plate\" stroke=\"none\" x=\"{:.1}\" \
             y=\"{:.1}\">{}</text></g>",
            rectangle("halo", phrase.found),
            rectangle("true", phrase.truth),
            rectangle("found", phrase.found),
            x + 5.0,
            y + 7.9,
            i + 1,
        );
    }
    html += "</svg><ol>";
    for (i, phrase) in shown.phrases.iter().enumerate() {
        let _ = write!(
            html,
            "<li class=\"phrase p{i}\"><span class=\"number\" style=\"background:{}\">{}</span><span>{}</span>{}</li>",
            rgb(i),
            i + 1,
            sentence(&phrase.text),
            mark(phrase.iou >= 0.5, &phrase.probability.map(percent).unwrap_or_default()),
        );
    }
    html += "</ol></div><div>";
    if let Some(caption) = &shown.caption {
        let marks: String = caption.marks.iter().map(|(name, right)| mark(*right, name)).collect();
        let _ = write!(
            html,
            "<h3>Description</h3><p class=\"caption\">{}</p><p class=\"truth\">truth: {}</p><div class=\"marks\">{marks}</div>",
            sentence(&caption.text),
            sentence(&caption.truth),
        );
    }
    if !shown.questions.is_empty() {
        let _ = write!(html, "<h3>Questions</h3><ul class=\"answers\">{}</ul>", all(&shown.questions, question));
    }
    if !shown.blanks.is_empty() {
        let _ = write!(html, "<h3>Blanks</h3>{}", all(&shown.blanks, blank));
    }
    html + "</div></article>\n"
}

fn rectangle(class: &str, [x, y, w, h]: [f32; 4]) -> String {
    format!("<rect class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\" width=\"{w:.1}\" height=\"{h:.1}\" rx=\"1.5\"/>")
}

fn question(asked: &Question) -> String {
    let right = asked.answer == asked.truth;
    let truth = if right { String::new() } else { format!(" <span class=\"truth\">{}</span>", escape(&asked.truth)) };
    format!("<li><span>{}</span><span>{}{truth}</span></li>", sentence(&asked.question), mark(right, &asked.answer))
}

fn blank(blank: &Blank) -> String {
    let bar = |completion: &Completion| {
        let right = blank.truths.iter().any(|truth| truth.eq_ignore_ascii_case(&completion.text()));
        let (word, share) = (escape(&completion.text()), 100.0 * completion.probability);
        let (class, sign) = if right { (" is-right", " ✓") } else { ("", "") };
        format!(
            "<li class=\"bar{class}\"><span>{word}{sign}</span><i style=\"width:{share:.1}%\"></i><span>{share:.0} %</span></li>"
        )
    };
    format!("<p class=\"caption\">{}</p><ul class=\"bars\">{}</ul>", sentence(&blank.text), all(&blank.words, bar))
}

fn ranking(ranking: &Ranking) -> String {
    let picture = |ranked: &Ranked| {
        let (class, sign) = if ranked.is_right { ("hit", " ✓") } else { ("", "") };
        let (url, probability) = (data_url(&ranked.png), percent(ranked.probability));
        format!("<li class=\"{class}\"><img src=\"{url}\" alt=\"\">{probability}{sign}</li>")
    };
    let pictures = all(&ranking.pictures, picture);
    format!("<blockquote>“{}”</blockquote><ol class=\"ranking\">{pictures}</ol>\n", sentence(&ranking.text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_cannot_leave_their_place() {
        assert_eq!(escape("<b a=\"1\">&"), "&lt;b a=&quot;1&quot;&gt;&amp;");
        assert_eq!(escape("a\u{1b}[0m\0\tb\u{ffff}"), "a[0m\tb");
        assert!(mark(false, "<i>").contains("&lt;i&gt; ✗"));
    }
}
