//! Which token is appended to which text, given the logits a model has for the next one: greedy and beam search, and drawing.
//!
//! All do what `generate` of transformers 4.12 does, which the original calls (`BeamSearchScorer`, length penalty 1, no early
//! stopping; of the warpers temperature, top-k and top-p, in this order), so that the same logits give the same texts, or the
//! same chances.

use rand::{Rng, RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

/// How a text is searched for.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Search {
    /// Texts followed at a time; 1 is greedy. The original's captioning uses 3.
    pub beams: usize,
    /// No end before that many new tokens.
    pub min_tokens: usize,
    /// No more than that many new tokens.
    pub max_tokens: usize,
    /// The logits of tokens that a text has already are divided by this if positive, multiplied if negative (Keskar et al.
    /// 2019); 1 leaves them alone.
    pub repetition_penalty: f32,
    /// Whether a greedy text that does not end by itself has its last token replaced by the end (as the original's `greedy`).
    pub end_at_limit: bool,
}

impl Default for Search {
    fn default() -> Self {
        Self { beams: 3, min_tokens: 5, max_tokens: 30, repetition_penalty: 1.0, end_at_limit: false }
    }
}

impl Search {
    /// The first value that is out of its range: its name, what was expected and what was found.
    pub(crate) fn problem(&self) -> Option<(&'static str, String, String)> {
        let Self { beams, min_tokens, max_tokens, repetition_penalty: penalty, .. } = *self;
        let least = || "at least 1".to_owned();
        let is_positive = penalty > 0.0 && penalty.is_finite();
        [
            (beams > 0, "beams", least(), beams.to_string()),
            (max_tokens > 0, "max_tokens", least(), max_tokens.to_string()),
            (
                min_tokens <= max_tokens,
                "min_tokens",
                format!("at most max_tokens ({max_tokens})"),
                min_tokens.to_string(),
            ),
            (is_positive, "repetition_penalty", "a positive number".to_owned(), penalty.to_string()),
        ]
        .into_iter()
        .find_map(|(holds, field, expected, found)| (!holds).then_some((field, expected, found)))
    }

    /// For answers, which may be one word.
    pub fn answers() -> Self {
        Self { beams: 1, min_tokens: 1, max_tokens: 10, ..Self::default() }
    }
}

/// How the next token is drawn, where a text is not searched for. Its defaults leave the model's distribution as it is.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Sampling {
    /// The logits are divided by this: below 1 likely tokens become likelier.
    pub temperature: f32,
    /// Only that many of the likeliest tokens are drawn, and those as likely as the last of them; 0: all.
    pub top_k: usize,
    /// Only the likeliest tokens are drawn whose probabilities sum to more than this, as few of them as do (the nucleus,
    /// Holtzman et al. 2020); 1: all.
    pub top_p: f32,
}

impl Default for Sampling {
    fn default() -> Self {
        Self { temperature: 1.0, top_k: 0, top_p: 1.0 }
    }
}

impl Sampling {
    /// Checks every value.
    ///
    /// # Errors
    /// Which is out of its range, what was expected and what was found.
    pub fn check(&self) -> Result<(), String> {
        let Self { temperature, top_p, .. } = *self;
        if !(temperature > 0.0 && temperature.is_finite()) {
            return Err(format!("temperature: expected a positive number, found {temperature}"));
        }
        match top_p > 0.0 && top_p <= 1.0 {
            true => Ok(()),
            false => Err(format!("top_p: expected above 0 and at most 1, found {top_p}")),
        }
    }

    /// Logits of the tokens that may be drawn; minus infinity for all others.
    fn warp(&self, logits: &mut [f32]) {
        if self.temperature != 1.0 {
            logits.iter_mut().for_each(|logit| *logit /= self.temperature);
        }
        if (1..logits.len()).contains(&self.top_k) {
            let mut sorted = logits.to_vec();
            let (_, least, _) = sorted.select_nth_unstable_by(self.top_k - 1, |a, b| b.total_cmp(a));
            let least = *least;
            logits.iter_mut().filter(|logit| **logit < least).for_each(|logit| *logit = f32::NEG_INFINITY);
        }
        if self.top_p < 1.0 {
            let probabilities = log_softmax(logits);
            let mut order: Vec<usize> = (0..logits.len()).collect();
            order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
            let mut before = 0.0;
            for token in order {
                if before > f64::from(self.top_p) {
                    logits[token] = f32::NEG_INFINITY;
                }
                before += f64::from(probabilities[token]).exp();
            }
        }
    }
}

