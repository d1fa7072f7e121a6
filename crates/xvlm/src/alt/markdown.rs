//! The images of Markdown, those of HTML inside it among them.

use std::ops::Range;

use pulldown_cmark::{Event, Options, Parser, Tag, TagEnd};

use super::html::Scanner;
use super::{Alt, Found, Place, Spotted, Writing};

/// Everything that changes what is an image and what is not.
const OPTIONS: Options = Options::ENABLE_TABLES
    .union(Options::ENABLE_FOOTNOTES)
    .union(Options::ENABLE_STRIKETHROUGH)
    .union(Options::ENABLE_TASKLISTS)
    .union(Options::ENABLE_MATH)
    .union(Options::ENABLE_YAML_STYLE_METADATA_BLOCKS)
    .union(Options::ENABLE_PLUSES_DELIMITED_METADATA_BLOCKS);

/// The images of a text with the places of their descriptions, and the base that HTML in it names.
pub(super) fn scan(text: &str) -> (Vec<Spotted>, Option<String>) {
    let mut images = Vec::new();
    let mut scanner = Scanner::default();
    // Images that are open, and pieces of the HTML block that is.
    let mut open: Vec<(String, Range<usize>, bool)> = Vec::new();
    let mut block: Option<Vec<Range<usize>>> = None;
    for (event, range) in Parser::new_ext(text, OPTIONS).into_offset_iter() {
        match event {
            Event::Start(Tag::Image { dest_url, .. }) => open.push((dest_url.into_string(), range, false)),
            Event::End(TagEnd::Image) => {
                if let Some((source, range, described)) = open.pop() {
                    images.push(image(text, source, range, described));
                }
            }
            Event::Start(Tag::HtmlBlock) => block = Some(Vec::new()),
            Event::End(TagEnd::HtmlBlock) => {
                let pieces = block.take().unwrap_or_default();
                images.extend(html_block(text, &pieces, &mut scanner));
            }
            Event::Html(_) => {
                if let Some(pieces) = &mut block {
                    pieces.push(range);
                }
            }
            // The tag as it is without the marks of a quotation or a list that it may stand in.
            Event::InlineHtml(tag) => images.extend(inline_html(text, &tag, range, &mut scanner)),
            Event::Text(words) | Event::Code(words) | Event::InlineMath(words) | Event::DisplayMath(words)
                if !words.trim().is_empty() =>
            {
                open.iter_mut().for_each(|(.., described)| *described = true);
            }
            _ => {}
        }
    }
    (images, scanner.base)
}

fn image(text: &str, source: String, range: Range<usize>, described: bool) -> Spotted {
    const BEGINS: &str = "![";
    let at = range.start + BEGINS.len();
    let is_there = text.get(range.start..at) == Some(BEGINS);
    // A description is replaced up to the bracket that ends it; of one with brackets inside it is not known where that is.
    let end = match described {
        true => text[at..range.end].find([']', '[']).map(|end| at + end),
        false => Some(at),
    };
    let end = end.filter(|&end| !described || text[end..].starts_with("]("));
    let place = end.filter(|_| is_there).map(|end| Place { range: at..end, writing: Writing::Markdown });
    let source = Some(source).filter(|source| !source.trim().is_empty());
    let alt = if described { Alt::Given } else { Alt::Missing };
    Spotted { found: Found { source, alt }, start: range.start, place }
}

/// The images of a block of HTML, which stands in pieces, as a quotation has marks before each line.
fn html_block(text: &str, pieces: &[Range<usize>], scanner: &mut Scanner) -> Vec<Spotted> {
    let html: String = pieces.iter().map(|piece| &text[piece.clone()]).collect();
    let in_text = |at: usize| {
        let mut start = 0;
        pieces.iter().find_map(|piece| {
            let inside = at.checked_sub(start).filter(|inside| *inside <= piece.len());
            start += piece.len();
            inside.map(|inside| piece.start + inside)
        })
    };
    let found = scanner.scan(html.as_bytes()).into_iter().filter_map(|image| {
        let place = image.place.and_then(|place| {
            let range = in_text(place.start)?..in_text(place.end)?;
            // What is replaced must stand in one piece.
            (range.len() == place.len()).then_some(Place { range, writing: Writing::HtmlInMarkdown })
        });
        Some(Spotted { found: image.found, start: in_text(image.start)?, place })
    });
    found.collect()
}

fn inline_html(text: &str, tag: &str, range: Range<usize>, scanner: &mut Scanner) -> Vec<Spotted> {
    // On its first line a tag is the same with the marks and without.
    let same = if text.get(range.clone()) == Some(tag) { tag.len() } else { tag.find('\n').unwrap_or(0) };
    let found = scanner.scan(tag.as_bytes()).into_iter().map(|image| {
        let place = image.place.filter(|place| place.end <= same);
        let place = place.map(|place| Place {
            range: range.start + place.start..range.start + place.end,
            writing: Writing::HtmlInMarkdown,
        });
        Spotted { found: image.found, start: range.start + image.start, place }
    });
    found.collect()
}
