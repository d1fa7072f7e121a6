//! Tests of working through a large data set.

use xvlm_train::ranks::Threads;

use super::*;

const UNITS: [u32; 7] = [3, 1, 4, 1, 5, 9, 2];

fn work() -> Work {
    Work { name: "answers", options: json!({"k": 2}), batch: 2 }
}

fn broken(unit: u32) -> DataError {
    DataError::MissingText { origin: format!("unit {unit}"), expected: "an answer" }
}

/// Doubles units; nine is broken.
fn run(sweep: &mut Sweep, asked: &mut Vec<u32>) -> Result<Answers<u32>, TaskError> {
    sweep.run(&work(), &UNITS, u32::to_string, |units| {
        asked.extend(units.iter().copied());
        Ok(units.iter().map(|&&unit| if unit == 9 { Err(broken(unit)) } else { Ok(2 * unit) }).collect())
    })
}

fn expected(answers: &Answers<u32>) {
    assert_eq!(answers.given, [Some(6), Some(2), Some(8), Some(2), Some(10), None, Some(4)]);
    let [out] = answers.left_out.as_slice() else { panic!("{:?}", answers.left_out) };
    assert_eq!((out.item, out.problem.contains("unit 9")), (5, true));
}

#[test]
fn what_was_interrupted_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("answers.jsonl");
    let stop = Arc::new(AtomicBool::new(false));
    let go = |resume, about: &str, counter: Counter, asked: &mut Vec<u32>| {
        let (folder, stop) = (Some(folder.path().to_owned()), Arc::clone(&stop));
        let about = json!(about);
        run(&mut Sweep { folder, resume, about, stop, max_bad_fraction: 0.5, ..Sweep::new(counter) }, asked)
    };
    let mut asked = Vec::new();
    let mut counter = |done, _| stop.store(done >= 4, Ordering::Relaxed);
    let error = go(false, "a", &mut counter, &mut asked).unwrap_err().to_string();
    assert_eq!(error, "stopped: 4 of 7 are done");
    assert_eq!(asked, [3, 1, 4, 1]);
    // A line that was cut short.
    let text = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, &text[..text.len() - 4]).unwrap();
    stop.store(false, Ordering::Relaxed);
    let error = go(false, "a", &mut |_, _| {}, &mut asked).unwrap_err().to_string();
    assert!(error.contains("answers.jsonl: expected no answers"), "{error}");
    asked.clear();
    expected(&go(true, "a", &mut |_, _| {}, &mut asked).unwrap());
    assert_eq!(asked, [1, 5, 9, 2]);
    // Once more: nothing is left to ask, but for what was broken. Files of others are no answers.
    for other in ["answers2.jsonl", "answersé.jsonl", "answers..jsonl", "answers.a.jsonl"] {
        std::fs::write(folder.path().join(other), "something else").unwrap();
    }
    asked.clear();
    expected(&go(true, "a", &mut |_, _| {}, &mut asked).unwrap());
    assert_eq!(asked, [9]);
    let error = go(true, "b", &mut |_, _| {}, &mut asked).unwrap_err().to_string();
    assert!(error.contains("about: expected \"b\", as asked now, found \"a\""), "{error}");
}

#[test]
fn a_file_that_was_cut_anywhere_becomes_the_same_again() {
    const NAMES: [&str; 3] = ["é", "ü", "ß"];
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("answers.jsonl");
    let go = |resume, about: &str| {
        let (folder, mut counter) = (Some(folder.path().to_owned()), |_, _| {});
        let mut sweep = Sweep { folder, resume, about: json!(about), ..Sweep::new(&mut counter) };
        let ask = |units: &[&&str]| Ok(units.iter().map(|unit| Ok(format!("{unit}!"))).collect());
        sweep.run(&work(), &NAMES, |name| (*name).to_owned(), ask).map(|answers: Answers<String>| answers.given)
    };
    let expected = go(false, "ä").unwrap();
    let whole = std::fs::read(&file).unwrap();
    for length in 0..whole.len() {
        std::fs::write(&file, &whole[..length]).unwrap();
        assert_eq!(go(true, "ä").unwrap(), expected, "{length}");
        assert_eq!(std::fs::read(&file).unwrap(), whole, "{length}");
    }
    // Of something else, a piece of the first line is refused too.
    std::fs::write(&file, "[1, 2").unwrap();
    let error = go(true, "ä").unwrap_err().to_string();
    assert!(error.contains("answers.jsonl: line 1: expected what was asked"), "{error}");
    assert_eq!(std::fs::read(&file).unwrap(), b"[1, 2");
}