/// A text that was found.
#[derive(Clone, Debug, PartialEq)]
pub struct Sequence {
    /// Its tokens, the prompt included; the end is among them only if [`Search::end_at_limit`] put it there.
    pub ids: Vec<u32>,
    /// Beam search: the sum of the new tokens' log-probabilities over the length, prompt included. Greedy and drawn: their mean,
    /// that of the end included; of what is drawn, as it was drawn.
    pub score: f32,
}

#[derive(Clone)]
struct Live {
    ids: Vec<u32>,
    log_probability: f32,
    /// The place, among the texts that were live before, of the one it continues.
    parent: usize,
}

/// The texts that continue one prompt.
struct Group {
    prompt: usize,
    live: Vec<Live>,
    ended: Vec<Sequence>,
    /// How the next token is drawn, and with what; without it, it is searched for.
    draw: Option<(Sampling, ChaCha8Rng)>,
}

/// Searches for continuations of several prompts at once.
pub struct TextSearch {
    search: Search,
    end: u32,
    groups: Vec<Group>,
}

impl TextSearch {
    /// Starts from prompts, none of them empty; `end` is the token that ends a text.
    pub fn new(prompts: impl IntoIterator<Item = Vec<u32>>, search: Search, end: u32) -> Self {
        let start = |(parent, ids): (usize, Vec<u32>)| Group {
            prompt: ids.len(),
            live: vec![Live { ids, log_probability: 0.0, parent }],
            ended: Vec::new(),
            draw: None,
        };
        let mut started = Self { search, end, groups: prompts.into_iter().enumerate().map(start).collect() };
        if search.max_tokens == 0 {
            started.groups.iter_mut().for_each(|group| group.stop(search));
        }
        started
    }

    /// Starts from prompts as [`Self::new`], but each text's next token is drawn; [`Search::beams`] is of no account. Each text
    /// gets a generator of its own from the next number of `rng`, so what is drawn for it does not depend on the others.
    pub fn drawn(
        prompts: impl IntoIterator<Item = Vec<u32>>,
        search: Search,
        sampling: Sampling,
        end: u32,
        rng: &mut impl RngCore,
    ) -> Self {
        let mut started = Self::new(prompts, Search { beams: 1, ..search }, end);
        for group in &mut started.groups {
            group.draw = Some((sampling, ChaCha8Rng::seed_from_u64(rng.next_u64())));
        }
        started
    }

    /// The texts to be continued, each with the number of its prompt, best first; none when the search is over.
    pub fn live(&self) -> impl Iterator<Item = (usize, &[u32])> {
        let groups = self.groups.iter().enumerate();
        groups.flat_map(|(number, group)| group.live.iter().map(move |live| (number, live.ids.as_slice())))
    }

    /// Whether no text is to be continued.
    pub fn is_over(&self) -> bool {
        self.groups.iter().all(|group| group.live.is_empty())
    }

    /// For each live text, the place of the one it continues among those that were live before the last step.
    pub fn parents(&self) -> impl Iterator<Item = u32> {
        self.groups.iter().flat_map(|group| group.live.iter().map(|live| live.parent as u32))
    }

