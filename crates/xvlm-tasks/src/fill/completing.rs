//! The search for completions, and the probability of one that is given.

use candle_core::{D, DType};
use xvlm_data::TextTokenizer;
use xvlm_encoders::{Attention, Task};
use xvlm_kernels as kernels;

use super::phrase::Phrase;
use super::{Completing, Completion};
use crate::BATCH;
use crate::error::{ConfigProblem, TaskError};
use crate::model::{ImageTokens, Model};

/// A model whose language head is asked for words.
pub(super) struct Filler<'a> {
    model: &'a Model,
    images: &'a ImageTokens,
    search: Completing,
    /// Pieces that begin a word.
    begins: Vec<u32>,
    /// Pieces that continue one.
    continues: Vec<u32>,
}

/// A phrase to be completed, with the row of the images it is about.
pub(super) struct Open {
    pub(super) image: u32,
    pub(super) text: String,
    pub(super) phrase: Phrase,
    /// Counts the completions that are likelier than this one: its log-probability and its pieces.
    pub(super) against: Option<(f64, Vec<u32>)>,
}

/// What was found for a phrase.
#[derive(Clone, Default)]
pub(super) struct Proposals {
    /// The likeliest first.
    pub(super) completions: Vec<Completion>,
    /// How many completions are likelier than [`Open::against`]: of one piece all that are, of several those found.
    pub(super) above: usize,
}

/// What the language head is asked: the piece at a place of a row.
struct Ask {
    image: u32,
    ids: Vec<u32>,
    at: usize,
}

/// The beginning of a completion.
#[derive(Clone)]
struct Beginning {
    /// Pieces so far, those of all blanks one after the other.
    pieces: Vec<u32>,
    /// Words so far in the blank that is being filled.
    words: usize,
    log_probability: f64,
}

/// Completions of one phrase with a number of pieces for each blank.
struct Beam {
    open: usize,
    lengths: Vec<usize>,
    /// What this choice of lengths weighs.
    prior: f64,
    beginnings: Vec<Beginning>,
}

impl<'a> Filler<'a> {
    pub(super) fn new(model: &'a Model, images: &'a ImageTokens, search: Completing) -> Result<Self, TaskError> {
        model.fit_for("blanks", &[Task::Pretrain])?;
        let tokenizer = model.tokenizer();
        let (continues, begins) = words(tokenizer).partition(|&id| tokenizer.continues_word(id));
        let at_least_one = |number: usize| number.max(1);
        let Completing { top, words, pieces, beams, longer } = search;
        let search = Completing {
            top: at_least_one(top),
            words: at_least_one(words),
            pieces: at_least_one(pieces),
            beams: at_least_one(beams),
            longer: longer.clamp(0.0, 1.0),
        };
        Ok(Self { model, images, search, begins, continues })
    }

    /// Completions of each phrase.
    pub(super) fn complete(&self, open: &[Open]) -> Result<Vec<Proposals>, TaskError> {
        let mut found = Vec::with_capacity(open.len());
        // What is followed at a time is bounded, however many phrases there are.
        for open in open.chunks(BATCH) {
            found.extend(self.complete_some(open)?);
        }
        Ok(found)
    }

