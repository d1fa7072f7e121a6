//! What is compared: the base model's parts and tasks, at the sizes they have in use.

use serde::Serialize;
use xvlm::encoders::XvlmConfig;
use xvlm::encoders::cost::Load;

use super::Outcome;

/// What a case computes; the peers know these by name.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Work {
    /// Images to patch tokens.
    Vision,
    /// Texts to states.
    Text,
    /// Texts, each with an image of its own, to states.
    Fusion,
    /// One image and texts about it to boxes.
    Grounding,
    /// One image to a caption, by a beam search.
    Caption,
    /// The same; the peer too computes keys and values of the image once.
    CaptionCached,
    /// A step of pre-training.
    Step,
    /// The program from its start to its answer.
    StartUp,
}

/// A row of the comparison.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Case {
    pub(crate) name: &'static str,
    #[serde(skip)]
    pub(crate) title: &'static str,
    pub(crate) work: Work,
    /// Side of the images, in pixels.
    pub(crate) resolution: usize,
    pub(crate) images: usize,
    pub(crate) texts: usize,
    /// Of each text.
    pub(crate) tokens: usize,
}

/// Texts that a search follows at a time, tokens of its prompt, and tokens it writes.
pub(crate) const BEAMS: usize = 3;
pub(crate) const PROMPT: usize = 4;
pub(crate) const NEW_TOKENS: usize = 20;

/// Tokens of the longest of some short phrases, such as "the man in the blue shirt on the left" with its `[CLS]`.
const PHRASE: usize = 10;

pub(crate) const CASES: [Case; 13] = [
    Case::new("vision-224-1", "vision encoder 224, batch 1", Work::Vision, 224, [1, 0, 0]),
    Case::new("vision-224-8", "vision encoder 224, batch 8", Work::Vision, 224, [8, 0, 0]),
    Case::new("vision-384-1", "vision encoder 384, batch 1", Work::Vision, 384, [1, 0, 0]),
    Case::new("vision-384-8", "vision encoder 384, batch 8", Work::Vision, 384, [8, 0, 0]),
    Case::new("text", "text encoder, 8 × 40 tokens", Work::Text, 384, [0, 8, 40]),
    Case::new("fusion", "fusion 384, 8 × 40 tokens", Work::Fusion, 384, [8, 8, 40]),
    Case::new("ground", "grounding 384, one text of 40 tokens", Work::Grounding, 384, [1, 1, 40]),
    Case::new("ground-phrase", "grounding 384, one phrase of 10 tokens", Work::Grounding, 384, [1, 1, PHRASE]),
    Case::new("ground-32-phrases", "grounding 384, 32 phrases of 10 tokens", Work::Grounding, 384, [1, 32, PHRASE]),
    Case::new("caption", "caption 384, beam 3, 20 tokens", Work::Caption, 384, [1, 1, PROMPT]),
    Case::new(
        "caption-cached",
        "the same, the peer's image keys computed once",
        Work::CaptionCached,
        384,
        [1, 1, PROMPT],
    ),
    Case::new("train-step", "pre-training step 224, batch 4", Work::Step, 224, [4, 4, 40]),
    Case::new("start-up", "xvlm ground 384, whole process over its bare work", Work::StartUp, 384, [1, 1, PHRASE]),
];

impl Case {
    const fn new(
        name: &'static str,
        title: &'static str,
        work: Work,
        resolution: usize,
        [images, texts, tokens]: [usize; 3],
    ) -> Self {
        Self { name, title, work, resolution, images, texts, tokens }
    }

    /// The case of a name.
    pub(crate) fn of_name(name: &str) -> Outcome<&'static Self> {
        CASES.iter().find(|case| case.name == name).ok_or_else(|| unknown(name).into())
    }

    /// The cases whose name contains `filter`.
    pub(crate) fn chosen(filter: Option<&str>) -> Outcome<Vec<&'static Self>> {
        let filter = filter.unwrap_or_default();
        let chosen: Vec<&Self> = CASES.iter().filter(|case| case.name.contains(filter)).collect();
        if chosen.is_empty() { Err(unknown(filter).into()) } else { Ok(chosen) }
    }

    /// FLOPs of its matrix products, where it is inference.
    pub(crate) fn flops(&self) -> Option<u64> {
        let Self { images, texts, tokens, .. } = *self;
        let of = |load: Load| XvlmConfig::base(self.resolution).cost(&load).flops;
        match self.work {
            Work::Vision => Some(of(Load { images, ..Load::default() })),
            Work::Text => Some(of(Load { texts, tokens, ..Load::default() })),
            Work::Fusion => Some(of(Load { fused: texts, concepts: images, tokens, ..Load::default() })),
            Work::Grounding => {
                Some(of(Load { images, texts, tokens, fused: texts, concepts: 1, boxes: texts, ..Load::default() }))
            }
            // As if all tokens were written at once, each text's last one left out.
            Work::Caption | Work::CaptionCached => Some(of(Load {
                images,
                texts: BEAMS,
                tokens: PROMPT + NEW_TOKENS - 1,
                fused: BEAMS,
                concepts: 1,
                predicted: BEAMS * NEW_TOKENS,
                ..Load::default()
            })),
            Work::Step | Work::StartUp => None,
        }
    }
}

fn unknown(found: &str) -> String {
    let names: Vec<&str> = CASES.iter().map(|case| case.name).collect();
    format!("FILTER: expected part of one of {}, found {found}", names.join(", "))
}
