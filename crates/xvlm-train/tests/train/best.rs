//! Which checkpoint is the best.

use super::*;

/// A model whose score has its highest value on the way to the lowest losses, and cannot be computed after an iteration.
struct Scored(Regression, Option<u64>);

impl Trainable for Scored {
    type Batch = Points;

    fn parameters(&self) -> &[(String, Var)] {
        self.0.parameters()
    }

    fn losses(&self, batch: &Points, step: &mut Step) -> Result<Losses, BoxError> {
        self.0.losses(batch, step)
    }

    fn samples(batch: &Points) -> usize {
        Regression::samples(batch)
    }

    fn score(&self, iteration: u64, weights: FinishedWeights) -> Result<Option<f64>, BoxError> {
        if self.1 == Some(iteration) {
            return Err("a picture is gone".into());
        }
        Ok(Some(score_of(&weights()?)))
    }
}

fn score_of(weights: &[(String, Tensor)]) -> f64 {
    let (_, weight) = weights.iter().find(|(name, _)| name == "first.weight").unwrap();
    -f64::from((weight.flatten_all().unwrap().to_vec1::<f32>().unwrap()[0] - 0.3).abs())
}

#[test]
fn the_best_is_kept_and_the_same_after_an_interruption() {
    let [whole, parts] = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let config = TrainConfig { keep_checkpoints: 1, keep_best: true, ..config() };
    let go = |at: &Path, resume, fails_at| {
        let (run, stream) = (RunFolder::new(at).unwrap(), Stream { fails_at, ..STREAM });
        let job = &Job::alone(&run, resume);
        train(&Scored(Regression::new(), None), |start| stream.from(start), &config, job, &mut Silent).map(|_| run)
    };
    let run = go(whole.path(), false, None).unwrap();
    let (best, path) = run.best().unwrap().unwrap();
    assert!(best.by == Criterion::Score && best.iteration < 20, "{best:?}");
    assert_eq!(checkpoints(whole.path()), [best.iteration, 20]);
    assert!(path.join("weights.safetensors").exists());
    assert_eq!(best.score, score_of(&run.weights(best.iteration).unwrap()));
    let rows = lasting(whole.path());
    let scored: Vec<(u64, f64)> = rows.iter().filter_map(|row| Some((row.iteration, row.score?))).collect();
    assert_eq!(scored.iter().map(|(iteration, _)| *iteration).collect::<Vec<_>>(), [5, 10, 15, 20]);
    assert!(scored.contains(&(best.iteration, best.score)), "{scored:?}");

    // After the best, and once more at the end.
    assert!(go(parts.path(), false, Some(best.iteration + 2)).is_err());
    assert!(go(parts.path(), true, Some(18)).is_err());
    go(parts.path(), true, None).unwrap();
    let told = |at: &Path| fs::read_to_string(at.join("checkpoints/best.json")).unwrap();
    assert_eq!(told(whole.path()), told(parts.path()));
    assert_eq!(checkpoints(parts.path()), checkpoints(whole.path()));
    assert_eq!(bytes(whole.path(), 20, "weights.safetensors"), bytes(parts.path(), 20, "weights.safetensors"));
}

#[test]
fn the_score_is_that_of_the_weights_that_are_kept() {
    let dir = tempfile::tempdir().unwrap();
    let config = TrainConfig { keep_best: true, ema_decay: Some(0.9), ..config() };
    let (run, model) = (RunFolder::new(dir.path()).unwrap(), Scored(Regression::new(), None));
    train(&model, |start| STREAM.from(start), &config, &Job::alone(&run, false), &mut Silent).unwrap();
    let (best, _) = run.best().unwrap().unwrap();
    assert_eq!(best.score, score_of(&run.weights(best.iteration).unwrap()));
    let trained = -f64::from((model.0.numbers()[0] - 0.3).abs());
    assert_ne!(lasting(dir.path()).last().unwrap().score, Some(trained));
}

#[test]
fn a_checkpoint_that_cannot_be_scored_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let (run, config) = (RunFolder::new(dir.path()).unwrap(), TrainConfig { keep_best: true, ..config() });
    let go = |fails_at| {
        let model = Scored(Regression::new(), fails_at);
        train(&model, |start| STREAM.from(start), &config, &Job::alone(&run, true), &mut Silent)
    };
    let error = go(Some(10)).err().unwrap();
    assert!(matches!(error, TrainError::Model { iteration: 10, .. }), "{error}");
    assert_eq!(checkpoints(dir.path()), [5, 10]);
    assert_eq!(go(None).unwrap().summary.iterations, 20);
}