#[test]
fn a_file_has_one_writer() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("answers.jsonl");
    let mut refused = Vec::new();
    let mut counter = |_, _| {};
    let mut sweep = Sweep { folder: Some(folder.path().to_owned()), ..Sweep::new(&mut counter) };
    let first = sweep.run(&work(), &UNITS, u32::to_string, |units| {
        let before = std::fs::read(&file).unwrap();
        for resume in [true, false] {
            let mut counter = |_, _| {};
            let mut second = Sweep { folder: Some(folder.path().to_owned()), resume, ..Sweep::new(&mut counter) };
            refused.push(run(&mut second, &mut Vec::new()).unwrap_err().to_string());
        }
        assert_eq!(std::fs::read(&file).unwrap(), before);
        Ok(units.iter().map(|&&unit| Ok(unit)).collect())
    });
    assert_eq!(first.unwrap().given, UNITS.map(Some));
    for two in refused.chunks(2) {
        assert!(two[0].ends_with("answers.jsonl: another process writes here"), "{two:?}");
        assert!(two[1].contains("answers.jsonl: expected no answers"), "{two:?}");
    }
    // With the end of the first sweep, the file is free.
    let mut again = Sweep { folder: Some(folder.path().to_owned()), resume: true, ..Sweep::new(&mut counter) };
    let mut asked = Vec::new();
    assert_eq!(run(&mut again, &mut asked).unwrap().given, UNITS.map(Some));
    assert!(asked.is_empty(), "{asked:?}");
}

#[test]
fn answers_are_shared_in_pieces() {
    let (alike, nothing) = ([vec![0, 1, 2], vec![0, 1, 2], vec![0, 1, 2]], [vec![], vec![], vec![]]);
    let unlike = [vec![0, 3, 4, 5, 6], vec![], vec![1, 2, 6]];
    for (known, expected) in [(alike, 0..3), (nothing, 0..0), (unlike, 0..7)] {
        let expected: Vec<usize> = expected.collect();
        // A line at a time, some, all.
        for at_once in [3, 150, AT_ONCE] {
            let shared: Vec<Vec<usize>> = std::thread::scope(|scope| {
                let one = |(ranks, known): (Threads, &Vec<usize>)| {
                    let line = |&unit: &usize| (unit, Line { unit, answer: Some(json!([unit])), problem: None });
                    let mut lines: BTreeMap<usize, Line> = known.iter().map(line).collect();
                    scope.spawn(move || {
                        let ranks: Arc<dyn Communicator> = Arc::new(ranks);
                        share(&ranks, &mut lines, at_once).unwrap();
                        assert!(lines.iter().all(|(unit, line)| line.answer == Some(json!([unit]))));
                        lines.into_keys().collect()
                    })
                };
                let threads: Vec<_> = Threads::new(3).into_iter().zip(&known).map(one).collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).collect()
            });
            assert_eq!(shared, [expected.clone(), expected.clone(), expected.clone()], "{at_once}");
        }
    }
}

#[test]
fn long_values_are_cut_to_fit_a_message() {
    let short = ["\"é\"", "\"ü\""];
    assert_eq!(cut_to_fit(short), short);
    let (same, (a, b)) = ("é".repeat(300), ("a".repeat(300), "b"));
    let [long, other] = cut_to_fit([&a, b]);
    assert_eq!((long, other.as_str()), (format!("{}…", "a".repeat(200)), b));
    let [long, other] = cut_to_fit([&format!("{same}{a}"), &format!("{same}{b}")]);
    assert_eq!(long, format!("…{}{}…", "é".repeat(50), "a".repeat(150)));
    assert_eq!(other, format!("…{}b", "é".repeat(50)));
}

