//! Which answer of a list is likeliest.
//!
//! The likelihood of an answer is the product of its tokens' probabilities. Answers are followed token by token, those that
//! begin alike together, so that each beginning goes through the decoder once; keys and values of what has been read, and of
//! what the decoder looks at, are kept.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use candle_core::{D, DType, Result, Tensor};
use serde::{Deserialize, Serialize};
use xvlm_data::{DataError, Place, pre_caption};
use xvlm_encoders::{Task, Xvlm};
use xvlm_kernels as kernels;

use super::{Asked, asked};
use crate::error::TaskError;
use crate::generate::Source;
use crate::model::{ImageTokens, Model};
use crate::sweep::LeftOut;

/// Beginnings of answers that go through the decoder at a time: their logits are that many rows of the vocabulary.
const ROWS: usize = 1024;

/// How answers of a list are ranked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ranking {
    /// How many are ranked by the whole answer: those whose first token is likeliest (`k_test`).
    pub k: usize,
    /// Whether the first token's probability is multiplied in twice, as in the original (`XVLM.rank_answer`).
    pub as_original: bool,
}

impl Default for Ranking {
    /// Each token once; 128 answers (`k_test` of the original's `configs/VQA.yaml`).
    fn default() -> Self {
        Self { k: 128, as_original: false }
    }
}

/// An answer of a list, ranked for a question.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ranked {
    /// Its number in [`AnswerList::texts`], or among the answers that [`rank`] was given.
    pub answer: u32,
    /// Its probability among those that were ranked.
    pub probability: f32,
}

/// Answers to choose from.
#[derive(Clone, Debug)]
pub struct AnswerList {
    texts: Vec<String>,
    /// The tokens of each, `[SEP]` at the end.
    tokens: Vec<Vec<u32>>,
    left_out: Vec<LeftOut>,
}

impl AnswerList {
    /// A list for a model. Answers that have no token, and those that have the tokens of an earlier one, are left out.
    ///
    /// # Errors
    /// If nothing is left, or the tokenizer cannot represent a text.
    pub fn new(model: &Model, texts: Vec<String>) -> std::result::Result<Self, TaskError> {
        let mut list = Self { texts: Vec::new(), tokens: Vec::new(), left_out: Vec::new() };
        let mut known: HashMap<Vec<u32>, usize> = HashMap::new();
        for (item, text) in texts.into_iter().enumerate() {
            let tokens = tokens(model, &text)?;
            let problem = match (tokens.len() > 1, known.get(&tokens)) {
                (true, None) => {
                    known.insert(tokens.clone(), item);
                    list.texts.push(text);
                    list.tokens.push(tokens);
                    continue;
                }
                (true, Some(first)) => format!("answer {text:?}: expected one of its own, found answer {first} again"),
                (false, _) => format!("answer {text:?}: expected at least one token, found none"),
            };
            list.left_out.push(LeftOut { item, problem });
        }
        match list.texts.is_empty() {
            true => Err(TaskError::Empty { what: "list of answers".to_owned() }),
            false => Ok(list),
        }
    }

    /// Reads a list: JSON as the original's `answer_list.json`, or an answer a line.
    ///
    /// # Errors
    /// If the file cannot be read, or as [`Self::new`].
    pub fn open(model: &Model, path: &Path) -> std::result::Result<Self, TaskError> {
        let bytes = std::fs::read(path).map_err(|source| DataError::Io { path: path.to_owned(), source })?;
        let text = String::from_utf8_lossy(&bytes);
        let texts = match text.trim_start().starts_with(['[', '{']) {
            true => serde_json::from_str(&text).map_err(|source| DataError::Json {
                path: path.to_owned(),
                place: Place::Whole,
                source,
            })?,
            false => text.lines().map(|line| line.trim().to_owned()).filter(|line| !line.is_empty()).collect(),
        };
        Self::new(model, texts).map_err(|error| match error {
            TaskError::Empty { what } => TaskError::Empty { what: format!("{}: {what}", path.display()) },
            error => error,
        })
    }

    /// The answers.
    pub fn texts(&self) -> &[String] {
        &self.texts
    }

    /// The tokens of each answer, `[SEP]` at the end.
    pub fn tokens(&self) -> &[Vec<u32>] {
        &self.tokens
    }

