//! Folders of pictures: questions about them are kept as they are answered, and go on after an interruption.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use super::{folder, json, names, refused, stderr, text, xvlm};

/// Asks about more pictures than are looked at at a time.
const SCENES: usize = 18;

fn world(dir: &Path) {
    text(dir, &format!("synth --out data --scenes {SCENES} --seed 5"));
    fs::write(dir.join("answers.txt"), "red\ngreen\nblue\n").unwrap();
}

fn read(dir: &Path, file: &str) -> Vec<u8> {
    fs::read(dir.join(file)).unwrap_or_else(|error| panic!("{file}: {error}"))
}

#[test]
fn what_was_cut_short_becomes_the_same_again() {
    let dir = folder();
    let dir = dir.path();
    world(dir);
    for (name, command) in [
        ("captions", "caption --max-tokens 4"),
        ("captions", "caption --max-tokens 4 --sample --samples 2 --seed 3"),
        ("grounding", "ground --text a~star --text the~red~circle"),
        ("heat", "ground --text a~star --heat --grid"),
        ("answers", "answer --text which~colour"),
        ("answers", "answer --text which~colour --answers answers.txt --top 2"),
        ("matches", "match --text a~star --text a~ring"),
        ("matches", "match --text a~star --box 0,0,50,60 --box 20,20,120,110.5"),
        ("completions", "fill --text a~___~star --text the~[MASK] --top 3"),
        ("completions", "fill --text a~___~and~a~___ --answer star --answer red"),
    ] {
        let command = format!("{command} --json --model model --images data/images");
        let together: Value = serde_json::from_str(&text(dir, &command)).unwrap();
        let command = format!("{command} --out out");
        let told: Value = serde_json::from_str(&text(dir, &command)).unwrap();
        let (lines, result) = (format!("out/{name}.jsonl"), format!("out/{name}.json"));
        assert_eq!(told, json!({ "result_file": result, "pictures": SCENES, "left_out": [] }), "{command}");
        let filed: Value = serde_json::from_slice(&read(dir, &result)).unwrap();
        assert_eq!(filed, together, "{command}");

        let whole = [read(dir, &lines), read(dir, &result)];
        let line = |number: usize| {
            let ends = whole[0].iter().enumerate().filter(|(_, byte)| **byte == b'\n');
            ends.map(|(at, _)| at + 1).nth(number).unwrap()
        };
        // In the first line, after it, within an answer, after a batch, and after all but the result.
        for length in [9, line(0), line(4) + 25, line(16), whole[0].len()] {
            fs::write(dir.join(&lines), &whole[0][..length]).unwrap();
            fs::remove_file(dir.join(&result)).unwrap();
            refused(dir, &command, &[&lines, "expected no answers, found some: resume the work"]);
            assert!(!dir.join(&result).exists());
            text(dir, &format!("{command} --resume"));
            for (file, whole) in [&lines, &result].into_iter().zip(&whole) {
                assert!(read(dir, file) == *whole, "{command}: {file}, after {length} bytes");
            }
        }
        fs::remove_dir_all(dir.join("out")).unwrap();
    }
}

#[test]
fn answers_to_something_else_are_refused() {
    let dir = folder();
    let dir = dir.path();
    world(dir);
    let ground = "ground --model model --images data/images --out out --text a~star";
    text(dir, ground);
    let refuse = |arguments: &str, expected: &[&str]| {
        refused(dir, &format!("{arguments} --resume"), &[&["out/grounding.jsonl"], expected].concat());
    };
    refuse(&format!("{ground} --precision bf16"), &["about.precision: expected \"bf16\"", "found \"f32\""]);
    refuse(&ground.replace("--model model", ""), &["about.weights: expected \""]);
    refuse(&format!("{ground} --text a~ring"), &["options.texts: expected [\"a star\",\"a ring\"]", "[\"a star\"]"]);
    refuse(&format!("{ground} --draw drawn"), &["options.draw: expected \"drawn\"", "found null"]);
    refuse(
        &ground.replace("--images data/images", "--image data/images/000001.png"),
        &["items: expected answers about the 1 that", "about 18 others"],
    );
    fs::rename(dir.join("data/images/000001.png"), dir.join("data/images/other.png")).unwrap();
    refuse(ground, &["items: expected answers about the 18 that are asked about now, found some about 18 others"]);
    fs::rename(dir.join("data/images/other.png"), dir.join("data/images/000001.png")).unwrap();
    text(dir, &format!("{ground} --resume"));

    // The same model in another place is the same, and so are the pictures of a list.
    fs::rename(dir.join("model"), dir.join("moved")).unwrap();
    let list: String = (0..SCENES).map(|scene| format!("data/images/{scene:06}.png\n")).collect();
    fs::write(dir.join("list.txt"), list).unwrap();
    let other = ground.replace("--images data/images", "--list list.txt").replace("--model model", "--model moved");
    text(dir, &format!("{other} --resume"));
    // What was read of a file counts, not its name.
    let answer = "answer --model moved --list list.txt --out answered --text which~colour --answers";
    text(dir, &format!("{answer} answers.txt"));
    fs::write(dir.join("same.txt"), "red\ngreen\n\nblue").unwrap();
    text(dir, &format!("{answer} same.txt --resume"));
    fs::write(dir.join("same.txt"), "red\ngreen\n").unwrap();
    refused(dir, &format!("{answer} same.txt --resume"), &["answered/answers.jsonl: options.answers: expected \""]);

    for wrong in ["--resume", "--image a.png", "--list list.txt"] {
        let output = xvlm(dir, &format!("caption --images data/images {wrong}"));
        assert_eq!(output.status.code(), Some(2), "{wrong}");
    }
    refused(dir, "caption --images none", &["none"]);
    refused(dir, "caption --list none.txt", &["none.txt"]);
    refused(dir, "caption --images moved", &["moved: pictures: expected at least one item"]);
}

