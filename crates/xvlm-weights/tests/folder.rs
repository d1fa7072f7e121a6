//! Model folders and safetensors with real files: what is written is read back, and whatever is wrong is named.

use std::collections::BTreeMap;
use std::error::Error;
use std::fs;
use std::io::Write;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use xvlm_weights::{
    ModelFiles, ModelFolder, NamedShape, StoredTensors, StoredType, WeightsError, read_safetensors,
    write_file_atomically, write_safetensors,
};

type Outcome = Result<(), Box<dyn Error>>;

const CONFIG: &str = r#"{"model": {}}"#;

fn tensors() -> candle_core::Result<BTreeMap<String, Tensor>> {
    let device = Device::Cpu;
    Ok(BTreeMap::from([
        ("a.weight".to_owned(), Tensor::new(&[[1f32, -2.5, 0.1], [4., 5., 6.]], &device)?),
        ("a.bias".to_owned(), Tensor::new(&[0.25f32, 1e-3, 3.], &device)?),
        ("empty".to_owned(), Tensor::zeros((0, 3), DType::F32, &device)?),
        ("scale".to_owned(), Tensor::new(0.07f32, &device)?),
        // Not contiguous: columns 1 and 2 of something wider, transposed.
        ("view".to_owned(), Tensor::arange(0f32, 12., &device)?.reshape((3, 4))?.narrow(1, 1, 2)?.t()?),
    ]))
}

fn bytes(stored: StoredType) -> Result<Vec<u8>, Box<dyn Error>> {
    let mut bytes = Vec::new();
    write_safetensors(&mut bytes, &tensors()?, stored)?;
    Ok(bytes)
}

fn values(tensor: &Tensor) -> candle_core::Result<Vec<f32>> {
    tensor.flatten_all()?.to_vec1()
}

fn write(dir: &Path, config: &str) -> Result<(), Box<dyn Error>> {
    Ok(ModelFolder::write(dir, config, &tensors()?, b"tokenizer", StoredType::F32)?)
}

/// Names in a folder, sorted.
fn names(dir: &Path) -> Result<Vec<String>, Box<dyn Error>> {
    let mut names: Vec<String> = fs::read_dir(dir)?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<Result<_, std::io::Error>>()?;
    names.sort();
    Ok(names)
}