    /// Continues each live text, given the logits of its next token, one row a text.
    pub fn advance<'a>(&mut self, logits: impl IntoIterator<Item = &'a [f32]>) {
        let mut logits = logits.into_iter();
        let mut first = 0;
        for group in &mut self.groups {
            let rows: Vec<&[f32]> = logits.by_ref().take(group.live.len()).collect();
            match self.search.beams {
                0 | 1 => group.advance_alone(&rows, self.search, self.end),
                _ => group.advance(&rows, self.search, self.end),
            }
            group.live.iter_mut().for_each(|live| live.parent += first);
            first += rows.len();
        }
    }

    /// The best text of each prompt.
    pub fn finish(mut self) -> Vec<Sequence> {
        let search = self.search;
        self.groups.iter_mut().for_each(|group| group.stop(search));
        let best = |group: Group| group.ended.into_iter().max_by(|a, b| a.score.total_cmp(&b.score));
        self.groups.into_iter().filter_map(best).collect()
    }
}

impl Group {
    fn length(&self) -> usize {
        self.live.first().map_or(0, |live| live.ids.len())
    }

    fn penalise(&self, row: usize, scores: &mut [f32], penalty: f32) {
        if penalty == 1.0 {
            return;
        }
        let mut seen = self.live[row].ids.clone();
        seen.sort_unstable();
        seen.dedup();
        for token in seen {
            if let Some(score) = scores.get_mut(token as usize) {
                *score *= if *score < 0.0 { penalty } else { 1.0 / penalty };
            }
        }
    }

    fn forbid_end(&self, scores: &mut [f32], search: Search, end: u32) {
        let is_short = self.length() < self.prompt + search.min_tokens;
        if let (true, Some(score)) = (is_short, scores.get_mut(end as usize)) {
            *score = f32::NEG_INFINITY;
        }
    }

    fn is_full(&self, search: Search) -> bool {
        self.length() >= self.prompt + search.max_tokens
    }

    fn advance(&mut self, logits: &[&[f32]], search: Search, end: u32) {
        if self.live.is_empty() {
            return;
        }
        let (beams, length) = (search.beams, self.length());
        let of_row = |(row, (logits, live)): (usize, (&&[f32], &Live))| {
            let mut scores = log_softmax(logits);
            self.penalise(row, &mut scores, search.repetition_penalty);
            self.forbid_end(&mut scores, search, end);
            let scored = |(score, token)| (live.log_probability + score, row, token);
            best(&scores, 2 * beams).into_iter().map(scored).collect::<Vec<_>>()
        };
        let mut candidates: Vec<(f32, usize, u32)> =
            logits.par_iter().zip(&self.live).enumerate().flat_map_iter(of_row).collect();
        candidates.sort_by(|a, b| b.0.total_cmp(&a.0).then_with(|| (a.1, a.2).cmp(&(b.1, b.2))));
        candidates.truncate(2 * beams);
        let best = candidates.first().map_or(f32::NEG_INFINITY, |best| best.0);
        let mut live = Vec::with_capacity(beams);
        for (rank, (log_probability, row, token)) in candidates.into_iter().enumerate() {
            let mut ids = self.live[row].ids.clone();
            if token == end {
                if rank < beams {
                    self.end_with(Sequence { ids, score: log_probability / length as f32 }, beams);
                }
                continue;
            }
            ids.push(token);
            live.push(Live { ids, log_probability, parent: row });
            if live.len() == beams {
                break;
            }
        }
        self.live = live;
        let worst = self.ended.iter().map(|ended| ended.score).fold(f32::INFINITY, f32::min);
        if self.ended.len() >= beams && worst >= best / length as f32 {
            self.live.clear();
        } else if self.is_full(search) {
            self.stop(search);
        }
    }

    /// Continues the one text of a group by the likeliest token, or by one that is drawn.
    fn advance_alone(&mut self, logits: &[&[f32]], search: Search, end: u32) {
        let (Some(logits), false) = (logits.first(), self.live.is_empty()) else { return };
        let mut scores = logits.to_vec();
        self.penalise(0, &mut scores, search.repetition_penalty);
        self.forbid_end(&mut scores, search, end);
        if let Some((sampling, _)) = &self.draw {
            sampling.warp(&mut scores);
        }
        let log_probabilities = log_softmax(&scores);
        let likeliest = || {
            let tokens = 0..scores.len() as u32;
            tokens.max_by(|a, b| scores[*a as usize].total_cmp(&scores[*b as usize]).then(b.cmp(a)))
        };
        let drawn = self.draw.as_mut().and_then(|(_, rng)| draw(&log_probabilities, rng));
        let Some(token) = drawn.or_else(likeliest) else { return };
        let log_probability = log_probabilities[token as usize];
        let live = &mut self.live[0];
        live.parent = 0;
        live.log_probability += log_probability;
        if token == end {
            let score = live.log_probability / (live.ids.len() + 1 - self.prompt) as f32;
            self.ended.push(Sequence { ids: std::mem::take(&mut live.ids), score });
            self.live.clear();
            return;
        }
        live.ids.push(token);
        if self.is_full(search) {
            if let (true, Some(last)) = (search.end_at_limit, self.live[0].ids.last_mut()) {
                *last = end;
            }
            self.stop(search);
        }
    }