    fn complete_some(&self, open: &[Open]) -> Result<Vec<Proposals>, TaskError> {
        let mut phrases = Vec::with_capacity(open.len());
        for open in open {
            let longest = longest(&open.phrase, self.search);
            phrases.push(self.fitted(&open.text, &open.phrase, longest)?);
        }
        let mut beams: Vec<Beam> = Vec::new();
        for (i, phrase) in phrases.iter().enumerate() {
            let choices = lengths(phrase.blanks(), self.search.pieces - 1);
            let priors = self.priors(&choices);
            let start = Beginning { pieces: Vec::new(), words: 0, log_probability: 0.0 };
            beams.extend(choices.into_iter().zip(priors).map(|(lengths, prior)| Beam {
                open: i,
                lengths,
                prior,
                beginnings: vec![start.clone()],
            }));
        }
        let mut found: Vec<Vec<(f64, Completion)>> = vec![Vec::new(); open.len()];
        let mut above = vec![0; open.len()];
        while !beams.is_empty() {
            let asks: Vec<Ask> = beams.iter().flat_map(|beam| self.asks(beam, &phrases, open)).collect();
            let mut grown: Vec<Vec<Beginning>> = beams.iter().map(|_| Vec::new()).collect();
            let owners: Vec<(usize, usize)> = (beams.iter().enumerate())
                .flat_map(|(i, beam)| (0..beam.beginnings.len()).map(move |row| (i, row)))
                .collect();
            self.predict(&asks, |ask, row| {
                let (owner, beginning) = owners[ask];
                let beam = &beams[owner];
                if let (true, Some(against)) = (beam.lengths == [1], &open[beam.open].against) {
                    let likelier = |&&id: &&u32| is_above(against, f64::from(row[id as usize]) + beam.prior, &[id]);
                    above[beam.open] += self.begins.iter().filter(likelier).count();
                }
                grown[owner].extend(self.grow(beam, &beam.beginnings[beginning], row));
            })?;
            let mut live = Vec::with_capacity(beams.len());
            for (mut beam, mut grown) in beams.into_iter().zip(grown) {
                grown.retain(|beginning| self.is_as_written(&beam.lengths, &beginning.pieces));
                grown.sort_by(|a, b| b.log_probability.total_cmp(&a.log_probability));
                grown.truncate(self.search.top.max(self.search.beams));
                beam.beginnings = grown;
                let is_full = |beginning: &Beginning| beginning.pieces.len() == beam.lengths.iter().sum::<usize>();
                if beam.beginnings.first().is_some_and(|beginning| !is_full(beginning)) {
                    live.push(beam);
                    continue;
                }
                for beginning in &beam.beginnings {
                    let log_probability = beam.prior + beginning.log_probability;
                    let completion = self.completion(&beam.lengths, &beginning.pieces, log_probability);
                    found[beam.open].push((log_probability, completion));
                    let against = open[beam.open].against.as_ref().filter(|_| beam.lengths != [1]);
                    let is_counted = against.is_some_and(|one| is_above(one, log_probability, &beginning.pieces));
                    above[beam.open] += usize::from(is_counted);
                }
            }
            beams = live;
        }
        let ranked = |mut found: Vec<(f64, Completion)>| -> Vec<Completion> {
            found.sort_by(|a, b| b.0.total_cmp(&a.0));
            found.into_iter().take(self.search.top).map(|(_, completion)| completion).collect()
        };
        Ok(found.into_iter().zip(above).map(|(found, above)| Proposals { completions: ranked(found), above }).collect())
    }

    /// The log-probability of each completion that is given: pieces for each blank of a phrase.
    pub(super) fn score(&self, given: &[(u32, &str, &Phrase, &[Vec<u32>])]) -> Result<Vec<f64>, TaskError> {
        let (mut asks, mut owners) = (Vec::new(), Vec::new());
        for (i, &(image, text, phrase, answers)) in given.iter().enumerate() {
            let phrase = self.fitted(text, phrase, answers.iter().map(Vec::len).sum())?;
            let wanted: Vec<u32> = answers.concat();
            let lengths: Vec<usize> = answers.iter().map(Vec::len).collect();
            for (known, &piece) in wanted.iter().enumerate() {
                let (ids, at) = self.row(&phrase, &lengths, &wanted[..known]);
                asks.push(Ask { image, ids, at });
                owners.push((i, piece));
            }
        }
        let mut scores: Vec<f64> = given.iter().map(|(_, _, _, answers)| self.prior_of(answers)).collect();
        self.predict(&asks, |ask, row| {
            let (owner, piece) = owners[ask];
            scores[owner] += f64::from(row[piece as usize]);
        })?;
        Ok(scores)
    }

    fn fitted(&self, text: &str, phrase: &Phrase, pieces: usize) -> Result<Phrase, TaskError> {
        phrase.check_fit(self.model, text, pieces)?;
        check_choices(text, phrase, self.search)?;
        let mut phrase = phrase.clone();
        phrase.fit(self.model.config().max_tokens, pieces);
        Ok(phrase)
    }

    /// Log of how likely each choice of lengths is before the model has been asked: each piece beyond one for every word that a
    /// blank may have makes it less so by the same factor, and all choices together have probability 1.
    fn priors(&self, choices: &[Vec<usize>]) -> Vec<f64> {
        let all: f64 = choices.iter().map(|lengths| self.weight(lengths)).sum();
        choices.iter().map(|lengths| (self.weight(lengths) / all).ln()).collect()
    }

    fn weight(&self, lengths: &[usize]) -> f64 {
        let more: usize = lengths.iter().map(|length| length.saturating_sub(self.search.words)).sum();
        f64::from(self.search.longer).powi(i32::try_from(more).unwrap_or(i32::MAX))
    }