    /// What was left out; items are counted in the list as given.
    pub fn left_out(&self) -> &[LeftOut] {
        &self.left_out
    }
}

/// The tokens of an answer as the model learnt to write it, and `[SEP]`.
fn tokens(model: &Model, text: &str) -> std::result::Result<Vec<u32>, TaskError> {
    let (config, tokenizer) = (model.config(), model.tokenizer());
    let mut tokens = match config.model.task {
        Task::Vqa => tokenizer.tokens(text)?,
        // In pre-training the answer goes on a text, cleaned as all of it.
        _ => match pre_caption(text, config.max_words) {
            Ok(cleaned) => tokenizer.tokens(&format!(" {cleaned}"))?,
            Err(DataError::EmptyText { .. }) => Vec::new(),
            Err(error) => return Err(error.into()),
        },
    };
    tokens.truncate(config.max_tokens.saturating_sub(2));
    tokens.push(tokenizer.sep_id());
    Ok(tokens)
}

/// Ranks a list of answers for questions, each given with the row of `images` it is about. Best first.
///
/// # Errors
/// If the model is made for another task, or a tensor operation fails.
pub fn rank_answers(
    model: &Model,
    images: &ImageTokens,
    questions: &[(u32, &str)],
    answers: &AnswerList,
    ranking: Ranking,
) -> std::result::Result<Vec<Vec<Ranked>>, TaskError> {
    let longest = answers.tokens.iter().map(Vec::len).max().unwrap_or(0);
    let mut ranked = Vec::with_capacity(questions.len());
    for questions in questions.chunks(crate::BATCH) {
        let Asked { source, rows } = asked(model, images, questions, longest)?;
        ranked.extend(rank(model.xvlm(), &source, &rows, &answers.tokens, ranking)?);
    }
    Ok(ranked)
}

/// Ranks answers as continuations of prompts, each given with the row of `source` it is about: the `k` answers whose first token
/// is likeliest, by the probability of all their tokens. Best first.
///
/// # Errors
/// If there are no answers, one has no token, a tensor operation fails, or the model cannot write.
pub fn rank(
    model: &Xvlm,
    source: &Source,
    prompts: &[(u32, Vec<u32>)],
    answers: &[Vec<u32>],
    ranking: Ranking,
) -> Result<Vec<Vec<Ranked>>> {
    if answers.is_empty() || answers.iter().any(Vec::is_empty) {
        let found: Vec<usize> = answers.iter().map(Vec::len).collect();
        candle_core::bail!("answers: expected at least one, of at least one token, found lengths {found:?}");
    }
    let k = ranking.k.clamp(1, answers.len());
    let mut ranked = Vec::with_capacity(prompts.len());
    for prompts in prompts.chunks((ROWS / k).max(1)) {
        let (index, prompts): (Vec<u32>, Vec<Vec<u32>>) = prompts.iter().cloned().unzip();
        ranked.extend(
            source
                .look_at(&index, |looks| {
                    let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
                    let room = longest + answers.iter().map(|answer| answer.len() - 1).max().unwrap_or(0);
                    let mut decoding = model.begin_texts(looks, room)?;
                    let next = log_probabilities(model, &decoding.extend(&prompts)?)?;
                    let mut candidates = candidates(&next, answers, k)?;
                    let mut live = Beginnings::first(&candidates, answers);
                    while !live.tokens.is_empty() {
                        decoding.select(&live.parents)?;
                        let next = log_probabilities(model, &decoding.extend(&live.tokens)?)?;
                        live = live.advance(&next, &mut candidates, answers)?;
                    }
                    Ok(candidates)
                })?
                .into_iter()
                .map(|candidates| probabilities(candidates, ranking.as_original)),
        );
    }
    Ok(ranked)
}

/// Log-probabilities of the next token `[rows, V]`, of states `[rows, H]`.
fn log_probabilities(model: &Xvlm, states: &Tensor) -> Result<Tensor> {
    kernels::log_softmax(&model.next_token_logits(states)?.to_dtype(DType::F32)?, D::Minus1)
}

/// An answer that is ranked for a question.
struct Candidate {
    answer: usize,
    /// Log-probability of the first token, and of all so far.
    first: f32,
    sum: f32,
}

