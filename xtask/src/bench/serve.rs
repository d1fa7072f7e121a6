//! `cargo xtask bench --serve PRECISION`: our side, a process that answers a line of JSON with a line of JSON, as
//! `benches/peers/inference.py` does.

use std::io::BufRead;
use std::time::Instant;

use serde::Deserialize;
use serde_json::{Value, json};
use xvlm::encoders::{Xvlm, XvlmConfig};
use xvlm::{Device, Precision};

use super::Outcome;
use crate::Done;
use xvlm_benches::base::{self, Prepared};
use xvlm_benches::cases::Case;

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum Question {
    Prepare(Named),
    Run,
    Sample,
    Drop,
}

#[derive(Deserialize)]
struct Named {
    name: String,
}

/// What our side has at hand: one model, and one case.
struct Ours {
    precision: Precision,
    device: Device,
    model: Option<(usize, Xvlm)>,
    prepared: Option<Prepared>,
}

pub(crate) fn run(precision: Precision) -> Done {
    let mut ours = Ours { precision, device: Device::Cpu, model: None, prepared: None };
    println!("{}", json!({ "ready": precision.name() }));
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let question = serde_json::from_str(&line)
            .map_err(|error| format!("expected a question in JSON, found {line:?}: {error}"))?;
        println!("{}", ours.answer(question)?);
    }
    Ok(())
}

impl Ours {
    fn answer(&mut self, question: Question) -> Outcome<Value> {
        match question {
            Question::Prepare(case) => {
                let case = Case::of_name(&case.name)?;
                if self.model.as_ref().is_none_or(|(resolution, _)| *resolution != case.resolution) {
                    self.model = None;
                    let model = base::model(&XvlmConfig::base(case.resolution), self.precision, &self.device)?;
                    self.model = Some((case.resolution, model));
                }
                self.prepared = Some(Prepared::new(case, self.precision, &self.device)?);
                self.with(|model, case| case.run(model).map(drop))?;
                Ok(json!({}))
            }
            Question::Run => {
                let start = Instant::now();
                self.with(|model, case| case.run(model).map(drop))?;
                Ok(json!({ "seconds": start.elapsed().as_secs_f64() }))
            }
            Question::Sample => Ok(json!({ "sample": self.with(|model, case| case.sample(model))? })),
            Question::Drop => {
                self.prepared = None;
                Ok(json!({}))
            }
        }
    }

    fn with<T>(&self, work: impl FnOnce(&Xvlm, &Prepared) -> candle_core::Result<T>) -> Outcome<T> {
        let (_, model) = self.model.as_ref().ok_or("expected a case to be prepared first")?;
        let case = self.prepared.as_ref().ok_or("expected a case to be prepared first")?;
        Ok(work(model, case)?)
    }
}