/// A safetensors file of one tensor with this header entry.
fn file_with(entry: &str, data: &[u8]) -> Vec<u8> {
    let header = format!("{{\"w\":{entry}}}");
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

#[test]
fn a_folder_is_read_as_it_was_written() -> Outcome {
    let temp = tempfile::tempdir()?;
    let dir = temp.path().join("deep/er/model");
    write(&dir, CONFIG)?;
    assert_eq!(names(&dir)?, ["config.json", "model.safetensors", "tokenizer.json"]);
    assert_eq!(names(&temp.path().join("deep/er"))?, ["model"]);
    let files = ModelFolder::open(&dir)?;
    assert_eq!(files.name, dir.display().to_string());
    assert_eq!(files.weights.name(), dir.join("model.safetensors").display().to_string());
    assert_eq!(files.config, CONFIG);
    assert_eq!(*files.tokenizer, *b"tokenizer");
    let (expected, found) = (tensors()?, files.tensors()?);
    assert!(found.keys().eq(expected.keys()));
    for (name, tensor) in &expected {
        assert_eq!(found[name].dims(), tensor.dims(), "{name}");
        assert_eq!(values(&found[name])?, values(tensor)?, "{name}");
    }
    Ok(())
}

#[test]
fn a_model_compiled_in_is_the_same_model() -> Outcome {
    let files =
        ModelFiles::from_bytes("built in", CONFIG.as_bytes(), bytes(StoredType::F32)?, b"tokenizer".as_slice())?;
    assert_eq!((files.name.as_str(), files.weights.name()), ("built in", "built in/model.safetensors"));
    assert_eq!(values(&files.tensors()?["a.bias"])?, [0.25, 1e-3, 3.]);
    let error = ModelFiles::from_bytes("built in", b"nothing", b"".as_slice(), b"".as_slice()).unwrap_err().to_string();
    assert!(error.starts_with("built in/config.json: expected a JSON object"), "{error}");
    Ok(())
}

#[test]
fn narrow_types_round_and_come_back_as_f32() -> Outcome {
    for (stored, half_a_unit) in [(StoredType::F16, 1. / 2048.), (StoredType::Bf16, 1. / 256.)] {
        let read = read_safetensors("file", &bytes(stored)?)?;
        for (name, tensor) in tensors()? {
            assert_eq!(read[&name].dtype(), DType::F32);
            for (found, expected) in values(&read[&name])?.into_iter().zip(values(&tensor)?) {
                assert!((found - expected).abs() <= half_a_unit * expected.abs(), "{stored:?} {name}: {found}");
            }
        }
    }
    Ok(())
}

#[test]
fn a_mapped_file_gives_each_tensor_in_the_type_asked_for() -> Outcome {
    let temp = tempfile::tempdir()?;
    let path = temp.path().join("weights");
    for stored in [StoredType::F32, StoredType::F16, StoredType::Bf16] {
        fs::write(&path, bytes(stored)?)?;
        let file = StoredTensors::open(&path)?;
        let expected = read_safetensors("file", &fs::read(&path)?)?;
        assert!(file.shapes().into_iter().eq(expected.iter().map(|(name, tensor)| (name.as_str(), tensor.dims()))));
        let dtype = |shape: &[usize]| if shape.is_empty() { DType::F32 } else { DType::BF16 };
        for (name, tensor) in file.read_all(dtype, &Device::Cpu)? {
            assert_eq!(tensor.dtype(), dtype(tensor.dims()), "{name}");
            let rounded = expected[&name].to_dtype(tensor.dtype())?.to_dtype(DType::F32)?;
            assert_eq!(values(&tensor.to_dtype(DType::F32)?)?, values(&rounded)?, "{name}");
        }
        assert_eq!(file.first_numbers("a.bias", 2)?, values(&expected["a.bias"])?[..2]);
        assert_eq!(file.first_numbers("scale", 64)?, values(&expected["scale"])?);
        assert!(matches!(file.read("b", DType::F32, &Device::Cpu), Err(WeightsError::NoSuchTensor { .. })));
    }
    Ok(())
}

#[test]
fn a_file_that_is_written_to_is_noticed_and_one_that_is_replaced_stays() -> Outcome {
    let temp = tempfile::tempdir()?;
    let path = temp.path().join("weights");
    fs::write(&path, bytes(StoredType::F32)?)?;
    let file = StoredTensors::open(&path)?;
    write_file_atomically(&path, |out| out.write_all(b"another"))?;
    let expected = tensors()?;
    for (name, tensor) in file.read_all(|_| DType::F32, &Device::Cpu)? {
        assert_eq!(values(&tensor)?, values(&expected[&name])?, "{name}");
    }
    fs::write(&path, bytes(StoredType::F32)?)?;
    let file = StoredTensors::open(&path)?;
    fs::OpenOptions::new().append(true).open(&path)?.write_all(b"more")?;
    match file.read_all(|_| DType::F32, &Device::Cpu) {
        Err(WeightsError::Changed { file }) => assert_eq!(file, path.display().to_string()),
        other => panic!("{other:?}"),
    }
    Ok(())
}

#[test]
fn a_file_is_completed_by_what_it_lacks() -> Outcome {
    let file = |numbers: &[(&str, f32)]| -> Result<StoredTensors, Box<dyn Error>> {
        let tensor = |(name, number): &(&str, f32)| Ok(((*name).to_owned(), Tensor::new(*number, &Device::Cpu)?));
        let tensors = numbers.iter().map(tensor).collect::<candle_core::Result<_>>()?;
        Ok(StoredTensors::of_tensors("file", &tensors)?)
    };
    let mut own = file(&[("shared.a", 1.)])?;
    own.complete_with(&file(&[("shared.a", 2.), ("shared.b", 3.), ("other", 4.)])?, |name| name.starts_with("shared."));
    let read = own.read_all(|_| DType::F32, &Device::Cpu)?;
    let read: Vec<(&str, Vec<f32>)> =
        read.iter().map(|(name, tensor)| Ok((name.as_str(), values(tensor)?))).collect::<candle_core::Result<_>>()?;
    assert_eq!(read, [("shared.a", vec![1.]), ("shared.b", vec![3.])]);
    Ok(())
}

#[test]
fn the_header_is_aligned_and_names_its_format() -> Outcome {
    let bytes = bytes(StoredType::Bf16)?;
    let len = u64::from_le_bytes(bytes[..8].try_into()?);
    assert_eq!(len % 8, 0);
    let header: serde_json::Value = serde_json::from_slice(&bytes[8..8 + usize::try_from(len)?])?;
    assert_eq!(header["__metadata__"]["format"], "pt");
    assert_eq!(header["a.weight"]["dtype"], "BF16");
    Ok(())
}

#[test]
fn a_tensor_cannot_be_called_like_the_header_s_own_entry() -> Outcome {
    let tensors = BTreeMap::from([("__metadata__".to_owned(), Tensor::new(1f32, &Device::Cpu)?)]);
    let error = write_safetensors(&mut Vec::new(), &tensors, StoredType::F32).unwrap_err();
    assert!(error.to_string().contains("__metadata__"), "{error}");
    Ok(())
}

fn entries() -> candle_core::Result<Vec<NamedShape>> {
    Ok(tensors()?.iter().map(NamedShape::from).collect())
}

#[test]
fn a_folder_is_written_one_tensor_at_a_time() -> Outcome {
    let temp = tempfile::tempdir()?;
    let (whole, streamed) = (temp.path().join("whole"), temp.path().join("streamed"));
    write(&whole, CONFIG)?;
    let (tensors, entries, mut asked) = (tensors()?, entries()?, Vec::new());
    ModelFolder::write_with(&streamed, CONFIG, Some(b"tokenizer"), &entries, StoredType::F32, |name| {
        asked.push(name.to_owned());
        Ok(tensors[name].clone())
    })?;
    assert!(asked.iter().eq(tensors.keys()));
    for file in ["config.json", "model.safetensors", "tokenizer.json"] {
        assert_eq!(fs::read(whole.join(file))?, fs::read(streamed.join(file))?, "{file}");
    }
    Ok(())
}

#[test]
fn a_folder_without_a_tokenizer_waits_for_one() -> Outcome {
    let temp = tempfile::tempdir()?;
    let (dir, tensors, entries) = (temp.path().join("model"), tensors()?, entries()?);
    for _ in 0..2 {
        let tensor = |name: &str| Ok(tensors[name].clone());
        ModelFolder::write_with(&dir, CONFIG, None, &entries, StoredType::F32, tensor)?;
        assert_eq!(names(&dir)?, ["config.json", "model.safetensors"]);
    }
    assert!(matches!(ModelFolder::open(&dir), Err(WeightsError::MissingFile { .. })));
    fs::write(dir.join("tokenizer.json"), "put there")?;
    assert_eq!(*ModelFolder::open(&dir)?.tokenizer, *b"put there");
    Ok(())
}

#[test]
fn a_tensor_that_cannot_be_had_leaves_the_old_model() -> Outcome {
    let temp = tempfile::tempdir()?;
    let dir = temp.path().join("model");
    write(&dir, CONFIG)?;
    let (tensors, mut entries) = (tensors()?, entries()?);
    let lost = |name: &str| match name {
        "scale" => Err(WeightsError::NoSuchTensor { file: "x.th".into(), tensor: name.into() }),
        _ => Ok(tensors[name].clone()),
    };
    let error = ModelFolder::write_with(&dir, "{}", Some(b""), &entries, StoredType::F32, lost).unwrap_err();
    assert!(matches!(&error, WeightsError::NoSuchTensor { tensor, .. } if tensor == "scale"), "{error}");
    entries[0].shape = vec![4];
    let wrong = |name: &str| Ok(tensors[name].clone());
    let error =
        ModelFolder::write_with(&dir, "{}", Some(b""), &entries, StoredType::F32, wrong).unwrap_err().to_string();
    assert!(error.ends_with("tensor a.bias: expected shape [4], found [3]"), "{error}");
    assert_eq!(ModelFolder::open(&dir)?.config, CONFIG);
    assert_eq!(names(temp.path())?, ["model"]);
    // Folders that were made for it go with it.
    let deep = temp.path().join("a/b/c");
    ModelFolder::write_with(&deep, "{}", Some(b""), &entries, StoredType::F32, wrong).unwrap_err();
    assert_eq!(names(temp.path())?, ["model"]);
    Ok(())
}

#[test]
fn a_model_is_replaced() -> Outcome {
    let temp = tempfile::tempdir()?;
    let dir = temp.path().join("model");
    write(&dir, CONFIG)?;
    write(&dir, r#"{"second": true}"#)?;
    assert_eq!(ModelFolder::open(&dir)?.config, r#"{"second": true}"#);
    assert_eq!(names(temp.path())?, ["model"]);
    Ok(())
}

#[test]
fn an_empty_folder_is_filled() -> Outcome {
    let temp = tempfile::tempdir()?;
    write(temp.path(), CONFIG)?;
    assert_eq!(ModelFolder::open(temp.path())?.config, CONFIG);
    Ok(())
}

#[cfg(unix)]
#[test]
fn a_link_to_a_model_stays_a_link() -> Outcome {
    let temp = tempfile::tempdir()?;
    let (dir, link) = (temp.path().join("model"), temp.path().join("link"));
    write(&dir, CONFIG)?;
    std::os::unix::fs::symlink(&dir, &link)?;
    write(&link, r#"{"second": true}"#)?;
    assert!(fs::symlink_metadata(&link)?.is_symlink());
    assert_eq!(ModelFolder::open(&dir)?.config, r#"{"second": true}"#);
    Ok(())
}

#[test]
fn what_is_no_model_is_not_removed() -> Outcome {
    let temp = tempfile::tempdir()?;
    let dir = temp.path().join("model");
    let refused = |found: &str| {
        let error = ModelFolder::write(&dir, CONFIG, &BTreeMap::new(), b"", StoredType::F32).unwrap_err();
        assert!(matches!(error, WeightsError::Occupied { .. }), "{error}");
        let error = error.to_string();
        assert!(error.contains(found) && error.contains(&dir.display().to_string()), "{error}");
    };
    fs::write(&dir, "a file")?;
    refused("no folder");
    fs::remove_file(&dir)?;
    fs::create_dir(&dir)?;
    fs::write(dir.join("config.json"), "{}")?;
    refused("only config.json");
    fs::remove_file(dir.join("config.json"))?;
    write(&dir, CONFIG)?;
    fs::write(dir.join("thesis.tex"), "three years")?;
    refused("thesis.tex");
    assert_eq!(fs::read(dir.join("thesis.tex"))?, b"three years");
    assert_eq!(names(temp.path())?, ["model"]);
    Ok(())
}

#[test]
fn a_failed_write_leaves_the_old_model() -> Outcome {
    let temp = tempfile::tempdir()?;
    let dir = temp.path().join("model");
    write(&dir, CONFIG)?;
    let reserved = BTreeMap::from([("__metadata__".to_owned(), Tensor::new(1f32, &Device::Cpu)?)]);
    assert!(ModelFolder::write(&dir, CONFIG, &reserved, b"", StoredType::F32).is_err());
    assert!(ModelFolder::write(&dir, "no json", &tensors()?, b"", StoredType::F32).is_err());
    assert_eq!(*ModelFolder::open(&dir)?.tokenizer, *b"tokenizer");
    assert_eq!(names(temp.path())?, ["model"]);
    Ok(())
}

#[test]
fn a_missing_file_is_named() -> Outcome {
    for file in ["config.json", "model.safetensors", "tokenizer.json"] {
        let temp = tempfile::tempdir()?;
        write(temp.path(), CONFIG)?;
        fs::remove_file(temp.path().join(file))?;
        match ModelFolder::open(temp.path()) {
            Err(WeightsError::MissingFile { path }) => assert_eq!(path, temp.path().join(file)),
            other => panic!("{file}: {other:?}"),
        }
    }
    let error = ModelFolder::open(Path::new("no/such/folder")).unwrap_err();
    assert!(matches!(error, WeightsError::MissingFile { .. }), "{error}");
    Ok(())
}

#[test]
fn a_folder_in_place_of_a_file_is_named() -> Outcome {
    let temp = tempfile::tempdir()?;
    fs::create_dir(temp.path().join("config.json"))?;
    let error = ModelFolder::open(temp.path()).unwrap_err();
    assert!(matches!(&error, WeightsError::Io { path, .. } if path.ends_with("config.json")), "{error}");
    Ok(())
}

#[test]
fn a_config_that_is_no_json_object_is_named() -> Outcome {
    let temp = tempfile::tempdir()?;
    write(temp.path(), CONFIG)?;
    for (config, found) in [
        (&b"{\"model\": "[..], "EOF while parsing"),
        (b"", "EOF while parsing"),
        (b"[1]", "an array"),
        (b"null", "null"),
        (b"{\"a\": \"\xff\"}", "invalid utf-8"),
    ] {
        fs::write(temp.path().join("config.json"), config)?;
        let error = ModelFolder::open(temp.path()).unwrap_err();
        assert!(matches!(error, WeightsError::Config { .. }), "{error}");
        let error = error.to_string();
        assert!(error.contains("config.json: expected a JSON object") && error.contains(found), "{error}");
    }
    Ok(())
}

#[test]
fn a_truncated_file_is_corrupt_at_every_length() -> Outcome {
    let whole = bytes(StoredType::F32)?;
    for len in 0..whole.len() {
        match read_safetensors("model.safetensors", &whole[..len]) {
            Err(WeightsError::Corrupt { file, len: found, .. }) => {
                assert_eq!((file.as_str(), found), ("model.safetensors", len));
            }
            other => panic!("{len} of {} bytes: {other:?}", whole.len()),
        }
    }
    let longer = [&whole[..], b"x"].concat();
    assert!(matches!(read_safetensors("f", &longer), Err(WeightsError::Corrupt { .. })));

    let temp = tempfile::tempdir()?;
    write(temp.path(), CONFIG)?;
    fs::write(temp.path().join("model.safetensors"), &whole[..whole.len() / 2])?;
    let error = ModelFolder::open(temp.path()).unwrap_err().to_string();
    assert!(error.contains("model.safetensors: expected safetensors"), "{error}");
    Ok(())
}

#[test]
fn damaged_bytes_never_panic() -> Outcome {
    let whole = bytes(StoredType::F32)?;
    let header = 8 + usize::try_from(u64::from_le_bytes(whole[..8].try_into()?))?;
    let mut refused = 0;
    for at in 0..header {
        for flip in [0x01, 0x02, 0x04, 0x08, 0x10, 0x20, 0x40, 0x80, 0xff] {
            let mut damaged = whole.clone();
            damaged[at] ^= flip;
            // A flip within a name gives another valid name; all else must be refused.
            refused += usize::from(read_safetensors("f", &damaged).is_err());
        }
    }
    assert!(refused > header * 5, "{refused} of {}", header * 9);
    Ok(())
}

#[test]
fn shapes_that_overflow_or_lie_are_corrupt() {
    for entry in [
        r#"{"dtype":"F32","shape":[18446744073709551615,2],"data_offsets":[0,8]}"#,
        r#"{"dtype":"F32","shape":[3],"data_offsets":[0,8]}"#,
        r#"{"dtype":"F32","shape":[2],"data_offsets":[8,0]}"#,
        r#"{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}"#,
        r#"{"dtype":"F32","shape":[2],"data_offsets":[0,18446744073709551615]}"#,
        r#"{"shape":[2],"data_offsets":[0,8]}"#,
    ] {
        let read = read_safetensors("f", &file_with(entry, &[0; 8]));
        assert!(matches!(read, Err(WeightsError::Corrupt { .. })), "{entry}: {read:?}");
    }
    let huge = [&u64::MAX.to_le_bytes()[..], b"{}"].concat();
    assert!(matches!(read_safetensors("f", &huge), Err(WeightsError::Corrupt { .. })));
}

#[test]
fn a_dtype_that_is_no_weight_s_is_named() {
    for dtype in ["F7", "C64", "F8_E4M3", "BOOL"] {
        let count = if dtype == "C64" { 1 } else { 8 };
        let entry = format!(r#"{{"dtype":"{dtype}","shape":[{count}],"data_offsets":[0,8]}}"#);
        match read_safetensors("model.safetensors", &file_with(&entry, &[0; 8])) {
            Err(error @ WeightsError::Dtype { .. }) => {
                let error = error.to_string();
                let expected = "model.safetensors: tensor w: expected dtype F32, F16, BF16, F64 or I64, found ";
                assert_eq!(error, format!("{expected}{dtype}"));
            }
            other => panic!("{dtype}: {other:?}"),
        }
    }
}

#[test]
fn integers_and_doubles_are_read_as_f32() -> Outcome {
    let integers = file_with(r#"{"dtype":"I64","shape":[1],"data_offsets":[0,8]}"#, &7i64.to_le_bytes());
    assert_eq!(values(&read_safetensors("f", &integers)?["w"])?, [7.]);
    let doubles = file_with(r#"{"dtype":"F64","shape":[1],"data_offsets":[0,8]}"#, &0.1f64.to_le_bytes());
    assert_eq!(values(&read_safetensors("f", &doubles)?["w"])?, [0.1]);
    Ok(())
}

#[test]
fn a_file_is_written_wholly_or_not_at_all() -> Outcome {
    let temp = tempfile::tempdir()?;
    let path = temp.path().join("state");
    write_file_atomically(&path, |out| out.write_all(b"first"))?;
    assert_eq!(fs::read(&path)?, b"first");
    let error = write_file_atomically(&path, |out| {
        out.write_all(b"half of the sec")?;
        Err(std::io::Error::other("power cut"))
    })
    .unwrap_err();
    assert_eq!(error.to_string(), format!("{}: power cut", path.display()));
    assert_eq!(fs::read(&path)?, b"first");
    write_file_atomically(&path, |out| out.write_all(b"second"))?;
    assert_eq!(fs::read(&path)?, b"second");
    assert_eq!(names(temp.path())?, ["state"]);

    let nowhere = temp.path().join("no/such/folder/state");
    let error = write_file_atomically(&nowhere, |_| Ok(())).unwrap_err();
    assert!(matches!(&error, WeightsError::Io { path, .. } if *path == nowhere), "{error}");
    Ok(())
}

#[cfg(unix)]
#[test]
fn files_are_as_readable_as_ordinary_ones() -> Outcome {
    use std::os::unix::fs::PermissionsExt;
    let temp = tempfile::tempdir()?;
    let mode = |name: &str| Ok::<_, std::io::Error>(fs::metadata(temp.path().join(name))?.permissions().mode());
    fs::write(temp.path().join("ordinary"), "")?;
    write_file_atomically(&temp.path().join("atomic"), |_| Ok(()))?;
    assert_eq!(mode("atomic")?, mode("ordinary")?);
    fs::create_dir(temp.path().join("folder"))?;
    write(&temp.path().join("model"), CONFIG)?;
    assert_eq!(mode("model")?, mode("folder")?);
    assert_eq!(mode("model/config.json")?, mode("ordinary")?);
    Ok(())
}
