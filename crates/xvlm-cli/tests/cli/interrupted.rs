//! Runs that are killed, asked to stop, or out of disk: each ends as one that was left alone.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{sizes, stderr, text};

/// Longer than anything here takes, even on a busy machine.
const FOREVER: Duration = Duration::from_secs(120);

/// A world, and the configuration of a run of so many iterations in it, each with a checkpoint that takes a while to write.
fn world(iterations: u64) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    text(dir.path(), "synth --out data --scenes 8 --seed 5");
    let mut model = sizes(0);
    let text_config = &mut model["text_config"];
    (text_config["hidden_size"], text_config["intermediate_size"]) = (json!(128), json!(512));
    let config = json!({
        "train_file": ["data/pretrain.jsonl"],
        "model": model,
        "data": { "batch_size": 2, "max_images": 1, "max_regions": 2, "regions_per_image": 2, "max_tokens": 40 },
        "train": { "iterations": iterations, "log_every": 3, "checkpoint_every": 1, "optimizer": { "lr": 0.001 }, "schedule": { "warmup": 4 } },
    });
    fs::write(dir.path().join("tiny.yaml"), config.to_string()).unwrap();
    dir
}

fn command(dir: &Path, out: &str, arguments: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_xvlm"));
    command.current_dir(dir).args(["pretrain", "--config", "tiny.yaml", "--json", "--out", out]);
    command.args(arguments.split_whitespace()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// A run that must end well; what it reports.
fn finished(dir: &Path, out: &str, arguments: &str) -> Value {
    report(&command(dir, out, arguments).output().unwrap())
}

fn report(output: &Output) -> Value {
    assert!(output.status.success(), "{}: {}", output.status, stderr(output));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Names in a folder, which may not be there yet.
fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn is_writing(run: &Path) -> bool {
    names(&run.join("checkpoints")).iter().any(|name| name.starts_with(".writing-"))
}

/// Waits for something that a running process does; whether it did before it ended.
fn wait_for(child: &mut Child, mut happens: impl FnMut() -> bool) -> bool {
    let start = Instant::now();
    while !happens() {
        assert!(start.elapsed() < FOREVER, "it should happen");
        if child.try_wait().unwrap().is_some() {
            return happens();
        }
        sleep(Duration::from_micros(200));
    }
    true
}

fn signal(child: &Child, name: &str) {
    let sent = Command::new("sh").args(["-c", &format!("kill -{name} {}", child.id())]).status().unwrap();
    assert!(sent.success());
}

/// The newest checkpoint's iteration.
fn newest(run: &Path) -> u64 {
    names(&run.join("checkpoints")).iter().filter_map(|name| name.parse().ok()).max().unwrap_or(0)
}

/// Asserts that two runs left the same behind, but for times.
fn assert_same(left: &Path, right: &Path) {
    let newest = newest(left);
    assert_eq!(names(&left.join("checkpoints")), names(&right.join("checkpoints")));
    let of_checkpoint = ["weights", "optimizer"].map(|name| format!("{newest:07}/{name}.safetensors"));
    let of_run = ["best.json", "../model/model.safetensors", "../best/model.safetensors"].map(str::to_owned);
    for file in of_checkpoint.iter().chain(&of_run) {
        let [left, right] = [left, right].map(|run| fs::read(run.join("checkpoints").join(file)).unwrap());
        assert!(left == right, "{file}");
    }
    let rows = |run: &Path| -> Vec<Value> {
        let text = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
        let row = |line: &str| -> Value {
            let mut row: Value = serde_json::from_str(line).unwrap();
            for time in ["images_per_second", "elapsed_seconds", "peak_memory_mib"] {
                row[time] = Value::Null;
            }
            row
        };
        text.lines().map(row).collect()
    };
    assert_eq!(rows(left), rows(right));
}

#[test]
fn a_run_that_is_killed_twenty_times_ends_in_the_same_weights() {
    let dir = world(160);
    let dir = dir.path();
    finished(dir, "whole", "");
    let run = dir.join("killed");
    let mut in_the_middle = 0;
    for kill in 0..20u64 {
        let mut child = command(dir, "killed", "--resume").spawn().unwrap();
        let before = newest(&run);
        if kill % 2 == 0 {
            // While a checkpoint is written, the next or the one after.
            let at = before + kill / 2 % 2;
            assert!(wait_for(&mut child, || newest(&run) >= at && is_writing(&run)));
        } else {
            // At any moment: also before the first iteration, and in the middle of one.
            sleep(Duration::from_millis(kill * 7919 % 120));
            wait_for(&mut child, || kill % 4 == 1 || newest(&run) > before);
            sleep(Duration::from_micros(kill * 104_729 % 20_000));
        }
        child.kill().unwrap();
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), None, "kill {kill}: {}", stderr(&output));
        in_the_middle += u64::from(is_writing(&run));
    }
    assert!(in_the_middle >= 3 && newest(&run) < 160);
    let report = finished(dir, "killed", "--resume");
    assert_eq!((&report["iterations"], &report["stopped"]), (&json!(160), &json!(false)));
    assert_same(&dir.join("whole"), &run);
}

#[test]
fn a_run_that_is_asked_to_stop_saves_and_exits_well() {
    let dir = world(24);
    let dir = dir.path();
    // Checkpoints seldom: those that are found are due to the signals.
    let seldom = "--set train.checkpoint_every=20";
    finished(dir, "whole", seldom);
    let run = dir.join("stopped");
    for name in ["TERM", "INT", "USR1"] {
        let rows = || fs::read_to_string(run.join("metrics.jsonl")).unwrap_or_default().lines().count();
        let (rows_before, before) = (rows(), newest(&run));
        let mut child = command(dir, "stopped", &format!("--resume {seldom}")).spawn().unwrap();
        assert!(wait_for(&mut child, || rows() > rows_before));
        signal(&child, name);
        let output = child.wait_with_output().unwrap();
        let report = report(&output);
        assert!(stderr(&output).contains("finishing this iteration and saving"), "{}", stderr(&output));
        assert_eq!((&report["stopped"], &report["model"]), (&json!(true), &Value::Null), "{name}");
        assert!(newest(&run) > before && report["iterations"] == newest(&run), "{report}");
        assert!(!run.join("model").exists());
    }
    assert!(newest(&run) < 24);
    finished(dir, "stopped", &format!("--resume {seldom}"));
    let [left, right] = ["whole", "stopped"].map(|run| dir.join(run));
    for run in [&left, &right] {
        // What was stopped has checkpoints of its own.
        for name in names(&run.join("checkpoints")).iter().filter(|name| *name != "best.json" && *name != "0000024") {
            fs::remove_dir_all(run.join("checkpoints").join(name)).unwrap();
        }
    }
    assert_same(&left, &right);
}

/// Stops a run after its second checkpoint, and takes back its room by `limit`; it must fail, and go on when there is room.
fn out_of_room(dir: &Path, out: &str, limit: impl FnOnce(&Path) -> Output) {
    let run = dir.join(out);
    let mut child = command(dir, out, "").spawn().unwrap();
    assert!(wait_for(&mut child, || newest(&run) >= 2));
    signal(&child, "TERM");
    report(&child.wait_with_output().unwrap());
    let before = newest(&run);

    let output = limit(&run);
    let told = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{told}");
    assert!(told.contains(&format!("checkpoints/{:07}/", before + 1)) && told.contains("safetensors: "), "{told}");
    assert!(
        told.contains("the checkpoints made before are whole: once there is room, the run can be resumed"),
        "{told}"
    );
    assert_eq!((newest(&run), is_writing(&run)), (before, false));
}

#[test]
fn a_file_that_may_not_grow_loses_nothing() {
    let dir = world(8);
    let dir = dir.path();
    finished(dir, "whole", "");
    out_of_room(dir, "limited", |_| {
        // 512 or 1024 bytes each, by shell: less than a file of weights, more than any other.
        let shell = "trap '' XFSZ; ulimit -f 500; exec \"$@\"";
        let plain = command(dir, "limited", "--resume");
        let mut command = Command::new("sh");
        command.current_dir(dir).args(["-c", shell, "sh"]).arg(plain.get_program()).args(plain.get_args());
        command.output().unwrap()
    });
    finished(dir, "limited", "--resume");
    assert_same(&dir.join("whole"), &dir.join("limited"));
}

#[test]
fn questions_that_are_asked_to_stop_go_on() {
    let dir = crate::folder();
    let dir = dir.path();
    text(dir, "synth --out data --scenes 1 --seed 5");
    // One picture many times: each is a question of its own.
    fs::write(dir.join("list.txt"), "data/images/000000.png\n".repeat(3000)).unwrap();
    let ask = |out: &str, more: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_xvlm"));
        command.current_dir(dir).args("match --model model --list list.txt --text star --out".split(' ')).arg(out);
        command.args(more.split_whitespace()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    };
    let lines = |out: &str| fs::read(dir.join(out).join("matches.jsonl")).unwrap_or_default();
    assert!(ask("whole", "").output().unwrap().status.success());
    for (name, code) in [("TERM", Some(1)), ("KILL", None)] {
        let before = lines("stopped").len();
        let mut child = ask("stopped", if before > 0 { "--resume" } else { "" }).spawn().unwrap();
        assert!(wait_for(&mut child, || lines("stopped").len() > before + 500));
        signal(&child, name);
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), code, "{name}: {}", stderr(&output));
        for told in ["finishing what is at hand and saving", "--resume goes on", " of 3000 are done"] {
            assert!(code.is_none() || stderr(&output).contains(told), "{}", stderr(&output));
        }
        assert!(!dir.join("stopped/matches.json").exists());
    }
    assert!(ask("stopped", "--resume").output().unwrap().status.success());
    assert!(lines("stopped") == lines("whole"));
    let result = |out: &str| fs::read(dir.join(out).join("matches.json")).unwrap();
    assert!(result("stopped") == result("whole"));
}