    /// What is live ends where it is.
    fn stop(&mut self, search: Search) {
        let greedy = search.beams < 2;
        for Live { ids, log_probability, .. } in std::mem::take(&mut self.live) {
            let length = if greedy { ids.len() - self.prompt } else { ids.len() };
            let score = log_probability / length.max(1) as f32;
            self.end_with(Sequence { ids, score }, search.beams.max(1));
        }
    }

    /// Keeps the best `beams` that have ended.
    fn end_with(&mut self, sequence: Sequence, beams: usize) {
        self.ended.push(sequence);
        if self.ended.len() > beams {
            let worst = (0..self.ended.len()).min_by(|&a, &b| self.ended[a].score.total_cmp(&self.ended[b].score));
            worst.map(|worst| self.ended.remove(worst));
        }
    }
}

/// The `count` tokens of the highest scores, the best first; of equal ones the first.
fn best(scores: &[f32], count: usize) -> Vec<(f32, u32)> {
    let mut best: Vec<(f32, u32)> = Vec::with_capacity(count + 1);
    for (token, &score) in (0u32..).zip(scores) {
        if best.len() == count && best.last().is_none_or(|worst| score.total_cmp(&worst.0).is_le()) {
            continue;
        }
        best.insert(best.partition_point(|other| other.0.total_cmp(&score).is_ge()), (score, token));
        best.truncate(count);
    }
    best
}

/// A token by its probability; none if the probabilities are no numbers.
fn draw(log_probabilities: &[f32], rng: &mut impl Rng) -> Option<u32> {
    let mut left = rng.random::<f64>();
    let mut last = None;
    for (token, log_probability) in (0u32..).zip(log_probabilities) {
        let probability = f64::from(*log_probability).exp();
        if probability > 0.0 {
            last = Some(token);
            left -= probability;
            if left < 0.0 {
                break;
            }
        }
    }
    last
}

