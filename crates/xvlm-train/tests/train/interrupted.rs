//! Runs that are killed, stopped or damaged, and go on.

use super::*;

#[test]
fn a_resumed_run_is_the_same_run_to_the_bit() {
    let [whole, parts] = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let straight = Regression::new();
    go(&straight, STREAM, &config(), whole.path(), false).unwrap();

    // Killed after a report that no checkpoint has: it is taken back.
    killed(parts.path(), 13);
    assert_eq!(lasting(parts.path()).last().unwrap().iteration, 12);
    let resumed = Regression::new();
    go(&resumed, STREAM, &config(), parts.path(), true).unwrap();

    assert_eq!(straight.numbers(), resumed.numbers());
    assert_ne!(straight.numbers(), Regression::new().numbers());
    assert_eq!(lasting(whole.path()), lasting(parts.path()));
    for file in ["weights.safetensors", "optimizer.safetensors"] {
        assert_eq!(bytes(whole.path(), 20, file), bytes(parts.path(), 20, file), "{file}");
    }
}

#[test]
fn each_time_training_goes_on_there_is_an_event_file() {
    let [dir, without] = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let files = |at: &Path| fs::read_dir(at.join("tensorboard")).map_or(0, |files| files.count());
    killed(dir.path(), 13);
    assert_eq!(files(dir.path()), 1);
    for _ in ["to its end", "with nothing left to do"] {
        go(&Regression::new(), STREAM, &config(), dir.path(), true).unwrap();
        assert_eq!(files(dir.path()), 2);
    }
    go(&Regression::new(), STREAM, &TrainConfig { tensorboard: false, ..config() }, without.path(), false).unwrap();
    assert_eq!(files(without.path()), 0);
}

#[test]
fn resuming_a_finished_run_brings_its_model() {
    let dir = tempfile::tempdir().unwrap();
    let [trained, resumed] = [Regression::new(), Regression::new()];
    let first = go(&trained, STREAM, &config(), dir.path(), false).unwrap();
    let again = go(&resumed, STREAM, &config(), dir.path(), true).unwrap();
    assert_eq!(trained.numbers(), resumed.numbers());
    assert_eq!((again.iterations, again.optimizer_steps), (20, first.optimizer_steps));
    assert_eq!(first.losses, again.losses);
}

#[test]
fn keeps_the_last_checkpoints() {
    let dir = tempfile::tempdir().unwrap();
    go(&Regression::new(), STREAM, &config(), dir.path(), false).unwrap();
    assert_eq!(checkpoints(dir.path()), [15, 20]);
    let names: Vec<_> = fs::read_dir(dir.path().join("checkpoints")).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names.len(), 2, "{names:?}");
    let iterations: Vec<_> = lasting(dir.path()).iter().map(|row| row.iteration).collect();
    assert_eq!(iterations, [4, 5, 8, 10, 12, 15, 16, 20]);
}

/// Damages the newest checkpoint (of iteration 10) in one way; resuming must go on from the one before, to the same end.
/// Returns the warnings.
fn survives(damage: impl Fn(&Path)) -> Vec<String> {
    let [whole, broken] = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    go(&Regression::new(), STREAM, &config(), whole.path(), false).unwrap();
    killed(broken.path(), 12);
    assert_eq!(checkpoints(broken.path()), [5, 10]);
    damage(&broken.path().join("checkpoints/0000010"));

    let mut from = None;
    let run = RunFolder::new(broken.path()).unwrap();
    let start = |iteration| {
        from = Some(iteration);
        STREAM.from(iteration)
    };
    let mut warned = Warnings::default();
    train(&Regression::new(), start, &config(), &Job::alone(&run, true), &mut warned).unwrap();
    assert_eq!(from, Some(5));
    assert_eq!(checkpoints(broken.path()), [15, 20]);
    assert_eq!(lasting(whole.path()), lasting(broken.path()));
    assert_eq!(bytes(whole.path(), 20, "weights.safetensors"), bytes(broken.path(), 20, "weights.safetensors"));
    assert_eq!(fs::read_dir(broken.path().join("checkpoints")).unwrap().count(), 2);
    warned.0
}

#[test]
fn survives_a_kill_while_writing() {
    survives(|checkpoint| {
        // The folder has its name only when it is whole.
        let aside = checkpoint.with_file_name(".writing-x1y2z3");
        fs::rename(checkpoint, &aside).unwrap();
        fs::remove_file(aside.join("state.json")).unwrap();
    });
}

#[test]
fn survives_a_kill_while_removing() {
    survives(|checkpoint| fs::rename(checkpoint, checkpoint.with_file_name(".removing-0000010")).unwrap());
}

