//! Visual question answering: consensus with ten people (the official `vqaEval.py` of GT-Vision-Lab/VQA).

use std::collections::{BTreeMap, HashMap};
use std::sync::LazyLock;

use serde::Serialize;

use crate::error::{MetricsError, some};
use crate::{is_python_space, percent, python_words};

/// Contractions by what is written without their apostrophes. Keys that the official table has in capitals are left
/// out: it is asked for lower-case words only.
const CONTRACTIONS: &str = "\
    'ow'sat='ow's'at 'ows'at='ow's'at aint=ain't arent=aren't cant=can't couldn'tve=couldn't've couldnt=couldn't
    couldnt've=couldn't've couldve=could've didnt=didn't doesnt=doesn't dont=don't hadn'tve=hadn't've hadnt=hadn't
    hadnt've=hadn't've hasnt=hasn't havent=haven't he'dve=he'd've hed=he'd hed've=he'd've hes=he's howd=how'd
    howll=how'll hows=how's isnt=isn't it'dve=it'd've itd=it'd itd've=it'd've itll=it'll maam=ma'am
    mightn'tve=mightn't've mightnt=mightn't mightnt've=mightn't've mightve=might've mustnt=mustn't mustve=must've
    neednt=needn't notve=not've oclock=o'clock oughtnt=oughtn't ow's'at='ow's'at shant=shan't she'dve=she'd've
    shed've=she'd've shouldn'tve=shouldn't've shouldnt=shouldn't shouldnt've=shouldn't've shouldve=should've
    somebody'd=somebodyd somebody'dve=somebody'd've somebodyd've=somebody'd've somebodyll=somebody'll
    somebodys=somebody's someone'dve=someone'd've someoned=someone'd someoned've=someone'd've someonell=someone'll
    someones=someone's something'dve=something'd've somethingd=something'd somethingd've=something'd've
    somethingll=something'll thats=that's there'dve=there'd've thered=there'd thered've=there'd've therere=there're
    theres=there's they'dve=they'd've theyd=they'd theyd've=they'd've theyll=they'll theyre=they're theyve=they've
    twas='twas wasnt=wasn't we'dve=we'd've wed've=we'd've werent=weren't weve=we've whatll=what'll whatre=what're
    whats=what's whatve=what've whens=when's whered=where'd wheres=where's whereve=where've who'dve=who'd've
    whod=who'd whod've=who'd've wholl=who'll whos=who's whove=who've whyll=why'll whyre=why're whys=why's wont=won't
    wouldn'tve=wouldn't've wouldnt=wouldn't wouldnt've=wouldn't've wouldve=would've y'all'dve=y'all'd've
    y'alld've=y'all'd've y'allll=y'all'll yall=y'all yall'd've=y'all'd've yall'll=y'all'll you'dve=you'd've
    youd=you'd youd've=you'd've youll=you'll youre=you're youve=you've
";

/// Words for numbers, and what the official evaluation takes for one.
const NUMBERS: [(&str, &str); 12] = [
    ("none", "0"),
    ("zero", "0"),
    ("one", "1"),
    ("two", "2"),
    ("three", "3"),
    ("four", "4"),
    ("five", "5"),
    ("six", "6"),
    ("seven", "7"),
    ("eight", "8"),
    ("nine", "9"),
    ("ten", "10"),
];

const ARTICLES: [&str; 3] = ["a", "an", "the"];

/// In the official order, which does not matter: each is looked for in the answer as given.
const PUNCTUATION: &str = ";/[]\"{}()=+\\_-><@`,?!";

/// What takes the place of a word.
static REPLACEMENTS: LazyLock<HashMap<&str, &str>> = LazyLock::new(|| {
    let contractions = CONTRACTIONS.split_whitespace().filter_map(|pair| pair.split_once('='));
    contractions.chain(NUMBERS).collect()
});