#[test]
fn broken_pictures_are_named_and_asked_again() {
    let dir = folder();
    let dir = dir.path();
    world(dir);
    let image = dir.join("data/images/000017.png");
    let whole = fs::read(&image).unwrap();
    fs::write(&image, &whole[..60]).unwrap();
    let caption = "caption --model model --images data/images --max-tokens 4";
    refused(dir, caption, &["data/images/000017.png"]);
    // What was answered before is kept.
    refused(dir, &format!("{caption} --out out"), &["data/images/000017.png"]);
    assert_eq!(names(&dir.join("out")), ["captions.jsonl"]);
    assert_eq!(fs::read_to_string(dir.join("out/captions.jsonl")).unwrap().lines().count(), 1 + 16);
    refused(
        dir,
        &format!("{caption} --out out --resume --max-bad-fraction 0.05"),
        &["1 of 18 are broken", "000017.png"],
    );
    let resume = format!("{caption} --out out --resume --max-bad-fraction 0.1");
    let told = json(dir, &resume);
    assert_eq!((&told["pictures"], &told["left_out"][0]["item"]), (&json!(17), &json!(17)));
    assert!(stderr(&xvlm(dir, &resume)).contains("left out: image data/images/000017.png"));
    fs::write(&image, &whole).unwrap();
    assert_eq!(json(dir, &resume)["pictures"], json!(18));
    // As if it had never been broken.
    text(dir, &format!("{caption} --out sound"));
    assert_eq!(read(dir, "out/captions.json"), read(dir, "sound/captions.json"));

    // It is named though one is left.
    fs::create_dir(dir.join("two")).unwrap();
    fs::write(dir.join("two/a.png"), &whole[..60]).unwrap();
    fs::write(dir.join("two/b.png"), &whole).unwrap();
    for command in ["caption --max-tokens 4", "ground --text a~star"] {
        let output = xvlm(dir, &format!("{command} --model model --images two --max-bad-fraction 0.5"));
        assert!(output.stdout.starts_with(b"two/b.png"), "{command}: {}", String::from_utf8_lossy(&output.stdout));
        assert!(stderr(&output).contains("left out: 1 of 2 pictures"), "{command}: {}", stderr(&output));
    }

    // A box that is not inside is the picture's problem; nothing at all is an error.
    let boxes = "match --model model --images data/images --text a~star --box 0,0,500,10";
    refused(dir, boxes, &["data/images/000000.png", "box 0", "192x192", "500"]);
    let output = xvlm(dir, &format!("{boxes} --max-bad-fraction 1 --json"));
    assert_eq!((output.status.code(), output.stdout.as_slice()), (Some(1), &b"[]\n"[..]));
    assert!(stderr(&output).contains("pictures: 18 broken or missing"), "{}", stderr(&output));
}

#[test]
fn what_is_sound_does_not_depend_on_what_is_broken() {
    let dir = folder();
    let dir = dir.path();
    world(dir);
    let boxes: serde_json::Map<String, Value> = (0..SCENES)
        .map(|scene| (format!("{scene:06}"), json!([[scene, 0, 40 + scene, 96], [96, 2 * scene, 96, 50]])))
        .collect();
    fs::write(dir.join("boxes.json"), Value::from(boxes).to_string()).unwrap();
    let image = dir.join("data/images/000003.png");
    let whole = fs::read(&image).unwrap();
    for (name, draws, command) in [
        ("captions", false, "caption --max-tokens 4 --sample --samples 2 --seed 3"),
        ("grounding", true, "ground --text a~star --text the~red~circle"),
        ("heat", true, "ground --text a~star --heat --proposals boxes.json"),
        ("answers", false, "answer --text which~colour --answers answers.txt --top 2"),
        ("matches", false, "match --text a~star --box 0,0,50,60 --box 20,20,120,110.5"),
        ("completions", false, "fill --text a~___~star --top 3"),
    ] {
        let command = format!("{command} --model model --images data/images --max-bad-fraction 0.1");
        let run = |out: &str| {
            let draw = if draws { format!("--draw {out}/drawn") } else { String::new() };
            text(dir, &format!("{command} {draw} --out {out}"));
            let mut drawn = if draws { names(&dir.join(out).join("drawn")) } else { Vec::new() };
            drawn.retain(|name| name != "000003.png");
            let drawn: Vec<_> =
                drawn.into_iter().map(|name| (read(dir, &format!("{out}/drawn/{name}")), name)).collect();
            let result = read(dir, &format!("{out}/{name}.json"));
            (serde_json::from_slice::<Vec<Value>>(&result).unwrap(), drawn)
        };
        let (mut sound, drawn) = run("sound");
        fs::write(&image, &whole[..60]).unwrap();
        let broken = run("broken");
        fs::write(&image, &whole).unwrap();
        assert_eq!(sound.remove(3)["image"], "data/images/000003.png");
        assert_eq!(broken.0, sound, "{command}");
        assert_eq!(drawn.len(), if draws { SCENES - 1 } else { 0 });
        assert!(broken.1 == drawn, "{command}");
        for out in ["sound", "broken"] {
            fs::remove_dir_all(dir.join(out)).unwrap();
        }
    }
}