    /// [`Self::priors`] of a completion that may be longer than those that are looked for.
    fn prior_of(&self, answers: &[Vec<u32>]) -> f64 {
        let choices = lengths(answers.len(), self.search.pieces - 1);
        let all: f64 = choices.iter().map(|lengths| self.weight(lengths)).sum();
        let own: Vec<usize> = answers.iter().map(Vec::len).collect();
        (self.weight(&own) / all).ln()
    }

    /// A phrase with `known` pieces in its blanks, the rest of which is masked; and where the next piece belongs.
    fn row(&self, phrase: &Phrase, lengths: &[usize], known: &[u32]) -> (Vec<u32>, usize) {
        let tokenizer = self.model.tokenizer();
        let mut before = 0;
        let (ids, starts) = phrase.row(tokenizer.cls_id(), |blank| {
            let own = before..before + lengths[blank];
            before = own.end;
            own.map(|i| known.get(i).copied().unwrap_or(tokenizer.mask_id())).collect()
        });
        let (blank, piece) = place(lengths, known.len());
        (ids, starts[blank] + piece)
    }

    fn asks(&self, beam: &Beam, phrases: &[Phrase], open: &[Open]) -> Vec<Ask> {
        let ask = |beginning: &Beginning| {
            let (ids, at) = self.row(&phrases[beam.open], &beam.lengths, &beginning.pieces);
            Ask { image: open[beam.open].image, ids, at }
        };
        beam.beginnings.iter().map(ask).collect()
    }

    /// The likeliest ways to go on with a beginning, given the log-probabilities of the next piece.
    fn grow(&self, beam: &Beam, beginning: &Beginning, row: &[f32]) -> Vec<Beginning> {
        let in_blank = place(&beam.lengths, beginning.pieces.len()).1;
        let begins = (in_blank == 0 || beginning.words < self.search.words).then_some((&self.begins, true));
        let continues = (in_blank > 0).then_some((&self.continues, false));
        let next = [begins, continues].into_iter().flatten();
        let mut next: Vec<(u32, bool)> = next.flat_map(|(ids, new)| ids.iter().map(move |&id| (id, new))).collect();
        let width = self.search.top.max(self.search.beams);
        let likelier =
            |a: &(u32, bool), b: &(u32, bool)| row[b.0 as usize].total_cmp(&row[a.0 as usize]).then(a.0.cmp(&b.0));
        if next.len() > width {
            next.select_nth_unstable_by(width - 1, likelier);
            next.truncate(width);
        }
        let grown = |(id, new): (u32, bool)| Beginning {
            pieces: beginning.pieces.iter().copied().chain([id]).collect(),
            words: if in_blank == 0 { 1 } else { beginning.words + usize::from(new) },
            log_probability: beginning.log_probability + f64::from(row[id as usize]),
        };
        next.into_iter().map(grown).collect()
    }

    /// Whether the blank that was filled last has the pieces that the tokenizer would cut its text into: of the many ways to
    /// spell a word in pieces only that one counts.
    fn is_as_written(&self, lengths: &[usize], pieces: &[u32]) -> bool {
        let mut end = 0;
        for &length in lengths {
            end += length;
            if end == pieces.len() && length > 1 {
                let own = &pieces[end - length..];
                let tokenizer = self.model.tokenizer();
                return tokenizer.tokens(tokenizer.decode(own).trim()).is_ok_and(|written| written == own);
            }
        }
        true
    }

    fn completion(&self, lengths: &[usize], pieces: &[u32], log_probability: f64) -> Completion {
        let mut rest = pieces;
        let word = |&length: &usize| {
            let (own, others) = rest.split_at(length);
            rest = others;
            self.model.tokenizer().decode(own).trim().to_owned()
        };
        Completion { words: lengths.iter().map(word).collect(), probability: log_probability.exp() as f32 }
    }

    /// Asks the language head; `each` gets the number of the ask and the log-probabilities `[V]` of the piece there.
    fn predict(&self, asks: &[Ask], mut each: impl FnMut(usize, &[f32])) -> Result<(), TaskError> {
        let model = self.model;
        for (chunk, asks) in asks.chunks(4 * BATCH).enumerate() {
            let index: Vec<u32> = asks.iter().map(|ask| ask.image).collect();
            let tokens = model.pad(&asks.iter().map(|ask| ask.ids.clone()).collect::<Vec<_>>())?;
            let fused =
                model.look(&model.encode_texts(&tokens)?, &tokens.mask, self.images, &index, Attention::Full)?;
            let (b, t, _) = fused.dims3()?;
            let places: Vec<u32> = asks.iter().enumerate().map(|(i, ask)| (i * t + ask.at) as u32).collect();
            let places = candle_core::Tensor::new(places, model.device())?;
            let logits = model
                .xvlm()
                .mlm_logits(&fused.reshape((b * t, ()))?.index_select(&places, 0)?)?
                .to_dtype(DType::F32)?;
            let log_probabilities = kernels::log_softmax(&logits, D::Minus1)?.to_vec2::<f32>()?;
            for (i, row) in log_probabilities.iter().enumerate() {
                each(chunk * 4 * BATCH + i, row);
            }
        }
        Ok(())
    }
}

