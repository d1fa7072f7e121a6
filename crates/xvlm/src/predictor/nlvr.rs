//! Statements about two pictures.

use serde::Serialize;
use xvlm_data::Picture;
use xvlm_tasks::nlvr;

use super::Predictor;
use crate::Error;

/// How likely a statement is to be true of two pictures.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Judgement {
    /// The statement.
    pub statement: String,
    /// Probability that it is true.
    pub probability: f32,
}

impl Predictor {
    /// Judges statements about a left and a right picture, each of which is encoded once. The model must be one for it: one that
    /// was fine-tuned on NLVR2 or data like it.
    ///
    /// # Errors
    /// If a statement is empty, the model is made for another task, or a tensor operation fails.
    pub fn judge(&self, left: &Picture, right: &Picture, statements: &[&str]) -> Result<Vec<Judgement>, Error> {
        let images = self.model().encode(&[left.clone(), right.clone()])?;
        let pairs: Vec<([u32; 2], &str)> = statements.iter().map(|statement| ([0, 1], *statement)).collect();
        let judged = statements.iter().zip(nlvr::judge(self.model(), &images, &pairs)?);
        Ok(judged
            .map(|(statement, probability)| Judgement { statement: (*statement).to_owned(), probability })
            .collect())
    }
}