/// Consensus of one prediction with the answers of people, 0 to 1.
///
/// Each person in turn is left out; if `n` of the others gave the predicted answer, that is worth min(1, n/3); the
/// mean counts. Prediction and answers are normalised first, but only if people disagree. That is the official measure,
/// which is for ten answers; of fewer than four, where nothing could be worth 1 by it, all the others count instead of
/// three, and a single answer is right or wrong.
///
/// # Errors
/// If there are no answers.
pub fn consensus<A: AsRef<str>>(prediction: &str, answers: &[A]) -> Result<f64, MetricsError> {
    some("answers to a question", answers.len())?;
    let mut prediction = one_line(prediction);
    let mut answers: Vec<String> = answers.iter().map(|answer| one_line(answer.as_ref())).collect();
    if answers.iter().any(|answer| *answer != answers[0]) {
        prediction = normalise(&prediction);
        answers.iter_mut().for_each(|answer| *answer = normalise(answer));
    }
    Ok(agreement(&prediction, &answers))
}

/// The same as the evaluation in X-VLM's repository counts it (`vqaTools/vqaEval.py`), which differs from the official
/// one: the prediction is always normalised; answers, where people disagree, lose their punctuation only (and keep their
/// articles, capitals and words for numbers), and are not trimmed.
///
/// # Errors
/// If there are no answers.
pub fn consensus_as_original<A: AsRef<str>>(prediction: &str, answers: &[A]) -> Result<f64, MetricsError> {
    some("answers to a question", answers.len())?;
    let prediction = normalise(prediction);
    let mut answers: Vec<String> = answers.iter().map(|answer| answer.as_ref().to_owned()).collect();
    if answers.iter().any(|answer| *answer != answers[0]) {
        answers.iter_mut().for_each(|answer| *answer = without_periods(&without_punctuation(answer)));
    }
    Ok(agreement(&prediction, &answers))
}

fn agreement(prediction: &str, answers: &[String]) -> f64 {
    let same = answers.iter().filter(|answer| *answer == prediction).count();
    if answers.len() == 1 {
        return same as f64;
    }
    let enough = (answers.len() - 1).min(3);
    let worth = |others: usize| (others as f64 / enough as f64).min(1.0);
    let sum: f64 = answers.iter().map(|answer| worth(if *answer == prediction { same - 1 } else { same })).sum();
    sum / answers.len() as f64
}

/// Consensus over all questions, by type of answer and by type of question; all 0 if there are none.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct VqaScores {
    /// Mean consensus in percent.
    pub accuracy: f64,
    /// Number of questions.
    pub count: usize,
    /// The same for each type of answer (`yes/no`, `number`, `other`).
    pub answer_types: BTreeMap<String, TypeScores>,
    /// The same for each type of question: its first words.
    pub question_types: BTreeMap<String, TypeScores>,
}

/// Scores of the questions of one type.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct TypeScores {
    /// Mean consensus in percent.
    pub accuracy: f64,
    /// Number of questions.
    pub count: usize,
}

impl VqaScores {
    /// Scores from, for each question, the type of its answer, its own type, and the [`consensus`]. A type that is not
    /// known is empty, and left out of the break-down.
    pub fn new<'a>(answered: impl IntoIterator<Item = (&'a str, &'a str, f64)>) -> Self {
        type Tally<'a> = BTreeMap<&'a str, (f64, usize)>;
        fn add<'a>(tally: &mut Tally<'a>, name: &'a str, consensus: f64) {
            let (sum, count) = tally.entry(name).or_default();
            (*sum, *count) = (*sum + consensus, *count + 1);
        }
        let scores = |(sum, count): (f64, usize)| TypeScores { accuracy: 100.0 * sum / count.max(1) as f64, count };
        let (mut all, mut by_answer, mut by_question) = ((0.0, 0), Tally::new(), Tally::new());
        for (answer_type, question_type, consensus) in answered {
            all = (all.0 + consensus, all.1 + 1);
            add(&mut by_answer, answer_type, consensus);
            add(&mut by_question, question_type, consensus);
        }
        let named = |tally: Tally<'_>| {
            let named = tally.into_iter().filter(|(name, _)| !name.is_empty());
            named.map(|(name, sums)| (name.to_owned(), scores(sums))).collect()
        };
        let TypeScores { accuracy, count } = scores(all);
        Self { accuracy, count, answer_types: named(by_answer), question_types: named(by_question) }
    }
}

/// Answers that are right letter by letter, over all questions and by kind of question; all 0 if there are none.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct ExactScores {
    /// Questions answered right, in percent.
    pub right: f64,
    /// Number of questions.
    pub count: usize,
    /// The same for each kind of question (count, colour, …).
    pub kinds: BTreeMap<String, KindScores>,
}