/// A file system of its own, unmounted when dropped.
struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

#[test]
fn a_full_disk_loses_nothing() {
    let dir = world(8);
    let dir = dir.path();
    let disk = dir.join("disk");
    fs::create_dir(&disk).unwrap();
    let mount = Command::new("mount").args(["-t", "tmpfs", "-o", "size=200m", "tmpfs"]).arg(&disk).output();
    if !mount.is_ok_and(|mount| mount.status.success()) {
        eprintln!(
            "skipped: only root may mount a small file system; `a_file_that_may_not_grow_loses_nothing` is without one"
        );
        return;
    }
    let disk = Mounted(disk);
    finished(dir, "whole", "");
    let filler = disk.0.join("filler");
    out_of_room(dir, "disk/run", |run| {
        // Of the room for one more checkpoint, half.
        let checkpoint = run.join(format!("checkpoints/{:07}", newest(run)));
        let half: u64 =
            names(&checkpoint).iter().map(|name| checkpoint.join(name).metadata().unwrap().len()).sum::<u64>() / 2;
        let free = Command::new("df").args(["--output=avail", "-B1"]).arg(&disk.0).output().unwrap();
        let free: u64 = String::from_utf8(free.stdout).unwrap().lines().nth(1).unwrap().trim().parse().unwrap();
        fs::write(&filler, vec![1; (free - half) as usize]).unwrap();
        command(dir, "disk/run", "--resume").output().unwrap()
    });
    fs::remove_file(&filler).unwrap();
    finished(dir, "disk/run", "--resume");
    assert_same(&dir.join("whole"), &disk.0.join("run"));
}