/// Log-probabilities of logits. The largest is taken away first: numbers near 0 have the digits that differences need.
fn log_softmax(logits: &[f32]) -> Vec<f32> {
    let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let total: f64 = logits.iter().map(|&logit| f64::from(logit - top).exp()).sum();
    let log_total = total.ln() as f32;
    logits.iter().map(|logit| (logit - top) - log_total).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const END: u32 = 0;

    /// Runs a search over three tokens (0 ends) whose logits depend on the last token.
    fn run(search: Search, next: [[f32; 3]; 3]) -> Sequence {
        let mut texts = TextSearch::new([vec![1]], search, END);
        loop {
            let rows: Vec<[f32; 3]> = texts.live().map(|(_, ids)| next[*ids.last().unwrap() as usize]).collect();
            if rows.is_empty() {
                return texts.finish().remove(0);
            }
            texts.advance(rows.iter().map(<[f32; 3]>::as_slice));
        }
    }

    fn logits(probabilities: [[f32; 3]; 3]) -> [[f32; 3]; 3] {
        probabilities.map(|row| row.map(f32::ln))
    }

    #[test]
    fn the_best_are_the_first_of_a_stable_order() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        for len in [0, 1, 5, 6, 7, 1000] {
            // Few different scores, so that many are equal.
            let scores: Vec<f32> = (0..len).map(|_| (rng.random_range(0..20) - 10) as f32).collect();
            let mut sorted: Vec<(f32, u32)> = scores.iter().copied().zip(0..).collect();
            sorted.sort_by(|a, b| b.0.total_cmp(&a.0));
            sorted.truncate(6);
            assert_eq!(best(&scores, 6), sorted);
        }
        assert!(best(&[1.0], 0).is_empty());
    }

    #[test]
    fn probabilities_sum_to_one() {
        let row = log_softmax(&[1000.0, 1001.0, 999.0]);
        assert!((row.iter().map(|p| p.exp()).sum::<f32>() - 1.0).abs() < 1e-5);
    }

    #[test]
    fn beams_find_what_greed_misses() {
        // The best first token (1) leads nowhere in particular; 2 is followed by a sure end.
        let next = logits([[1.0, 0.0, 0.0], [0.01, 0.51, 0.48], [0.98, 0.01, 0.01]]);
        let search = Search { beams: 1, min_tokens: 0, max_tokens: 4, ..Search::default() };
        assert_eq!(run(search, next).ids, [1, 1, 1, 1, 1]);
        let found = run(Search { beams: 2, ..search }, next);
        assert_eq!(found.ids, [1, 2]);
        // Two tokens, the prompt among them, and the end.
        assert!((found.score - (0.48f32 * 0.98).ln() / 2.0).abs() < 1e-6, "{}", found.score);
    }

    #[test]
    fn limits_hold() {
        let ends = logits([[1.0, 0.0, 0.0], [0.9, 0.06, 0.04], [0.9, 0.06, 0.04]]);
        let goes_on = logits([[1.0, 0.0, 0.0], [0.1, 0.6, 0.3], [0.1, 0.6, 0.3]]);
        for beams in [1, 2] {
            let search = Search { beams, min_tokens: 0, max_tokens: 3, ..Search::default() };
            assert_eq!(run(search, ends).ids, [1]);
            assert_eq!(run(Search { min_tokens: 2, ..search }, ends).ids, [1, 1, 1]);
            assert_eq!(run(search, goes_on).ids, [1, 1, 1, 1]);
            assert_eq!(run(Search { max_tokens: 0, ..search }, goes_on).ids, [1]);
        }
        let search = Search { beams: 1, min_tokens: 0, max_tokens: 3, end_at_limit: true, ..Search::default() };
        assert_eq!(run(search, goes_on).ids, [1, 1, 1, END]);
    }

    #[test]
    fn repetition_costs() {
        let next = [[0.0; 3], [-9.0, 2.0, 1.9], [-9.0, 2.0, 1.9]];
        let search = Search { beams: 1, min_tokens: 0, max_tokens: 1, ..Search::default() };
        assert_eq!(run(search, next).ids, [1, 1]);
        assert_eq!(run(Search { repetition_penalty: 1.5, ..search }, next).ids, [1, 2]);
    }

    #[test]
    fn warping_leaves_what_transformers_leaves() {
        // Softmax of the logits: 0.4, 0.3, 0.2, 0.1.
        let logits = [0.3f32, 0.1, 0.4, 0.2].map(f32::ln);
        let kept = |sampling: Sampling| {
            let mut warped = logits.to_vec();
            sampling.warp(&mut warped);
            (0..4).filter(|&i| warped[i].is_finite()).collect::<Vec<_>>()
        };
        let all = Sampling::default();
        assert_eq!(kept(all), [0, 1, 2, 3]);
        assert_eq!(kept(Sampling { top_k: 2, ..all }), [0, 2]);
        assert_eq!(kept(Sampling { top_k: 9, ..all }), [0, 1, 2, 3]);
        // The token that passes the threshold is kept; of a threshold below the likeliest, that one is.
        assert_eq!(kept(Sampling { top_p: 0.65, ..all }), [0, 2]);
        assert_eq!(kept(Sampling { top_p: 0.75, ..all }), [0, 2, 3]);
        assert_eq!(kept(Sampling { top_p: 0.01, ..all }), [2]);
        // The nucleus is that of what temperature and top-k have left: of 4/7 and 3/7.
        assert_eq!(kept(Sampling { top_k: 2, top_p: 0.5, ..all }), [2]);
        assert_eq!(kept(Sampling { top_p: 0.45, ..all }), [0, 2]);
        assert_eq!(kept(Sampling { top_p: 0.45, temperature: 0.5, ..all }), [2]);
        // Tokens as likely as the last of the top k are kept.
        let mut equal = [1.0, 1.0, 0.0, 1.0];
        Sampling { top_k: 2, ..all }.warp(&mut equal);
        assert_eq!(equal, [1.0, 1.0, f32::NEG_INFINITY, 1.0]);

        for wrong in
            [Sampling { temperature: 0.0, ..all }, Sampling { top_p: 0.0, ..all }, Sampling { top_p: 1.1, ..all }]
        {
            assert!(wrong.check().is_err(), "{wrong:?}");
        }
        assert_eq!(all.check(), Ok(()));
    }

    fn drawn(search: Search, sampling: Sampling, seed: u64, texts: usize, next: [[f32; 3]; 3]) -> Vec<Sequence> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut texts = TextSearch::drawn(vec![vec![1]; texts], search, sampling, END, &mut rng);
        while !texts.is_over() {
            let rows: Vec<[f32; 3]> = texts.live().map(|(_, ids)| next[*ids.last().unwrap() as usize]).collect();
            texts.advance(rows.iter().map(<[f32; 3]>::as_slice));
        }
        texts.finish()
    }

    #[test]
    fn tokens_are_drawn_as_often_as_they_are_likely() {
        let next = logits([[1.0, 0.0, 0.0], [0.5, 0.2, 0.3], [1.0, 0.0, 0.0]]);
        let search = Search { min_tokens: 0, max_tokens: 1, ..Search::default() };
        let count = 4000;
        let shares = |sampling| {
            let texts = drawn(search, sampling, 3, count, next);
            let share = |ids: &[u32]| texts.iter().filter(|text| text.ids == ids).count() as f64 / count as f64;
            [share(&[1]), share(&[1, 1]), share(&[1, 2])]
        };
        // Four standard deviations of a share of 4000.
        let close = |found: [f64; 3], expected: [f64; 3]| {
            found.iter().zip(expected).for_each(|(f, e)| assert!((f - e).abs() <= 0.032, "{found:?} for {expected:?}"));
        };
        let all = Sampling::default();
        close(shares(all), [0.5, 0.2, 0.3]);
        close(shares(Sampling { top_k: 2, ..all }), [0.625, 0.0, 0.375]);
        close(shares(Sampling { top_p: 0.4, ..all }), [1.0, 0.0, 0.0]);
        close(shares(Sampling { temperature: 0.5, ..all }), [0.25 / 0.38, 0.04 / 0.38, 0.09 / 0.38]);
        let forced = drawn(Search { min_tokens: 1, ..search }, all, 3, 200, next);
        assert!(forced.iter().all(|text| text.ids.len() == 2));
    }

    #[test]
    fn what_is_drawn_follows_from_the_seed_alone() {
        let next = logits([[1.0, 0.0, 0.0], [0.1, 0.5, 0.4], [0.2, 0.4, 0.4]]);
        let search = Search { min_tokens: 0, max_tokens: 6, ..Search::default() };
        let of = |seed, texts| drawn(search, Sampling::default(), seed, texts, next);
        let five = of(7, 5);
        assert_eq!(five, of(7, 5));
        assert_ne!(five, of(8, 5));
        // Whatever the others do, and although some end before it.
        assert_eq!(five[..2], of(7, 2));
        assert!(five.iter().any(|text| text.ids != five[0].ids));
        let score = |text: &Sequence| {
            let mut ids = text.ids.clone();
            ids.extend((ids.len() < 7).then_some(END));
            let step = |pair: &[u32]| next[pair[0] as usize][pair[1] as usize];
            ids.windows(2).map(step).sum::<f32>() / (ids.len() - 1) as f32
        };
        five.iter().for_each(|text| assert!((text.score - score(text)).abs() < 1e-5, "{text:?}"));
    }
}
