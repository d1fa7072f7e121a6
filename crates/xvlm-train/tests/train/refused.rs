//! What is refused, and what ends a run.

use super::*;

#[test]
fn two_processes_do_not_train_in_one_folder() {
    let dir = tempfile::tempdir().unwrap();
    let lock = fs::File::create(dir.path().join("lock")).unwrap();
    lock.lock().unwrap();
    let error = go(&Regression::new(), STREAM, &config(), dir.path(), false).unwrap_err();
    assert!(matches!(&error, TrainError::Locked { path } if path.ends_with("lock")), "{error}");
    drop(lock);
    go(&Regression::new(), STREAM, &config(), dir.path(), false).unwrap();
}

#[test]
fn stops_at_nan_and_keeps_what_was_good() {
    let dir = tempfile::tempdir().unwrap();
    let model = Regression::new();
    let stream = Stream { breaks_at: Some(12), ..STREAM };
    let error = go(&model, stream, &config(), dir.path(), false).unwrap_err();
    let TrainError::NotFinite { iteration: 13, loss, value, checkpoint: Some(checkpoint), .. } = &error else {
        panic!("{error}")
    };
    assert_eq!(*loss, "first");
    assert!(value.is_nan() && checkpoint.ends_with("checkpoints/0000010"));
    assert!(error.to_string().starts_with("iteration 13: first: expected a finite number, found NaN; the last"));
    assert!(model.numbers().iter().all(|number| number.is_finite()));
    assert_eq!(checkpoints(dir.path()), [5, 10]);

    // With better data, it goes on.
    go(&model, STREAM, &config(), dir.path(), true).unwrap();
    assert_eq!(checkpoints(dir.path()), [15, 20]);
}

#[test]
fn stops_at_an_infinite_gradient() {
    struct Root(Vec<(String, Var)>);
    impl Trainable for Root {
        type Batch = ();
        fn parameters(&self) -> &[(String, Var)] {
            &self.0
        }
        fn losses(&self, _: &(), _: &mut Step) -> Result<Losses, BoxError> {
            Ok(Losses(vec![("root", self.0[0].1.sqrt()?)]))
        }
        fn samples(_: &()) -> usize {
            1
        }
    }
    struct Units;
    impl Batches<()> for Units {
        fn next(&mut self) -> Result<Vec<Vec<()>>, BoxError> {
            Ok(vec![vec![()]])
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let run = RunFolder::new(dir.path()).unwrap();
    let model = Root(vec![("x".into(), Var::new(0f32, &Device::Cpu).unwrap())]);
    let error = train(&model, |_| Ok(Box::new(Units)), &config(), &Job::alone(&run, false), &mut Silent).err().unwrap();
    assert_eq!(
        error.to_string(),
        "iteration 1: gradient norm: expected a finite number, found inf; the first tensor with such numbers is gradient of x; there is \
         no checkpoint yet"
    );
    assert_eq!(model.0[0].1.to_scalar::<f32>().unwrap(), 0.0);
}

#[test]
fn does_not_run_over_another_run() {
    let dir = tempfile::tempdir().unwrap();
    killed(dir.path(), 12);
    let error = go(&Regression::new(), STREAM, &config(), dir.path(), false).unwrap_err();
    assert!(matches!(error, TrainError::Occupied { .. }), "{error}");
    assert_eq!(checkpoints(dir.path()), [5, 10]);
}

#[test]
fn a_changed_configuration_is_named() {
    let dir = tempfile::tempdir().unwrap();
    killed(dir.path(), 12);
    let mut changed = config();
    changed.optimizer.betas.1 = 0.999;
    let error = go(&Regression::new(), STREAM, &changed, dir.path(), true).unwrap_err();
    assert!(error.to_string().contains("optimizer.betas = [0.9,0.98], found [0.9,0.999] now"), "{error}");
    // How long, and what to write when, may change.
    let longer = TrainConfig { iterations: 24, log_every: 3, keep_checkpoints: 9, ..config() };
    assert_eq!(go(&Regression::new(), STREAM, &longer, dir.path(), true).unwrap().iterations, 24);
}

#[test]
fn another_model_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    killed(dir.path(), 12);
    let mut model = Regression::new();
    model.parameters[1] = ("first.bias".into(), Var::new(&[0f32, 0.0], &Device::Cpu).unwrap());
    let error = go(&model, STREAM, &config(), dir.path(), true).unwrap_err();
    let said = "weights.safetensors: tensor first.bias: expected F32 [2], found F32 [1]";
    assert!(error.to_string().ends_with(said), "{error}");
    model.parameters[1].0 = "bias".into();
    let error = go(&model, STREAM, &config(), dir.path(), true).unwrap_err();
    assert!(error.to_string().ends_with("tensor bias: expected F32 [2], found none"), "{error}");
    model.parameters.truncate(1);
    let error = go(&model, STREAM, &config(), dir.path(), true).unwrap_err();
    assert!(error.to_string().ends_with("expected 1 tensors, found 4"), "{error}");
}

#[test]
fn parameters_are_checked() {
    let dir = tempfile::tempdir().unwrap();
    let mut model = Regression::new();
    model.parameters[3].1 = model.parameters[1].1.clone();
    let error = go(&model, STREAM, &config(), dir.path(), false).unwrap_err();
    assert_eq!(error.to_string(), "parameter second.bias: expected a tensor of its own, found that of first.bias");
    model.parameters[3] = ("second.bias".into(), Var::new(&[0f64], &Device::Cpu).unwrap());
    let error = go(&model, STREAM, &config(), dir.path(), false).unwrap_err();
    assert_eq!(error.to_string(), "parameter second.bias: expected dtype F32, BF16 or F16, found F64");
}