/// Scores of the questions of one kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct KindScores {
    /// Questions answered right, in percent.
    pub right: f64,
    /// Number of questions.
    pub count: usize,
}

impl ExactScores {
    /// Scores from, for each question, its kind and whether the answer is right.
    pub fn new<K: Into<String>>(answered: impl IntoIterator<Item = (K, bool)>) -> Self {
        let mut tally: BTreeMap<String, (usize, usize)> = BTreeMap::new();
        for (kind, is_right) in answered {
            let (right, count) = tally.entry(kind.into()).or_default();
            (*right, *count) = (*right + usize::from(is_right), *count + 1);
        }
        let (right, count) = tally.values().fold((0, 0), |all, kind| (all.0 + kind.0, all.1 + kind.1));
        let scores = |(right, count)| KindScores { right: percent(right, count), count };
        let kinds = tally.into_iter().map(|(kind, counts)| (kind, scores(counts))).collect();
        Self { right: percent(right, count), count, kinds }
    }
}

/// An answer as the official evaluation compares it: without punctuation and articles, in lower case, numbers as
/// digits, contractions with their apostrophes.
pub fn normalise(answer: &str) -> String {
    let plain = without_periods(&without_punctuation(&one_line(answer))).to_lowercase();
    let words = python_words(&plain).filter(|word| !ARTICLES.contains(word));
    words.map(|word| REPLACEMENTS.get(word).copied().unwrap_or(word)).collect::<Vec<_>>().join(" ")
}

fn one_line(answer: &str) -> String {
    answer.replace(['\n', '\t'], " ").trim_matches(is_python_space).to_owned()
}

/// A mark that stands beside a space somewhere in the answer goes, and so does every mark if the answer has a comma
/// between digits; any other mark becomes a space.
fn without_punctuation(answer: &str) -> String {
    let grouped = answer
        .as_bytes()
        .windows(3)
        .any(|three| three[0].is_ascii_digit() && three[1] == b',' && three[2].is_ascii_digit());
    let mut plain = answer.to_owned();
    for mark in PUNCTUATION.chars().filter(|&mark| answer.contains(mark)) {
        let spaced = answer.contains(&format!("{mark} ")) || answer.contains(&format!(" {mark}"));
        plain = plain.replace(mark, if spaced || grouped { "" } else { " " });
    }
    plain
}

