//! Questions, blanks and statements.

use super::*;

#[test]
fn answers_are_right() {
    let (mut rng, known) = (rng(8), answers());
    let (mut yes, mut no, mut checked) = (0usize, 0usize, BTreeSet::new());
    for scene in SPLITS.into_iter().flat_map(|split| scenes(700, split)) {
        for question in scene.questions(&mut rng) {
            let text = &question.question;
            assert!(known.binary_search(&question.answer).is_ok(), "{question:?}");
            yes += usize::from(question.answer == "yes");
            no += usize::from(question.answer == "no");
            let tokens = read(text);
            let relation_at = tokens.iter().position(|token| token.starts_with("relation:"));
            let fitting = scene.objects.iter().filter(|object| is(&tokens, object)).count();
            // “is … larger than …”, “which is larger , … or …”, “do … and … have …”
            let two = |by: &[&str]| {
                let from = tokens.iter().position(|t| t == ",").map_or(0, |at| at + 1);
                let tokens = &tokens[from..];
                let at = tokens.iter().position(|token| by.contains(&token.as_str())).unwrap();
                (referent(&scene, &tokens[..at]), referent(&scene, &tokens[at..]))
            };
            let yes_no = |is: bool| (if is { "yes" } else { "no" }).to_owned();
            let expected = match question.kind {
                "exists" => yes_no(fitting > 0),
                "count" => ["zero", "one", "two", "three", "four", "five"][fitting].to_owned(),
                "colour" => referent(&scene, &tokens).colour.word().to_owned(),
                "shape" => referent(&scene, &tokens).shape.word().to_owned(),
                "size" => {
                    let tokens = read(&text.replace("how big", "").replace("how large", ""));
                    referent(&scene, &tokens).size.word().to_owned()
                }
                "texture" => {
                    let tokens = read(&text.replace("solid , striped or dotted", ""));
                    referent(&scene, &tokens).texture.word().to_owned()
                }
                "is texture" => {
                    let at = tokens.len() - 2;
                    let texture = tokens[at].strip_prefix("texture:").unwrap();
                    yes_no(referent(&scene, &tokens[..at]).texture.word() == texture)
                }
                "place" => place(referent(&scene, &read(text.split("is the").nth(1).unwrap()))).replace('-', " "),
                "related" => {
                    let tokens = &tokens[relation_at.unwrap()..];
                    referent(&scene, tokens).shape.word().to_owned()
                }
                "is related" => {
                    let at = relation_at.unwrap();
                    let one = referent(&scene, &tokens[..at]);
                    let two = referent(&scene, &tokens[at + 1..]);
                    let to = relation(&tokens[at][9..]);
                    let distance = key(two, to) - key(one, to);
                    assert!(distance.abs() >= 24.0, "{text}");
                    yes_no(distance > 0.0)
                }
                "compare" => {
                    let by = ["larger", "bigger", "smaller"];
                    let (one, two) = two(&by);
                    let larger = !tokens.contains(&"smaller".to_owned());
                    assert_ne!(one.size, two.size);
                    yes_no((one.size > two.size) == larger)
                }
                "which" => {
                    let (one, two) = two(&["or"]);
                    let larger = !tokens.contains(&"smaller".to_owned());
                    let found = if (one.size > two.size) == larger { one } else { two };
                    format!("{} {}", found.colour.word(), found.shape.word())
                }
                "same colour" => {
                    let (one, two) = two(&["and"]);
                    yes_no(one.colour == two.colour)
                }
                "background" => scene.background.colour.word().to_owned(),
                kind => panic!("{kind} is not known here"),
            };
            assert_eq!(question.answer, expected, "{text} of {scene:?}");
            checked.insert(question.kind);
        }
    }
    assert_eq!(checked.len(), 14, "{checked:?}");
    assert!(yes.abs_diff(no) * 20 < yes + no, "{yes} yes, {no} no");
}

#[test]
fn blanks_have_one_answer() {
    let words = |kind: &str| -> Vec<&str> {
        match kind {
            "colour" => Colour::ALL.iter().map(|c| c.word()).collect(),
            "shape" => Shape::ALL.iter().map(|s| s.word()).collect(),
            "texture" => Texture::ALL.iter().map(|t| t.word()).collect(),
            "size" => Size::ALL.iter().map(|s| s.word()).collect(),
            _ => vec!["left", "right", "above", "below"],
        }
    };
    let (mut rng, mut kinds) = (rng(9), BTreeSet::new());
    for scene in SPLITS.into_iter().flat_map(|split| scenes(700, split)) {
        for fill in scene.fill_phrases(&mut rng) {
            assert_eq!(fill.text.matches("___").count(), 1);
            assert!(fill.answers.iter().all(|answer| split(answer) == [answer.as_str()]));
            kinds.insert(fill.kind);
            if fill.kind == "count" {
                let tokens = read(&fill.text);
                let count = scene.objects.iter().filter(|object| is(&tokens, object)).count();
                assert_eq!(fill.answers, [["two", "three", "four", "five"][count - 2]]);
                continue;
            }
            let fits = |word: &str| check_caption(&scene, &fill.text.replace("___", word)).all_right();
            for answer in &fill.answers {
                assert!(fits(answer), "{fill:?} with {answer}");
            }
            let mut fitting = words(fill.kind);
            fitting.retain(|word| fits(word));
            assert_eq!(fitting, [fill.answers[0].as_str()], "{fill:?} of {scene:?}");
        }
    }
    assert_eq!(kinds.len(), 6);
}

#[test]
fn statements_about_two_are_right() {
    let (mut rng, mut labels) = (rng(10), [0usize; 2]);
    for split_ in SPLITS {
        let all: Vec<Scene> = scenes(700, split_).collect();
        for two in all.windows(2) {
            for statement in statements(&two[0], &two[1], 3, &mut rng) {
                let text = &statement.sentence;
                let has = |words: &[&str]| words.iter().any(|words| text.contains(words));
                // Only the noun is to be read, not the sides.
                let noun = read(&text.replace("left", "").replace("right", ""));
                let counts = [&two[0], &two[1]].map(|scene| scene.objects.iter().filter(|o| is(&noun, o)).count());
                let right = text.find("right");
                let side = usize::from(right.is_some_and(|at| text.find("left").is_none_or(|l| at < l)));
                let numbers = ["zero", "one", "two", "three", "four", "five"];
                let number = || {
                    let text = text.replace("two images", "");
                    let mut words = text.split(' ');
                    words.find_map(|word| numbers.iter().position(|&n| n == word)).unwrap()
                };
                let there = counts.iter().filter(|&&count| count > 0).count();
                let truth = if has(&["both images", "each"]) {
                    there == 2
                } else if has(&["at least one", "one or both"]) {
                    there >= 1
                } else if has(&["exactly one image", "only one"]) {
                    there == 1
                } else if has(&["neither", "none"]) {
                    there == 0
                } else if has(&["in total", "together"]) {
                    counts[0] + counts[1] == number()
                } else if has(&["more"]) {
                    counts[side] > counts[1 - side]
                } else if has(&["exactly", "there are"]) {
                    counts[side] == number()
                } else if has(&[" not ", " no "]) {
                    counts[side] == 0
                } else {
                    counts[side] > 0
                };
                assert_eq!(statement.label, truth, "{text}");
                labels[usize::from(truth)] += 1;
            }
        }
    }
    assert!(labels[0].abs_diff(labels[1]) * 20 < labels[0] + labels[1], "{labels:?}");
}