/// A model of which a number that grows is observed, whatever its losses.
struct Observed(Regression, Cell<f64>);

impl Trainable for Observed {
    type Batch = Points;

    fn parameters(&self) -> &[(String, Var)] {
        self.0.parameters()
    }

    fn losses(&self, batch: &Points, step: &mut Step) -> Result<Losses, BoxError> {
        self.1.set(self.1.get() + 1.0);
        self.0.losses(batch, step)
    }

    fn observations(&self) -> Vec<(&'static str, f64)> {
        vec![("other", -2.0 * self.1.get()), ("reward", self.1.get())]
    }

    fn judged_by(&self) -> Option<&'static str> {
        Some("reward")
    }

    fn samples(batch: &Points) -> usize {
        Regression::samples(batch)
    }
}

#[test]
fn an_observation_tells_the_best_in_place_of_losses() {
    let dir = tempfile::tempdir().unwrap();
    let config = TrainConfig { keep_best: true, log_every: 5, ..config() };
    let (run, model) = (RunFolder::new(dir.path()).unwrap(), Observed(Regression::new(), Cell::new(0.0)));
    train(&model, |start| STREAM.from(start), &config, &Job::alone(&run, false), &mut Silent).unwrap();
    let (best, _) = run.best().unwrap().unwrap();
    let last = lasting(dir.path()).pop().unwrap();
    assert_eq!((best.iteration, best.by, best.score), (20, Criterion::Observation, last.losses["reward"]));
}

#[test]
fn without_a_score_the_losses_tell_the_best() {
    let dir = tempfile::tempdir().unwrap();
    let config = TrainConfig { keep_best: true, log_every: 5, ..config() };
    go(&Regression::new(), STREAM, &config, dir.path(), false).unwrap();
    let (best, _) = RunFolder::new(dir.path()).unwrap().best().unwrap().unwrap();
    let rows = lasting(dir.path());
    let sum = |row: &MetricsRow| (row.losses.len(), -row.losses.values().sum::<f64>(), row.iteration);
    let expected = rows.iter().map(sum).max_by(|a, b| a.partial_cmp(b).unwrap()).unwrap();
    assert_eq!((best.losses, best.score, best.iteration), expected);
    assert_eq!(best.by, Criterion::Losses);
}

/// A model that gets worse all the time.
struct Falling(Regression, Cell<f64>);

impl Trainable for Falling {
    type Batch = Points;

    fn parameters(&self) -> &[(String, Var)] {
        self.0.parameters()
    }

    fn losses(&self, batch: &Points, step: &mut Step) -> Result<Losses, BoxError> {
        self.0.losses(batch, step)
    }

    fn samples(batch: &Points) -> usize {
        Regression::samples(batch)
    }

    fn score(&self, _: u64, _: FinishedWeights) -> Result<Option<f64>, BoxError> {
        self.1.set(self.1.get() - 1.0);
        Ok(Some(self.1.get()))
    }
}

#[test]
fn what_is_gone_or_not_kept_is_not_the_best() {
    let dir = tempfile::tempdir().unwrap();
    let run = RunFolder::new(dir.path()).unwrap();
    let config = |iterations, keep_best| TrainConfig { iterations, keep_best, keep_checkpoints: 9, ..config() };
    let go = |config: TrainConfig, score: f64| {
        let (model, job) = (Falling(Regression::new(), Cell::new(score)), Job::alone(&run, true));
        train(&model, |start| STREAM.from(start), &config, &job, &mut Silent).unwrap();
        run.best().unwrap().map(|(best, _)| best.iteration)
    };
    assert_eq!(go(config(15, true), 0.0), Some(5));
    fs::remove_dir_all(dir.path().join("checkpoints/0000005")).unwrap();
    assert_eq!(go(config(20, true), -100.0), Some(20));
    assert_eq!(go(config(25, false), -200.0), None);
    let state = String::from_utf8(bytes(dir.path(), 25, "state.json")).unwrap();
    let state: serde_json::Value = serde_json::from_str(&state).unwrap();
    assert_eq!(state["standing"]["judge"], serde_json::json!({ "since": {}, "best": null }));
}