#[cfg(unix)]
#[test]
fn a_path_need_not_be_utf8() {
    use std::os::unix::ffi::OsStrExt;

    struct Asked;
    impl Item for Asked {
        fn image(&self) -> &Path {
            Path::new(std::ffi::OsStr::from_bytes(b"a\xff.png"))
        }

        fn text(&self) -> &str {
            "a cup"
        }
    }
    assert_eq!(name_of(&[Asked]), "[\"a\u{fffd}.png\",[\"a cup\"]]");
}

#[test]
fn what_was_broken_may_be_mended() {
    let folder = tempfile::tempdir().unwrap();
    let answer = |resume, is_whole| {
        let (folder, mut counter) = (Some(folder.path().to_owned()), |_, _| {});
        let mut sweep = Sweep { folder, resume, max_bad_fraction: 0.5, ..Sweep::new(&mut counter) };
        let ask = |units: &[&u32]| {
            Ok(units.iter().map(|&&unit| if is_whole || unit != 9 { Ok(unit) } else { Err(broken(unit)) }).collect())
        };
        sweep.run(&work(), &UNITS, u32::to_string, ask).unwrap().given
    };
    assert_eq!(answer(false, false)[5], None);
    // The newest answer counts.
    assert_eq!(answer(true, true), UNITS.map(Some));
    assert_eq!(answer(true, false), UNITS.map(Some));
}

#[test]
fn other_items_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let answer = |resume, units: &[u32]| {
        let (folder, mut counter) = (Some(folder.path().to_owned()), |_, _| {});
        let mut sweep = Sweep { folder, resume, ..Sweep::new(&mut counter) };
        let ask = |units: &[&u32]| Ok(units.iter().map(|&&unit| Ok(unit)).collect());
        sweep.run(&work(), units, u32::to_string, ask).map(|answers: Answers<u32>| answers.given)
    };
    answer(false, &[1, 2]).unwrap();
    let error = answer(true, &[1, 3]).unwrap_err().to_string();
    assert!(
        error.ends_with("items: expected answers about the 2 that are asked about now, found some about 2 others"),
        "{error}"
    );
}

#[test]
fn processes_that_ask_other_things_are_refused() {
    let errors: Vec<String> = std::thread::scope(|scope| {
        let one = |(rank, ranks): (usize, Threads)| {
            scope.spawn(move || {
                let mut counter = |_, _| {};
                let ranks = Arc::new(ranks);
                let mut sweep = Sweep { ranks, about: json!(rank), ..Sweep::new(&mut counter) };
                run(&mut sweep, &mut Vec::new()).unwrap_err().to_string()
            })
        };
        let threads: Vec<_> = Threads::new(2).into_iter().enumerate().map(one).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert!(errors.iter().all(|error| error.contains("work")), "{errors:?}");
}

#[test]
fn too_much_that_is_broken_is_an_error() {
    let error = run(&mut Sweep::new(&mut |_, _| {}), &mut Vec::new()).unwrap_err().to_string();
    assert!(error.starts_with("1 of 7 are broken, more than 0.0 %; the first: "), "{error}");
    assert!(error.contains("unit 9"), "{error}");
}

#[test]
fn several_processes_share_the_work() {
    let folder = tempfile::tempdir().unwrap();
    let all: Vec<Vec<u32>> = std::thread::scope(|scope| {
        let one = |ranks: Threads| {
            let folder = folder.path().to_owned();
            scope.spawn(move || {
                let mut asked = Vec::new();
                let mut counter = |_, _| {};
                let mut sweep = Sweep {
                    folder: Some(folder),
                    ranks: Arc::new(ranks),
                    max_bad_fraction: 0.5,
                    ..Sweep::new(&mut counter)
                };
                expected(&run(&mut sweep, &mut asked).unwrap());
                asked
            })
        };
        let threads: Vec<_> = Threads::new(3).into_iter().map(one).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert_eq!(all, [vec![3, 1, 2], vec![4, 1], vec![5, 9]]);
    // One process finds what three have answered, and asks about the broken one again.
    let mut asked = Vec::new();
    let mut counter = |_, _| {};
    let folder = Some(folder.path().to_owned());
    let mut sweep = Sweep { folder, resume: true, max_bad_fraction: 0.5, ..Sweep::new(&mut counter) };
    expected(&run(&mut sweep, &mut asked).unwrap());
    assert_eq!(asked, [9]);
}
