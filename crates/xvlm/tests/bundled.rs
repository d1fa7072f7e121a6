//! The built-in model through the facade: everything that can be asked about one picture.

use std::collections::BTreeSet;

use xvlm::data::scenes::{SIDE, Scene, Split, check_caption};
use xvlm::metrics::boxes::iou_xywh;
use xvlm::{Device, Picture, Predictor, Sampling};

/// The scene of `assets/example.png`: held out, as every scene that is not of seed 1.
fn scene() -> Scene {
    Scene::generate(2022, 1, Split::Seen)
}

fn example() -> Picture {
    Picture::from_bytes(include_bytes!("../assets/example.png"), &"example.png").unwrap()
}

#[test]
fn the_example_is_what_it_is_said_to_be() {
    let side = SIDE as u32;
    assert!(example() == Picture::from_rgb(side, side, scene().render()).unwrap());
}

#[test]
fn it_finds_what_is_there() {
    let (predictor, scene) = (Predictor::bundled(&Device::Cpu).unwrap(), scene());
    let picture = example();
    let view = predictor.look(&picture).unwrap();
    let name = |object: &xvlm::data::scenes::Object| format!("the {} {}", object.colour.word(), object.shape.word());
    let texts: Vec<String> = scene.objects.iter().map(name).collect();
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    let found = view.ground(&texts).unwrap();
    assert_eq!(found.len(), scene.objects.len());
    let overlaps = found.iter().zip(&scene.objects).map(|(found, object)| {
        let b = found.bounds;
        assert!(0.0 <= b.xmin && b.xmax <= SIDE as f32 && found.probability.is_some_and(|p| (0.0..=1.0).contains(&p)));
        iou_xywh([b.xmin, b.ymin, b.xmax - b.xmin, b.ymax - b.ymin], object.bbox)
    });
    let right = overlaps.filter(|&iou| iou >= 0.5).count();
    assert!(right + 1 >= scene.objects.len(), "{right} of {} found", scene.objects.len());

    // Alone or with others, a phrase gets the same box.
    let alone = view.ground(&texts[..1]).unwrap().remove(0);
    assert!((alone.bounds.xmin - found[0].bounds.xmin).abs() < 1e-2, "{alone:?} {:?}", found[0]);
}

#[test]
fn it_tells_true_from_false() {
    let predictor = Predictor::bundled(&Device::Cpu).unwrap();
    let view = predictor.look(&example()).unwrap();
    let truth = scene().canonical_caption();
    let other = Scene::generate(2022, 2, Split::Seen).canonical_caption();
    let matches = view.matches(&[truth.as_str(), other.as_str()]).unwrap();
    assert!(matches[0].probability > matches[1].probability, "{matches:?}");
    assert!(matches[0].similarity > matches[1].similarity, "{matches:?}");

    let caption = view.caption().unwrap();
    assert!(check_caption(&scene(), &caption.text).objects_right, "{caption:?}");
    assert!(caption.score <= 0.0);
}

#[test]
fn words_and_answers_come_from_the_picture() {
    let predictor = Predictor::bundled(&Device::Cpu).unwrap();
    let view = predictor.look(&example()).unwrap();
    let words = view.fill("a ___ cross", 5).unwrap();
    assert_eq!(words.len(), 5);
    assert!(words.windows(2).all(|pair| pair[0].probability >= pair[1].probability), "{words:?}");
    assert!(words.iter().map(|word| word.probability).sum::<f32>() <= 1.001);
    let answers = view.answer(&["is there a cross ?", "which colour does the heart have ?"]).unwrap();
    assert_eq!(answers[0].answer, "yes");
    assert!(!answers[1].answer.is_empty());
}

#[test]
fn embeddings_have_unit_length() {
    let predictor = Predictor::bundled(&Device::Cpu).unwrap();
    let length = |embedding: &[f32]| embedding.iter().map(|x| x * x).sum::<f32>().sqrt();
    let image = predictor.look(&example()).unwrap().embedding().unwrap();
    let texts = predictor.embed_texts(&["a red star", "a ring"]).unwrap();
    for embedding in texts.iter().chain([&image]) {
        assert!((length(embedding) - 1.0).abs() < 1e-5);
    }
}