/// The `k` answers whose first token is likeliest, for each row of log-probabilities `[Q, V]`.
fn candidates(next: &Tensor, answers: &[Vec<u32>], k: usize) -> Result<Vec<Vec<Candidate>>> {
    let firsts: Vec<u32> = answers.iter().map(|answer| answer[0]).collect();
    let first = next.index_select(&Tensor::new(firsts, next.device())?, 1)?.to_vec2::<f32>()?;
    let choose = |first: Vec<f32>| {
        let mut order: Vec<usize> = (0..answers.len()).collect();
        let before = |a: &usize, b: &usize| first[*b].total_cmp(&first[*a]).then(a.cmp(b));
        if k < order.len() {
            order.select_nth_unstable_by(k - 1, before);
            order.truncate(k);
        }
        order.sort_unstable_by(before);
        order.into_iter().map(|answer| Candidate { answer, first: first[answer], sum: first[answer] }).collect()
    };
    Ok(first.into_iter().map(choose).collect())
}

/// Different beginnings of candidates that go on, each a text of the decoder.
#[derive(Default)]
struct Beginnings {
    /// The text each goes on, counted among those of the step before, with one token.
    parents: Vec<u32>,
    tokens: Vec<Vec<u32>>,
    /// The question of each, and its candidates that begin so.
    members: Vec<(usize, Vec<usize>)>,
    /// How many tokens each has.
    length: usize,
}

impl Beginnings {
    /// Those of one token.
    fn first(candidates: &[Vec<Candidate>], answers: &[Vec<u32>]) -> Self {
        let mut first = Self { length: 1, ..Self::default() };
        for (question, candidates) in candidates.iter().enumerate() {
            first.branch(question as u32, question, &(0..candidates.len()).collect::<Vec<_>>(), candidates, answers);
        }
        first
    }

    /// Adds what goes on after this many tokens of `members`, which were one text until the last of them.
    fn branch(
        &mut self,
        parent: u32,
        question: usize,
        members: &[usize],
        candidates: &[Candidate],
        answers: &[Vec<u32>],
    ) {
        let mut by_token: BTreeMap<u32, Vec<usize>> = BTreeMap::new();
        for &member in members {
            let answer = &answers[candidates[member].answer];
            if answer.len() > self.length {
                by_token.entry(answer[self.length - 1]).or_default().push(member);
            }
        }
        for (token, members) in by_token {
            self.parents.push(parent);
            self.tokens.push(vec![token]);
            self.members.push((question, members));
        }
    }

    /// Adds the log-probabilities of the next token of each candidate, of which `next [rows, V]` has all, and goes on.
    fn advance(self, next: &Tensor, candidates: &mut [Vec<Candidate>], answers: &[Vec<u32>]) -> Result<Self> {
        let words = next.dim(D::Minus1)?;
        let mut places = Vec::new();
        for (row, (question, members)) in self.members.iter().enumerate() {
            let token = |&member: &usize| answers[candidates[*question][member].answer][self.length];
            places.extend(members.iter().map(|member| (row * words) as u32 + token(member)));
        }
        let found = next.flatten_all()?.index_select(&Tensor::new(places, next.device())?, 0)?.to_vec1::<f32>()?;
        let mut found = found.into_iter();
        let mut after = Self { length: self.length + 1, ..Self::default() };
        for ((row, (question, members)), _) in (0u32..).zip(&self.members).zip(&self.tokens) {
            for (&member, found) in members.iter().zip(found.by_ref()) {
                candidates[*question][member].sum += found;
            }
            after.branch(row, *question, members, &candidates[*question], answers);
        }
        Ok(after)
    }
}

/// Candidates as they compare with each other, best first.
fn probabilities(candidates: Vec<Candidate>, as_original: bool) -> Vec<Ranked> {
    let score =
        |candidate: &Candidate| f64::from(candidate.sum) + if as_original { f64::from(candidate.first) } else { 0.0 };
    let best = candidates.iter().map(score).fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = candidates.iter().map(|candidate| (score(candidate) - best).exp()).collect();
    let sum: f64 = weights.iter().sum();
    let mut ranked: Vec<Ranked> = candidates
        .iter()
        .zip(weights)
        .map(|(candidate, weight)| Ranked { answer: candidate.answer as u32, probability: (weight / sum) as f32 })
        .collect();
    ranked.sort_by(|a, b| b.probability.total_cmp(&a.probability));
    ranked
}
