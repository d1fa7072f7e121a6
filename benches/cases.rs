//! What is compared: the base model's parts and tasks, at the sizes they have in use.

use serde::Serialize;
use xvlm::encoders::XvlmConfig;
use xvlm::encoders::cost::Load;

/// What a case computes; the peers know these by name.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Work {
    /// Images to patch tokens.
    Vision,
    /// Texts to states.
    Text,
    /// Texts, each with an image of its own, to states.
    Fusion,
    /// One image and texts about it to boxes: without what `xvlm ground` does beyond them, pooling each box's region and matching
    /// it with its text.
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
pub struct Case {
    /// Short, for command lines.
    pub name: &'static str,
    /// For tables.
    #[serde(skip)]
    pub title: &'static str,
    /// What is done.
    pub work: Work,
    /// Side of the images, in pixels.
    pub resolution: usize,
    /// Images at a time.
    pub images: usize,
    /// Texts at a time.
    pub texts: usize,
    /// Of each text.
    pub tokens: usize,
}

/// Texts that the search for a caption follows at a time.
pub const BEAMS: usize = 3;
/// Tokens of its prompt.
pub const PROMPT: usize = 4;
/// Tokens that it writes.
pub const NEW_TOKENS: usize = 20;

/// Tokens of the longest of some short phrases, such as "the man in the blue shirt on the left" with its `[CLS]`.
const PHRASE: usize = 10;

/// All of them, in the order of the table.
pub const CASES: [Case; 13] = [
    Case::new("vision-224-1", "vision encoder 224, batch 1", Work::Vision, 224, [1, 0, 0]),
    Case::new("vision-224-8", "vision encoder 224, batch 8", Work::Vision, 224, [8, 0, 0]),
    Case::new("vision-384-1", "vision encoder 384, batch 1", Work::Vision, 384, [1, 0, 0]),
    Case::new("vision-384-8", "vision encoder 384, batch 8", Work::Vision, 384, [8, 0, 0]),
    Case::new("text", "text encoder, 8 × 40 tokens", Work::Text, 384, [0, 8, 40]),
    Case::new("fusion", "fusion 384, 8 × 40 tokens", Work::Fusion, 384, [8, 8, 40]),
    Case::new("ground", "grounding 384 (boxes only), one text of 40 tokens", Work::Grounding, 384, [1, 1, 40]),
    Case::new(
        "ground-phrase",
        "grounding 384 (boxes only), one phrase of 10 tokens",
        Work::Grounding,
        384,
        [1, 1, PHRASE],
    ),
    Case::new(
        "ground-32-phrases",
        "grounding 384 (boxes only), 32 phrases of 10 tokens",
        Work::Grounding,
        384,
        [1, 32, PHRASE],
    ),
    Case::new("caption", "caption 384, beam 3, 20 tokens", Work::Caption, 384, [1, 1, PROMPT]),
    Case::new(
        "caption-cached",
        "caption 384, the peer's image keys computed once",
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
    ///
    /// # Errors
    /// If there is none: names all there are.
    pub fn of_name(name: &str) -> Result<&'static Self, String> {
        CASES.iter().find(|case| case.name == name).ok_or_else(|| unknown(name))
    }

    /// The cases whose name contains `filter`.
    ///
    /// # Errors
    /// If there is none: names all there are.
    pub fn chosen(filter: Option<&str>) -> Result<Vec<&'static Self>, String> {
        let filter = filter.unwrap_or_default();
        let chosen: Vec<&Self> = CASES.iter().filter(|case| case.name.contains(filter)).collect();
        if chosen.is_empty() { Err(unknown(filter)) } else { Ok(chosen) }
    }

    /// Whether it is a forward pass of the model, and not a step of training or a program.
    pub fn is_inference(&self) -> bool {
        !matches!(self.work, Work::Step | Work::StartUp)
    }

    /// FLOPs of its matrix products, where it is inference.
    pub fn flops(&self) -> Option<u64> {
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
    format!("case: expected part of the name of one of {}, found {found}", names.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_filter_is_told_what_there_is() {
        let error = Case::chosen(Some("vison")).expect_err("no such case");
        assert!(CASES.iter().all(|case| error.contains(case.name)), "{error}");
        assert_eq!(Case::chosen(Some("vision-384")).map(|cases| cases.len()), Ok(2));
    }

    #[test]
    fn eight_images_are_eight_times_the_arithmetic_of_one() {
        let flops = |name| Case::of_name(name).ok().and_then(Case::flops).expect("FLOPs of inference");
        assert_eq!(flops("vision-224-8"), 8 * flops("vision-224-1"));
        // Swin-B at 224 pixels has 15.4 G multiply-adds (Liu et al. 2021, table 1), which counts more than products.
        assert!((30.0e9..31.0e9).contains(&(flops("vision-224-1") as f64)));
    }
}
