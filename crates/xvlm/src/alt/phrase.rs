//! Captions made into sentences for people, and written so that a document keeps its meaning.

use super::Phrasing;

/// What stands in front of characters of a text in Markdown that would otherwise begin something else.
const MARKDOWN: &str = "\\`*_[]<>&|~$^";

impl Phrasing {
    /// A caption as it is to be read.
    pub fn apply(&self, caption: &str) -> String {
        let mut text = caption.split_whitespace().collect::<Vec<_>>().join(" ");
        if self.sentence {
            if let Some(first) = text.chars().next().filter(|first| first.is_lowercase()) {
                text.replace_range(..first.len_utf8(), &first.to_uppercase().to_string());
            }
            if !text.ends_with(['.', '!', '?', '…']) {
                text.push('.');
            }
        }
        format!("{}{text}{}", self.prefix, self.suffix)
    }
}

/// Text as the value of an HTML attribute between double quotes. What the document's encoding may not have is written by its
/// number, and so is what `special` names.
pub(super) fn html(text: &str, is_utf8: bool, special: &[char]) -> String {
    let mut out = String::with_capacity(text.len());
    for c in flat(text) {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            c if special.contains(&c) || !(is_utf8 || c.is_ascii()) => out.push_str(&format!("&#{};", u32::from(c))),
            c => out.push(c),
        }
    }
    out
}

/// Text as the description of an image in Markdown.
pub(super) fn markdown(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in flat(text) {
        if MARKDOWN.contains(c) {
            out.push('\\');
        }
        out.push(c);
    }
    out
}

/// A text on one line, without characters that are none to see.
fn flat(text: &str) -> impl Iterator<Item = char> {
    text.trim().chars().map(|c| if c.is_whitespace() { ' ' } else { c }).filter(|c| !c.is_control())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn captions_become_sentences() {
        let sentence = Phrasing::default();
        assert_eq!(sentence.apply("a red  circle"), "A red circle.");
        assert_eq!(sentence.apply("is it so?"), "Is it so?");
        assert_eq!(sentence.apply("élan"), "Élan.");
        let plain = Phrasing { sentence: false, prefix: "Picture: ".to_owned(), suffix: " (automatic)".to_owned() };
        assert_eq!(plain.apply("a red circle"), "Picture: a red circle (automatic)");
    }

    #[test]
    fn characters_keep_their_meaning() {
        assert_eq!(html("a \"b\" <c> & d\n'e'\u{7}", true, &[]), "a &quot;b&quot; &lt;c&gt; &amp; d 'e'");
        assert_eq!(html("für|€", false, &['|']), "f&#252;r&#124;&#8364;");
        assert_eq!(html("für", true, &[]), "für");
        assert_eq!(markdown("a [b] *c* \\ d\ne"), "a \\[b\\] \\*c\\* \\\\ d e");
    }
}
