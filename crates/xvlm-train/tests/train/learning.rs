//! What is learnt, and what is told of it.

use super::*;

#[test]
fn learns() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = TrainConfig { iterations: 600, ..config() };
    config.optimizer.weight_decay = 0.0;
    let summary = go(&Regression::new(), STREAM, &config, dir.path(), false).unwrap();
    assert_eq!(summary.iterations, 600);
    assert!(summary.optimizer_steps > 800 && !summary.out_of_time);
    let curves = loss_curves(&lasting(dir.path()));
    assert_eq!(curves.iter().map(|curve| curve.name.as_str()).collect::<Vec<_>>(), ["first", "second"]);
    let [first, last] = [curves[0].points[0].1, curves[0].points.last().unwrap().1];
    assert!(last < 0.3 * first, "{first} to {last}");
}

#[test]
fn the_seed_matters() {
    let numbers = |seed| {
        let dir = tempfile::tempdir().unwrap();
        let model = Regression::new();
        go(&model, STREAM, &TrainConfig { seed, ..config() }, dir.path(), false).unwrap();
        model.numbers()
    };
    assert_eq!(numbers(1), numbers(1));
    assert_ne!(numbers(1), numbers(2));
}

#[test]
fn a_parameter_without_gradient_stays() {
    let dir = tempfile::tempdir().unwrap();
    let model = Regression::new();
    // Only iterations without a second batch.
    struct First(Stream);
    impl Batches<Points> for First {
        fn next(&mut self) -> Result<Vec<Vec<Points>>, BoxError> {
            self.0.next().map(|batches| batches.into_iter().take(1).collect())
        }
    }
    let run = RunFolder::new(dir.path()).unwrap();
    train(&model, |_| Ok(Box::new(First(STREAM))), &config(), &Job::alone(&run, false), &mut Silent).unwrap();
    let (before, after) = (Regression::new().numbers(), model.numbers());
    assert_ne!(before[..5], after[..5]);
    assert_eq!(before[5..], after[5..]);
}

#[test]
fn some_records_are_named_and_the_others_counted() {
    let records = |count: usize| {
        let records = (1..=count).map(|i| format!("a.jsonl:{i}")).collect();
        let (loss, tensor, of_ranks) = ("itc", None, if count > 8 { 4 } else { 1 });
        let value = f64::NAN;
        TrainError::NotFinite { iteration: 1, loss, value, tensor, records, of_ranks, checkpoint: None }.to_string()
    };
    assert!(records(8).contains("; the batch was made of a.jsonl:1, a.jsonl:2,"), "{}", records(8));
    assert!(records(8).contains("a.jsonl:8; there"), "{}", records(8));
    assert!(records(11).contains("a.jsonl:8 and 3 more; there"), "{}", records(11));
    let said = "; it is in the batch of one of 4 ranks: this rank's was made of a.jsonl:1,";
    assert!(records(11).contains(said), "{}", records(11));
}

#[test]
fn reports() {
    #[derive(Default)]
    struct Heard {
        start: Option<(u64, u64)>,
        steps: Vec<(u64, usize)>,
        finished: bool,
    }
    impl Progress for Heard {
        fn start(&mut self, of: u64, at: u64) {
            self.start = Some((of, at));
        }
        fn step(&mut self, report: &StepReport) {
            assert!(report.images_per_second > 0.0 && report.grad_norm > 0.0);
            assert_eq!((report.of, report.eta.is_zero()), (20, report.iteration == 20));
            self.steps.push((report.iteration, report.losses.len()));
        }
        fn finish(&mut self, summary: &Summary) {
            self.finished = summary.iterations == 20;
        }
    }
    let dir = tempfile::tempdir().unwrap();
    killed(dir.path(), 12);
    let (run, mut heard) = (RunFolder::new(dir.path()).unwrap(), Heard::default());
    train(&Regression::new(), |start| STREAM.from(start), &config(), &Job::alone(&run, true), &mut heard).unwrap();
    assert_eq!(heard.start, Some((20, 10)));
    assert_eq!(heard.steps.iter().map(|step| step.0).collect::<Vec<_>>(), [12, 15, 16, 20]);
    assert!(heard.finished && heard.steps.iter().any(|step| step.1 == 2));
}

#[test]
fn a_time_limit_ends_the_run_with_a_low_rate_and_a_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let limit = Duration::from_secs(1);
    let config = TrainConfig {
        iterations: 1_000_000_000,
        checkpoint_every: 1_000_000_000,
        time_limit_minutes: Some(limit.as_secs_f64() / 60.0),
        ..config()
    };
    let summary = go(&Regression::new(), STREAM, &config, dir.path(), false).unwrap();
    assert!(summary.out_of_time && summary.elapsed >= limit);
    assert_eq!(checkpoints(dir.path()), [summary.iterations]);
    let rates: Vec<_> = lasting(dir.path()).iter().map(|row| row.lr).collect();
    assert!(rates[0] > 0.2 * config.optimizer.lr, "{}", rates[0]);
    assert!(*rates.last().unwrap() < 0.3 * config.optimizer.lr, "{rates:?}");
    // The time is up for a resumed run, too.
    assert_eq!(go(&Regression::new(), STREAM, &config, dir.path(), true).unwrap().iterations, summary.iterations);
}