/// Whether pieces are likelier than those of an answer; the answer itself, asked about in another batch, may differ in its last
/// digits.
fn is_above((log_probability, pieces): &(f64, Vec<u32>), of_others: f64, others: &[u32]) -> bool {
    of_others > *log_probability && pieces != others
}

/// Pieces that words are made of: with a letter or a digit, and no special tokens.
fn words(tokenizer: &TextTokenizer) -> impl Iterator<Item = u32> {
    let is_special = |token: &str| {
        let bracketed = |open, close| token.len() > 2 && token.starts_with(open) && token.ends_with(close);
        bracketed('[', ']') || bracketed('<', '>')
    };
    (0..tokenizer.vocab_size() as u32).filter(move |&id| {
        let token = tokenizer.id_to_token(id);
        token.is_some_and(|token| !is_special(&token) && token.chars().any(char::is_alphanumeric))
    })
}

/// The most pieces in all blanks of a phrase together.
pub(super) fn longest(phrase: &Phrase, search: Completing) -> usize {
    phrase.blanks() + search.pieces.max(1) - 1
}

/// The most choices of lengths that are followed for one phrase: each is asked about on its own.
const CHOICES: u128 = 4096;

/// Refuses a phrase with more choices of [`lengths`] than can be followed.
pub(super) fn check_choices(text: &str, phrase: &Phrase, search: Completing) -> Result<(), TaskError> {
    let (blanks, pieces) = (phrase.blanks(), search.pieces.max(1));
    let found = choices(blanks, pieces - 1);
    match found <= CHOICES {
        true => Ok(()),
        false => {
            let message = format!(
                "expected at most {CHOICES} ways to share out word pieces, found more, with {blanks} blanks and up to {pieces} \
                 pieces in each"
            );
            Err(ConfigProblem { file: format!("phrase {text:?}"), message }.into())
        }
    }
}

/// How many [`lengths`] there are: `blanks` out of `blanks + more`; no more than the first number above [`CHOICES`] that is met.
fn choices(blanks: usize, more: usize) -> u128 {
    let (few, many) = (blanks.min(more) as u128, blanks.max(more) as u128);
    let mut choices = 1;
    for i in 1..=few {
        choices = choices * (many + i) / i;
        if choices > CHOICES {
            break;
        }
    }
    choices
}

/// Numbers of pieces for each of some blanks: one each, and at most `more` beyond that in all.
fn lengths(blanks: usize, more: usize) -> Vec<Vec<usize>> {
    let mut choices = vec![Vec::new()];
    for _ in 0..blanks {
        choices = choices
            .into_iter()
            .flat_map(|choice: Vec<usize>| {
                let left = more - choice.iter().map(|length| length - 1).sum::<usize>();
                (1..=1 + left).map(move |length| [choice.as_slice(), &[length]].concat())
            })
            .collect();
    }
    choices
}

/// The blank that piece `piece` of a completion belongs to, and its place in it.
fn place(lengths: &[usize], piece: usize) -> (usize, usize) {
    let mut start = 0;
    for (blank, &length) in lengths.iter().enumerate() {
        if piece < start + length {
            return (blank, piece - start);
        }
        start += length;
    }
    (lengths.len(), 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_share_what_is_beyond_one_each() {
        assert_eq!(lengths(1, 2), [vec![1], vec![2], vec![3]]);
        assert_eq!(lengths(2, 1), [vec![1, 1], vec![1, 2], vec![2, 1]]);
        assert_eq!(lengths(3, 3).len(), 20);
        for (blanks, more) in [(1, 0), (1, 9), (3, 3), (5, 2), (2, 7)] {
            assert_eq!(choices(blanks, more), lengths(blanks, more).len() as u128);
        }
        assert!(choices(40, 9) > CHOICES && choices(usize::MAX, usize::MAX) > CHOICES);
        assert_eq!((place(&[2, 1], 1), place(&[2, 1], 2)), ((0, 1), (1, 0)));
    }
}
