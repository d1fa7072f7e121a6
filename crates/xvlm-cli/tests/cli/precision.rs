//! `--precision`: every command that opens a model computes with every kind of numbers.

use serde_json::Value;

use super::{folder, is_probability, json, refused, stderr, text, xvlm};

#[test]
fn every_command_computes_in_every_precision() {
    let dir = folder();
    let dir = dir.path();
    text(dir, "synth --out data --scenes 2 --seed 5");
    let image = "--model model --image data/images/000000.png";
    let edges = |found: &Value| -> Vec<f64> {
        let bounds = &found[0]["results"][0]["box"];
        ["xmin", "ymin", "xmax", "ymax"].iter().map(|edge| bounds[edge].as_f64().unwrap()).collect()
    };
    let wide = json(dir, &format!("ground {image} --text a~red~star"));
    for precision in ["bf16", "int8"] {
        let numbers = format!("--precision {precision}");
        let found = json(dir, &format!("ground {image} {numbers} --text a~red~star"));
        // A hundredth of a picture of 192 pixels, and 0.02 of a probability.
        for (found, wide) in edges(&found).into_iter().zip(edges(&wide)) {
            assert!((found - wide).abs() < 1.92, "{precision}: {found} {wide}");
        }
        let [found, wide] = [&found, &wide].map(|found| found[0]["results"][0]["probability"].as_f64().unwrap());
        assert!((found - wide).abs() < 0.02, "{precision}: {found} {wide}");

        let heated = json(dir, &format!("ground {image} {numbers} --text a~red~star --heat"));
        assert!(is_probability(&heated[0]["results"][0]["probability"]), "{precision}: {heated}");
        for command in [
            format!("caption {image} {numbers}"),
            format!("answer {image} {numbers} --text how~many~stars~are~there~?"),
            format!("match {image} {numbers} --text a~star"),
            format!("fill {image} {numbers} --text a~___~star"),
            format!("judge --images data/images/000000.png data/images/000001.png {numbers} --text both~have~a~star"),
            format!("search --model model {numbers} --images data/images --text a~star --rerank 2"),
            format!("embed --model model {numbers} --images data/images --out embedded-{precision}"),
        ] {
            json(dir, &command);
        }
        for task in [
            format!("grounding --model model --out {precision}"),
            "grounding --model model --weak".to_owned(),
            "retrieval --model model".to_owned(),
            "fill --model model".to_owned(),
            "captioning --model model --max-tokens 4".to_owned(),
            "vqa --model model".to_owned(),
            "nlvr".to_owned(),
        ] {
            let scores = json(dir, &format!("eval {task} {numbers} --data data"));
            assert_eq!(scores["precision"], precision, "{task}");
        }
        // An index of one precision is searched in another.
        json(dir, &format!("search --model model --index embedded-{precision} --text a~star"));
    }
    // Answers of different numbers are not mixed.
    let eval = "eval grounding --model model --data data";
    refused(dir, &format!("{eval} --out bf16 --resume"), &["about.precision: expected \"f32\"", "found \"bf16\""]);
    json(dir, &format!("{eval} --out bf16 --resume --precision bf16"));
    text(dir, &format!("{eval} --out f32"));
    refused(
        dir,
        &format!("{eval} --out f32 --resume --precision int8"),
        &["about.precision: expected \"int8\"", "found \"f32\""],
    );
    assert!(text(dir, &format!("{eval} --precision int8")).contains("int8"));

    let output = xvlm(dir, &format!("ground {image} --text a~star --precision f16"));
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("expected f32, bf16 or int8, found f16"), "{}", stderr(&output));
}