#[test]
fn questions_without_words_and_devices_that_are_not_there_are_refused() {
    let predictor = Predictor::bundled(&Device::Cpu).unwrap();
    let view = predictor.look(&example()).unwrap();
    assert!(view.ground(&["..."]).is_err());
    assert!(view.fill("no blank", 1).unwrap_err().to_string().contains("one blank"));
    assert!(xvlm::device("gpu").unwrap_err().to_string().contains("cpu, cuda or cuda:N"));
    #[cfg(not(feature = "cuda"))]
    assert!(xvlm::device("cuda:1").unwrap_err().to_string().contains("no feature `cuda`, found cuda:1"));
    // However long a phrase is, what is next to the blank decides.
    let long = format!("{} a ___ cross", "unheard words of all kinds ".repeat(20));
    assert_eq!(view.fill(&long, 3).unwrap().len(), 3);
    assert!(view.answer(&["is there a cross ? ".repeat(20).as_str()]).is_ok());
    let missing = Predictor::from_folder("no/such/model", &Device::Cpu).err().unwrap().to_string();
    assert!(missing.contains("no/such/model"), "{missing}");
}

/// The GPU if the tests are built for one and it is there. Says so loudly if it is not.
#[cfg(feature = "cuda")]
fn gpu() -> Option<Device> {
    match Device::new_cuda(0) {
        Ok(device) => Some(device),
        Err(error) if std::env::var_os("XVLM_REQUIRE_GPU").is_some() => panic!("expected a GPU: {error}"),
        Err(error) => {
            eprintln!("\n*** NO GPU: WHAT IT SAYS ABOUT A PICTURE IS NOT TESTED ({error}) ***\n");
            None
        }
    }
}

#[cfg(feature = "cuda")]
#[test]
fn a_gpu_says_the_same() {
    let Some(gpu) = gpu() else { return };
    let picture = example();
    let [here, there] = [Device::Cpu, gpu].map(|device| {
        let predictor = Predictor::bundled(&device).unwrap();
        let view = predictor.look(&picture).unwrap();
        let found = view.ground(&["the red circle", "the shape on the left"]).unwrap();
        let edges = |b: &xvlm::PixelBox| [b.xmin, b.ymin, b.xmax, b.ymax];
        let edges: Vec<f32> = found.iter().flat_map(|found| edges(&found.bounds)).collect();
        (view.caption().unwrap().text, view.fill("a ___ circle", 3).unwrap()[0].text(), edges)
    });
    assert_eq!((here.0, here.1), (there.0, there.1));
    assert!(here.2.iter().zip(&there.2).all(|(a, b)| (a - b).abs() < 0.1), "{:?} {:?}", here.2, there.2);
}

#[test]
fn it_describes_several_pictures_in_several_ways() {
    let predictor = Predictor::bundled(&Device::Cpu).unwrap();
    let scenes: Vec<Scene> = (1..4).map(|id| Scene::generate(2022, id, Split::Seen)).collect();
    let picture = |scene: &Scene| Picture::from_rgb(SIDE as u32, SIDE as u32, scene.render()).unwrap();
    let pictures: Vec<Picture> = scenes.iter().map(picture).collect();
    let writing = predictor.writing();
    let captions = predictor.captions(&pictures, &writing).unwrap();
    let right =
        captions.iter().zip(&scenes).filter(|(written, scene)| check_caption(scene, &written.text).objects_right);
    assert!(right.count() >= 2, "{captions:?}");
    let alone = predictor.look(&pictures[2]).unwrap().caption_as(&writing).unwrap();
    assert_eq!(alone.text, captions[2].text);

    let drawn = predictor.sample_captions(&pictures, &writing, Sampling::default(), 4, 9, |at| at as u64).unwrap();
    let texts: BTreeSet<&str> = drawn[0].iter().map(|written| written.text.as_str()).collect();
    assert!(drawn.iter().all(|texts| texts.len() == 4) && texts.len() > 1, "{drawn:?}");
    let one = predictor.look(&pictures[0]).unwrap().sample_captions(&writing, Sampling::default(), 4, 9).unwrap();
    assert_eq!(
        one.iter().map(|written| &written.text).collect::<Vec<_>>(),
        drawn[0].iter().map(|w| &w.text).collect::<Vec<_>>()
    );
}
