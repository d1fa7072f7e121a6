//! The images of HTML: of a page, or of a piece of it in Markdown.

use std::ops::Range;

use html5gum::emitters::default::{DefaultEmitter, StartTag};
use html5gum::{State, Token, Tokenizer};

use super::source::first_of_set;
use super::{Alt, Found};

/// Elements whose images are examples or not shown: what is inside is left alone.
const LEFT_ALONE: [&[u8]; 3] = [b"template", b"pre", b"code"];

/// Reads pieces of one document, one after the other.
#[derive(Default)]
pub(super) struct Scanner {
    /// Elements of [`LEFT_ALONE`] that are open.
    open: Vec<Vec<u8>>,
    /// What addresses are relative to.
    pub(super) base: Option<String>,
}

/// An image of a piece of HTML.
pub(super) struct Image {
    pub(super) found: Found,
    /// Where its tag begins.
    pub(super) start: usize,
    /// What is to be replaced by an attribute with a space before it: nothing right after the name of the tag, or the attribute
    /// that there is.
    pub(super) place: Option<Range<usize>>,
}

impl Scanner {
    /// The images of a piece, in its order.
    pub(super) fn scan(&mut self, html: &[u8]) -> Vec<Image> {
        let mut images = Vec::new();
        let mut tokens = Tokenizer::new_with_emitter(html, DefaultEmitter::<usize>::new_with_span());
        while let Some(Ok(token)) = tokens.next() {
            match token {
                Token::StartTag(tag) => {
                    if let Some(state) = state_after(&tag.name) {
                        tokens.set_state(state);
                    }
                    match &**tag.name {
                        b"img" if self.open.is_empty() => images.extend(image(html, &tag)),
                        b"base" if self.base.is_none() && self.open.is_empty() => self.base = attribute(&tag, b"href"),
                        name if LEFT_ALONE.contains(&name) => self.open.push(name.to_vec()),
                        _ => {}
                    }
                }
                Token::EndTag(tag) => {
                    if let Some(place) = self.open.iter().rposition(|open| **open == **tag.name) {
                        self.open.truncate(place);
                    }
                }
                _ => {}
            }
        }
        images
    }
}

/// Text follows some tags, in which nothing is a tag but their end. (`noscript` is read as it is where scripts do not run.)
fn state_after(tag: &[u8]) -> Option<State> {
    match tag {
        b"textarea" | b"title" => Some(State::RcData),
        b"style" | b"iframe" | b"xmp" | b"noembed" | b"noframes" => Some(State::RawText),
        b"script" => Some(State::ScriptData),
        b"plaintext" => Some(State::PlainText),
        _ => None,
    }
}

fn attribute(tag: &StartTag<usize>, name: &[u8]) -> Option<String> {
    tag.attributes.get(name).map(|value| String::from_utf8_lossy(value).into_owned())
}

fn image(html: &[u8], tag: &StartTag<usize>) -> Option<Image> {
    const TAG: &[u8] = b"<img";
    let start = tag.span.start;
    // What is written goes nowhere but behind this.
    if !html.get(start..start + TAG.len())?.eq_ignore_ascii_case(TAG) {
        return None;
    }
    let value = |name: &[u8]| attribute(tag, name).filter(|value| !value.trim().is_empty());
    let is = |name: &[u8], values: &[&str]| {
        value(name).is_some_and(|value| values.iter().any(|known| value.trim().eq_ignore_ascii_case(known)))
    };
    let source = value(b"src").or_else(|| value(b"srcset").and_then(|set| first_of_set(&set).map(str::to_owned)));
    let hidden = is(b"aria-hidden", &["true"]) || is(b"role", &["presentation", "none"]);
    let named = value(b"aria-label").is_some() || value(b"aria-labelledby").is_some();
    let alt = match (attribute(tag, b"alt"), value(b"alt")) {
        (_, Some(_)) => Alt::Given,
        _ if named => Alt::Given,
        (Some(_), None) => Alt::Decorative,
        (None, _) if hidden => Alt::Decorative,
        (None, _) => Alt::Missing,
    };
    let place = match attribute(tag, b"alt") {
        Some(_) => alt_attribute(html, start + TAG.len()),
        None => Some(start + TAG.len()..start + TAG.len()),
    };
    Some(Image { found: Found { source, alt }, start, place })
}

/// Where the first attribute `alt` of a tag stands, with the space before it; the tag's attributes begin at `at`.
fn alt_attribute(html: &[u8], mut at: usize) -> Option<Range<usize>> {
    fn is_space(byte: u8) -> bool {
        matches!(byte, b' ' | b'\t' | b'\n' | b'\r' | 0x0c)
    }
    let skip = |from: usize, which: fn(u8) -> bool| from + html[from..].iter().take_while(|byte| which(**byte)).count();
    loop {
        let before = at;
        at = skip(at, |byte| is_space(byte) || byte == b'/');
        let name = at;
        match html.get(at)? {
            b'>' => return None,
            // A name may begin with it.
            b'=' => at += 1,
            _ => {}
        }
        at = skip(at, |byte| !is_space(byte) && !matches!(byte, b'/' | b'>' | b'='));
        let is_alt = html[name..at].eq_ignore_ascii_case(b"alt");
        let mut end = at;
        let equals = skip(at, is_space);
        if html.get(equals) == Some(&b'=') {
            let value = skip(equals + 1, is_space);
            end = match html.get(value)? {
                quote @ (b'"' | b'\'') => value + 1 + html[value + 1..].iter().position(|byte| byte == quote)? + 1,
                b'>' => value,
                _ => skip(value, |byte| !is_space(byte) && byte != b'>'),
            };
            at = end;
        }
        if is_alt {
            // Whatever separates it from what is before, one space of it goes with the attribute.
            let start = if name > before { name - 1 } else { name };
            return Some(start..end);
        }
    }
}
