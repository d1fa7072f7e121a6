//! Questions about a picture.

use serde::{Deserialize, Serialize};
use xvlm_tasks::Search;
use xvlm_tasks::vqa::{self, AnswerList, Ranking};

use super::{View, Views};
use crate::Error;

/// An answer to a question.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Answer {
    /// The question.
    pub question: String,
    /// The answer.
    pub answer: String,
}

/// The likeliest answers of a list to a question.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RankedAnswers {
    /// The question.
    pub question: String,
    /// The answers, the likeliest first.
    pub answers: Vec<LikelyAnswer>,
}

/// An answer of a list.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LikelyAnswer {
    /// The answer.
    pub answer: String,
    /// Its probability among the answers that were ranked by the whole: at most [`Ranking::k`].
    pub probability: f32,
}

impl View<'_> {
    /// Answers questions in words of the model's own.
    ///
    /// # Errors
    /// If the model is made for another task, or a tensor operation fails.
    pub fn answer(&self, questions: &[&str]) -> Result<Vec<Answer>, Error> {
        Ok(self.0.answer(questions)?.remove(0))
    }

    /// Ranks a list of answers for each question; the `top` best.
    ///
    /// ```
    /// use xvlm::{AnswerList, Device, Picture, Predictor, Ranking};
    ///
    /// # fn main() -> Result<(), xvlm::Error> {
    /// let predictor = Predictor::bundled(&Device::Cpu)?;
    /// let picture = Picture::from_bytes(include_bytes!("../../assets/example.png"), &"example.png")?;
    /// let colours = AnswerList::new(predictor.model(), ["red", "green", "blue"].map(String::from).to_vec())?;
    /// let view = predictor.look(&picture)?;
    /// let ranked = view.rank_answers(&["which colour does the heart have ?"], &colours, Ranking::default(), 3)?;
    /// for likely in &ranked[0].answers {
    ///     println!("{}: {:.3}", likely.answer, likely.probability);
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// As [`Self::answer`].
    pub fn rank_answers(
        &self,
        questions: &[&str],
        answers: &AnswerList,
        ranking: Ranking,
        top: usize,
    ) -> Result<Vec<RankedAnswers>, Error> {
        Ok(self.0.rank_answers(questions, answers, ranking, top)?.remove(0))
    }
}

impl Views<'_> {
    /// Answers questions about each picture in words of the model's own.
    ///
    /// # Errors
    /// As [`View::answer`].
    pub fn answer(&self, questions: &[&str]) -> Result<Vec<Vec<Answer>>, Error> {
        let answers = vqa::answer(self.model, &self.images, &self.about(questions), Search::answers())?;
        self.by_picture(questions, answers, |_, question, written| {
            Ok(Answer { question: question.to_owned(), answer: written.text })
        })
    }

    /// Ranks a list of answers for each question about each picture; the `top` best.
    ///
    /// # Errors
    /// As [`View::answer`].
    pub fn rank_answers(
        &self,
        questions: &[&str],
        answers: &AnswerList,
        ranking: Ranking,
        top: usize,
    ) -> Result<Vec<Vec<RankedAnswers>>, Error> {
        let ranked = vqa::rank_answers(self.model, &self.images, &self.about(questions), answers, ranking)?;
        let likely = |ranked: &vqa::Ranked| LikelyAnswer {
            answer: answers.texts()[ranked.answer as usize].clone(),
            probability: ranked.probability,
        };
        self.by_picture(questions, ranked, |_, question, ranked| {
            let answers = ranked.iter().take(top).map(likely).collect();
            Ok(RankedAnswers { question: question.to_owned(), answers })
        })
    }
}