/// A period goes unless a digit follows. (The official expression means to look before it, too, but does not; and it
/// means to set an option where it sets how many periods may go: 32.)
fn without_periods(answer: &str) -> String {
    let next = answer.chars().skip(1).map(Some).chain([None]);
    let mut gone = 0;
    let kept = |(c, next): &(char, Option<char>)| {
        let goes = gone < 32 && *c == '.' && !next.is_some_and(|next| next.is_ascii_digit());
        gone += usize::from(goes);
        !goes
    };
    answer.chars().zip(next).filter(kept).map(|(c, _)| c).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The expected texts are those of the official `vqaEval.py`.
    #[test]
    fn answers_are_normalised_as_in_the_official_evaluation() {
        for (answer, expected) in [
            ("The Cat", "cat"),
            ("two", "2"),
            ("a dog, a cat", "dog cat"),
            ("1,000 dollars", "1000 dollars"),
            ("t-shirt", "t shirt"),
            ("3.5", "3.5"),
            ("a.5", "a.5"),
            ("Yes.", "yes"),
            ("u.s.a.", "usa"),
            ("e. g.", "e g"),
            ("isnt it", "isn't it"),
            ("it's 5 o'clock", "it's 5 o'clock"),
            ("youll've", "youll've"),
            ("somebody'd", "somebodyd"),
            ("what? no!", "what no"),
            ("black/white", "black white"),
            ("(none)", "0"),
            (" an  apple\n", "apple"),
            ("10 - 4", "10 4"),
            ("well , -ok-", "well ok"),
            ("c++", "c"),
            ("the", ""),
            ("", ""),
        ] {
            assert_eq!(normalise(answer), expected, "{answer:?}");
        }
    }

    /// Ten answers: the first `count` times, the second for the rest.
    fn ten<'a>(first: &'a str, count: usize, second: &'a str) -> Vec<&'a str> {
        (0..10).map(|i| if i < count { first } else { second }).collect()
    }

    /// The expected numbers are those of the official `vqaEval.py`.
    #[test]
    fn consensus_is_the_official_one() -> Result<(), MetricsError> {
        for (prediction, answers, expected) in [
            ("cat", ten("cat", 10, ""), 1.0),
            ("cat", ten("cat", 4, "dog"), 1.0),
            ("cat", ten("cat", 3, "dog"), 0.9),
            ("cat", ten("cat", 2, "dog"), 0.6),
            ("cat", ten("cat", 1, "dog"), 0.3),
            ("bird", ten("cat", 1, "dog"), 0.0),
            // Normalised where people disagree, and only there.
            ("The Cat.", ten("cat", 9, "dog"), 1.0),
            ("The cat", ten("cat", 10, ""), 0.0),
            ("two", ten("2", 4, "three"), 1.0),
            (" cat\n", ten("cat", 10, ""), 1.0),
        ] {
            let found = consensus(prediction, &answers)?;
            assert!((found - expected).abs() < 1e-12, "{prediction:?}: expected {expected}, found {found}");
        }
        Ok(())
    }

    #[test]
    fn few_answers_can_be_met() -> Result<(), MetricsError> {
        assert_eq!(consensus("cat", &["cat"])?, 1.0);
        assert_eq!(consensus("cat", &["dog"])?, 0.0);
        assert_eq!(consensus("cat", &["cat", "cat"])?, 1.0);
        assert_eq!(consensus("cat", &["cat", "dog"])?, 0.5);
        assert_eq!(consensus("cat", &["cat"; 3])?, 1.0);
        assert_eq!(consensus("cat", &["cat"; 4])?, 1.0);
        assert_eq!(consensus("cat", &["cat"; 20])?, 1.0);
        Ok(())
    }

    /// The expected numbers are those of X-VLM's `vqaEval.py`.
    #[test]
    fn the_original_normalises_otherwise() -> Result<(), MetricsError> {
        for (prediction, answers, expected) in [
            ("The cat", ten("cat", 10, ""), 1.0),
            ("cat", ten("a cat", 9, "dog"), 0.0),
            ("two", ten("two", 9, "2"), 0.3),
            ("t-shirt", ten("t-shirt", 9, "shirt"), 1.0),
            ("t-shirt", ten("t-shirt", 10, ""), 0.0),
        ] {
            let found = consensus_as_original(prediction, &answers)?;
            assert!((found - expected).abs() < 1e-12, "{prediction:?}: expected {expected}, found {found}");
        }
        Ok(())
    }

    #[test]
    fn types_and_all() {
        let scores = VqaScores::new([
            ("yes/no", "is the", 1.0),
            ("other", "what", 0.3),
            ("other", "", 0.6),
            ("yes/no", "is the", 0.0),
        ]);
        assert_eq!(scores.count, 4);
        assert!((scores.accuracy - 47.5).abs() < 1e-12);
        assert_eq!(scores.answer_types["yes/no"], TypeScores { accuracy: 50.0, count: 2 });
        assert!((scores.answer_types["other"].accuracy - 45.0).abs() < 1e-12);
        assert_eq!(scores.question_types.keys().collect::<Vec<_>>(), ["is the", "what"]);
        assert_eq!(VqaScores::new([]), VqaScores::default());
    }

    #[test]
    fn kinds_and_all() {
        let scores =
            ExactScores::new([("count", true), ("colour", false), ("count", false), ("colour", true), ("count", true)]);
        assert_eq!((scores.right, scores.count), (60.0, 5));
        assert_eq!(scores.kinds["colour"], KindScores { right: 50.0, count: 2 });
        assert_eq!(scores.kinds["count"], KindScores { right: 200.0 / 3.0, count: 3 });
        assert_eq!(ExactScores::new(Vec::<(String, bool)>::new()), ExactScores::default());
    }

    #[test]
    fn missing_answers_are_refused() {
        let refused = consensus::<&str>("cat", &[]).unwrap_err().to_string();
        assert_eq!(refused, "answers to a question: expected at least one, found none");
    }
}