#[test]
fn survives_missing_and_cut_files() {
    for file in ["weights.safetensors", "optimizer.safetensors", "state.json", "SHA256SUMS"] {
        let warned = survives(|checkpoint| fs::remove_file(checkpoint.join(file)).unwrap());
        let said = format!("0000010/{file}: expected a file, found none; this checkpoint is not used");
        assert!(warned.len() == 1 && warned[0].ends_with(&said), "{warned:?}");
        for share in [0, 2] {
            survives(|checkpoint| {
                let file = fs::OpenOptions::new().write(true).open(checkpoint.join(file)).unwrap();
                let len = file.metadata().unwrap().len();
                file.set_len(len * share / 3).unwrap();
            });
        }
    }
}

#[test]
fn survives_a_flipped_bit() {
    for file in ["weights.safetensors", "optimizer.safetensors", "state.json"] {
        let warned = survives(|checkpoint| {
            let mut bytes = fs::read(checkpoint.join(file)).unwrap();
            *bytes.last_mut().unwrap() ^= 1;
            fs::write(checkpoint.join(file), bytes).unwrap();
        });
        let told = warned.len() == 1 && warned[0].contains(&format!("0000010/{file}: expected "));
        assert!(told && warned[0].matches("SHA-256 ").count() == 2, "{warned:?}");
    }
}

#[test]
fn a_run_that_is_asked_to_stop_saves_and_goes_on_as_if_it_had_not() {
    let [whole, parts] = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let config = TrainConfig { keep_best: true, ..config() };
    go(&Regression::new(), STREAM, &config, whole.path(), false).unwrap();

    /// Asks for it while it builds the batches of the iteration after so many.
    struct Asking(Stream, u64, Arc<AtomicBool>);
    impl Batches<Points> for Asking {
        fn next(&mut self) -> Result<Vec<Vec<Points>>, BoxError> {
            self.2.store(self.0.iteration == self.1, Ordering::Relaxed);
            self.0.next()
        }
    }
    let run = RunFolder::new(parts.path()).unwrap();
    // Between reports and checkpoints; at a report; at a checkpoint; at the end, which is not an interruption.
    for (i, (at, stopped)) in [(6, true), (7, true), (12, true), (14, true), (19, false)].into_iter().enumerate() {
        let stop = Arc::new(AtomicBool::new(false));
        let job = Job { stop: Arc::clone(&stop), ..Job::alone(&run, i > 0) };
        let batches = |iteration| -> Result<Box<dyn Batches<Points>>, BoxError> {
            Ok(Box::new(Asking(Stream { iteration, ..STREAM }, at, Arc::clone(&stop))))
        };
        let summary = train(&Regression::new(), batches, &config, &job, &mut Silent).unwrap().summary;
        assert_eq!((summary.iterations, summary.stopped, summary.out_of_time), (at + 1, stopped, false));
        assert_eq!(checkpoints(parts.path()).last(), Some(&(at + 1)));
    }
    assert_eq!(lasting(whole.path()), lasting(parts.path()));
    for file in ["weights.safetensors", "optimizer.safetensors"] {
        assert_eq!(bytes(whole.path(), 20, file), bytes(parts.path(), 20, file), "{file}");
    }
    let told = |at: &Path| fs::read_to_string(at.join("checkpoints/best.json")).unwrap();
    assert_eq!(told(whole.path()), told(parts.path()));
}

#[test]
fn survives_a_half_written_row() {
    let dir = tempfile::tempdir().unwrap();
    killed(dir.path(), 12);
    let path = dir.path().join("metrics.jsonl");
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, format!("{text}{{\"iteration\":1")).unwrap();
    assert_eq!(lasting(dir.path()).last().unwrap().iteration, 12);
    go(&Regression::new(), STREAM, &config(), dir.path(), true).unwrap();
    assert_eq!(lasting(dir.path()).len(), 8);

    fs::write(&path, format!("{text}{{\"iteration\":1\n")).unwrap();
    let error = read_metrics(&path).unwrap_err();
    assert!(error.to_string().contains("metrics.jsonl: line 6: expected a row of metrics"), "{error}");
}

#[test]
fn does_not_begin_anew_when_all_checkpoints_are_damaged() {
    let dir = tempfile::tempdir().unwrap();
    killed(dir.path(), 12);
    for (_, checkpoint) in RunFolder::new(dir.path()).unwrap().checkpoints().unwrap() {
        fs::remove_file(checkpoint.join("weights.safetensors")).unwrap();
    }
    let error = go(&Regression::new(), STREAM, &config(), dir.path(), true).unwrap_err();
    assert!(error.to_string().ends_with("0000010/weights.safetensors: expected a file, found none"), "{error}");
}