#[test]
fn the_heading_is_short_and_refusals_come_first() {
    let dir = folder();
    let dir = dir.path();
    world(dir);
    let boxes: serde_json::Map<String, Value> =
        (0..SCENES).map(|scene| (format!("{scene:06}"), json!(vec![[1.5, 2.5, 30.25, 40.0]; 50]))).collect();
    fs::write(dir.join("boxes.json"), Value::from(boxes).to_string()).unwrap();
    let words = &["red", "green", "blue", "star", "ring", "circle"];
    let lines = words.iter().flat_map(|a| words.iter().flat_map(move |b| words.iter().map(move |c| [a, b, c])));
    let lines: String = lines.map(|[a, b, c]| format!("{a} {b} {c}\n")).collect();
    fs::write(dir.join("words.txt"), lines).unwrap();
    for (name, command) in [
        ("heat", "ground --text a~star --heat --proposals boxes.json"),
        ("answers", "answer --text which~one --answers words.txt"),
    ] {
        text(dir, &format!("{command} --model model --images data/images --out out"));
        let lines = String::from_utf8(read(dir, &format!("out/{name}.jsonl"))).unwrap();
        let heading = lines.lines().next().unwrap();
        assert!(heading.len() < 700, "{heading}");
    }

    for (command, expected) in [
        ("embed --images none --out embedded", "none: "),
        ("embed --images data/captions.json --out embedded", "data/captions.json: "),
        ("fill --file none.jsonl --out graded", "none.jsonl: "),
    ] {
        // There is no such model either.
        refused(dir, &format!("{command} --model missing"), &[expected]);
    }
}

/// What a scheduler or a container says of other processes is not about one picture.
#[test]
fn one_picture_needs_no_other_process() {
    let dir = folder();
    let dir = dir.path();
    text(dir, "synth --out data --scenes 2 --seed 5");
    let of_eight = |arguments: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_xvlm"));
        command.current_dir(dir).args(arguments.split(' ')).envs([
            ("RANK", "1"),
            ("WORLD_SIZE", "8"),
            ("LOCAL_RANK", "1"),
        ]);
        command.env("MASTER_ADDR", "127.0.0.1").output().unwrap()
    };
    let one = "caption --model model --max-tokens 4 --image data/images/000000.png";
    let output = of_eight(one);
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(String::from_utf8(output.stdout).unwrap(), text(dir, one));
    let several = format!("{one} data/images/000001.png");
    let output = of_eight(&format!("{several} --ranks alone"));
    assert_eq!(String::from_utf8(output.stdout).unwrap(), text(dir, &several));
    // A build that could join them would wait for the others.
    #[cfg(not(feature = "mpi"))]
    for shared in [several, format!("{one} --out out")] {
        let output = of_eight(&shared);
        assert!(!output.status.success() && stderr(&output).contains("--ranks alone"), "{}", stderr(&output));
    }
}

#[cfg(target_os = "linux")]
#[test]
fn names_need_not_be_text() {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;

    let dir = folder();
    let dir = dir.path();
    text(dir, "synth --out data --scenes 1 --seed 5");
    fs::create_dir(dir.join("latin")).unwrap();
    fs::copy(dir.join("data/images/000000.png"), dir.join("latin").join(OsStr::from_bytes(b"caf\xe9.png"))).unwrap();
    let told = json(dir, "caption --model model --max-tokens 4 --images latin --out out");
    assert_eq!(told["pictures"], 1);
    let filed: Value = serde_json::from_slice(&read(dir, "out/captions.json")).unwrap();
    assert_eq!(filed[0]["image"], "latin/caf\u{fffd}.png");
    for heat in ["", "--heat"] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_xvlm"));
        let arguments = format!("ground --model model --images latin --text star --out drawn {heat} --draw");
        command.current_dir(dir).args(arguments.split_whitespace()).arg(OsStr::from_bytes(b"drawn/\xe9"));
        let output = command.output().unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
        assert_eq!(names(&dir.join("drawn").join(OsStr::from_bytes(b"\xe9"))), ["caf\u{fffd}.png"]);
    }
}
