//! What was left out while reading, by reason.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

/// Why something was left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Reason {
    /// An item that does not have the form it should have.
    Malformed,
    /// An identifier that an earlier item has already.
    DuplicateId,
    /// An image that the caller asked to leave out.
    Excluded,
    /// An item of a split that was not asked for.
    OtherSplit,
    /// An image file that is not there.
    MissingImage,
    /// A file that is no image.
    UnreadableImage,
    /// An image of another size than its annotation says: its boxes cannot be trusted.
    OtherSize,
    /// An annotation of an image that the file does not list.
    UnknownImage,
    /// An object of a category that the file does not list.
    UnknownCategory,
    /// A text without a single word.
    EmptyText,
    /// A box of which nothing (or less than a pixel) is inside the image, or which has a number that is none.
    DegenerateBox,
    /// A box with a text that the image has already.
    DuplicateElement,
    /// A box around a crowd or a group instead of one object.
    Crowd,
    /// A box around a drawing or a photograph of the object.
    Depiction,
    /// A question to which the annotations have no answer.
    QuestionWithoutAnnotation,
    /// An annotation of a question that is not asked.
    AnnotationWithoutQuestion,
    /// An annotation that is about another image than its question.
    OtherImage,
    /// An image about which nothing is left to tell.
    NoText,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Malformed => "malformed items",
            Self::DuplicateId => "duplicate identifiers",
            Self::Excluded => "excluded images",
            Self::OtherSplit => "items of other splits",
            Self::MissingImage => "missing images",
            Self::UnreadableImage => "unreadable images",
            Self::OtherSize => "images of another size than annotated",
            Self::UnknownImage => "annotations of unknown images",
            Self::UnknownCategory => "objects of unknown categories",
            Self::EmptyText => "texts without words",
            Self::DegenerateBox => "boxes with nothing inside the image",
            Self::DuplicateElement => "boxes repeated with the same text",
            Self::Crowd => "boxes of crowds or groups",
            Self::Depiction => "boxes of depictions",
            Self::QuestionWithoutAnnotation => "questions without annotation",
            Self::AnnotationWithoutQuestion => "annotations without question",
            Self::OtherImage => "annotations of another image than their question",
            Self::NoText => "images without texts",
        })
    }
}

/// How much was left out for one reason.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Skipped {
    /// How often.
    pub count: u64,
    /// The first few, each naming where and what.
    pub examples: Vec<String>,
}

/// What was left out, by reason.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Report {
    reasons: BTreeMap<Reason, Skipped>,
}

impl Report {
    /// Examples kept of each reason.
    const EXAMPLES: usize = 5;

    /// Counts something that is left out; `what` is asked for while examples are kept.
    pub fn skip<T: fmt::Display>(&mut self, reason: Reason, what: impl FnOnce() -> T) {
        let skipped = self.reasons.entry(reason).or_default();
        skipped.count += 1;
        if skipped.examples.len() < Self::EXAMPLES {
            skipped.examples.push(what().to_string());
        }
    }

    /// How often something was left out for this reason.
    #[must_use]
    pub fn count(&self, reason: Reason) -> u64 {
        self.reasons.get(&reason).map_or(0, |skipped| skipped.count)
    }

    /// Whether nothing was left out.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.reasons.is_empty()
    }

    /// The reasons and what was left out for each.
    pub fn iter(&self) -> impl Iterator<Item = (Reason, &Skipped)> {
        self.reasons.iter().map(|(&reason, skipped)| (reason, skipped))
    }

    /// Adds what another report counted.
    pub fn merge(&mut self, other: &Self) {
        for (&reason, from) in &other.reasons {
            let into = self.reasons.entry(reason).or_default();
            into.count += from.count;
            let room = Self::EXAMPLES.saturating_sub(into.examples.len());
            into.examples.extend(from.examples.iter().take(room).cloned());
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (reason, skipped) in self.iter() {
            writeln!(f, "{}: {reason}", skipped.count)?;
            for example in &skipped.examples {
                writeln!(f, "  {example}")?;
            }
        }
        Ok(())
    }
}
