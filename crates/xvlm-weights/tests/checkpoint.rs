//! Checkpoints of other programs: every form in which they come, and whatever can be wrong with them.

mod common;

use std::collections::BTreeMap;
use std::error::Error;
use std::fs;
use std::io;

use candle_core::{DType, Device, Tensor};
use common::*;
use xvlm_weights::{
    Checkpoint, CheckpointKind, NamedShape, StoredType, WeightsError, first_non_finite, write_file_atomically,
    write_pytorch,
};

type Outcome = Result<(), Box<dyn Error>>;

fn open(bytes: &[u8]) -> Result<Checkpoint, WeightsError> {
    let (_folder, path) = file(bytes);
    Checkpoint::open(&path)
}

/// The one tensor of a checkpoint.
fn only(bytes: &[u8]) -> Result<Tensor, WeightsError> {
    let (_folder, path) = file(bytes);
    let checkpoint = Checkpoint::open(&path)?;
    let names: Vec<&String> = checkpoint.tensors().keys().collect();
    assert_eq!(names.len(), 1, "{names:?}");
    checkpoint.read(names[0])
}

fn names(bytes: &[u8]) -> Result<Vec<String>, WeightsError> {
    Ok(open(bytes)?.tensors().keys().cloned().collect())
}

fn values(tensor: &Tensor) -> candle_core::Result<Vec<f32>> {
    tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1()
}

/// That a checkpoint is refused, with a message that names the file and holds all of this.
#[track_caller]
fn refused(bytes: &[u8], parts: &[&str]) {
    let (_folder, path) = file(bytes);
    let read = Checkpoint::open(&path)
        .and_then(|checkpoint| checkpoint.tensors().keys().try_for_each(|name| checkpoint.read(name).map(drop)));
    let message = read.expect_err("it should be refused").to_string();
    let path = path.display().to_string();
    assert!(message.starts_with(&path), "{message}");
    for part in parts {
        assert!(message.contains(part), "no {part:?} in {message:?}");
    }
}

fn one_vector() -> Code {
    dict(&[("w", vector("0", 3))])
}

fn three() -> Vec<u8> {
    floats(&[1., -2., 3.5])
}

// What is read.

#[test]
fn the_state_dict_is_found_wherever_it_is() -> Outcome {
    let state = || ordered(&[("b", vector("0", 3)), ("a", vector("0", 3))]);
    let rest = || {
        [
            ("optimizer", dict(&[("state", dict(&[("exp_avg", vector("1", 1))])), ("param_groups", list(&[int(1)]))])),
            ("args", object("argparse.Namespace", dict(&[("lr", float(1e-4))]))),
            ("epoch", int(30)),
            ("config", dict(&[("image_res", int(224)), ("scale", float(0.5)), ("none", none())])),
        ]
    };
    let storages = [("0", three()), ("1", floats(&[0.]))];
    assert_eq!(names(&archive(&state(), &storages))?, ["a", "b"]);
    for wrapper in ["model", "state_dict", "model_state_dict", "module"] {
        let mut entries = rest().to_vec();
        entries.insert(2, (wrapper, state()));
        assert_eq!(names(&archive(&dict(&entries), &storages))?, ["a", "b"], "{wrapper}");
    }
    // A wrapper's name with something else in it: the next one counts.
    let entries = [("model", text("vit")), ("state_dict", state())];
    assert_eq!(names(&archive(&dict(&entries), &storages))?, ["a", "b"]);
    let entries = [("model", object("net.Net", none())), ("w", vector("0", 3))];
    assert_eq!(names(&archive(&dict(&entries), &storages))?, ["w"]);
    Ok(())
}

#[test]
fn what_is_no_tensor_is_named_as_left_out() -> Outcome {
    let code = ordered(&[("w", vector("0", 3)), ("_extra_state", none()), ("steps", int(3))]);
    let checkpoint = open(&archive(&code, &[("0", three())]))?;
    assert!(checkpoint.tensors().keys().eq(["w"]));
    assert!(checkpoint.left_out().iter().eq(["_extra_state", "steps"]));
    Ok(())
}

#[test]
fn the_prefix_of_parallel_training_is_dropped_if_all_have_it() -> Outcome {
    let both = |first: &str, second: &str| {
        archive(&ordered(&[(first, vector("0", 3)), (second, vector("0", 3))]), &[("0", three())])
    };
    assert_eq!(names(&both("module.a", "module.module.b"))?, ["a", "module.b"]);
    assert_eq!(names(&both("module.a", "b"))?, ["b", "module.a"]);
    assert_eq!(names(&both("module.", "module.b"))?, ["module.", "module.b"]);
    Ok(())
}

#[test]
fn both_forms_of_pytorch_hold_the_same() -> Outcome {
    let code = dict(&[(
        "model",
        ordered(&[("w", vector("a", 3)), ("index", view(storage("torch.LongStorage", "b", 2), 0, &[2], &[1]))]),
    )]);
    let longs: Vec<u8> = [7i64, -1].iter().flat_map(|value| value.to_le_bytes()).collect();
    let zip = archive(&code, &[("a", three()), ("b", longs.clone())]);
    // The order of the storages is that of the keys, not of the tensors.
    let old = legacy(&code, &[("b", 2, longs), ("a", 3, three())]);
    for (bytes, kind, name) in [
        (zip, CheckpointKind::PytorchZip, "PyTorch zip"),
        (old, CheckpointKind::PytorchLegacy, "legacy PyTorch pickle"),
    ] {
        let (_folder, path) = file(&bytes);
        let checkpoint = Checkpoint::open(&path)?;
        assert_eq!((checkpoint.kind(), checkpoint.kind().to_string().as_str()), (kind, name));
        assert_eq!(checkpoint.tensor_bytes(), 12 + 16);
        assert_eq!(checkpoint.tensors()["w"].shape(), [3]);
        assert_eq!(checkpoint.tensors()["w"].dtype(), Some(DType::F32));
        assert_eq!(checkpoint.tensors()["w"].type_name(), "torch.FloatStorage");
        assert_eq!(values(&checkpoint.read("w")?)?, [1., -2., 3.5]);
        assert_eq!(checkpoint.read("index")?.to_vec1::<i64>()?, [7, -1]);
        let error = checkpoint.read("v").unwrap_err().to_string();
        assert_eq!(
            error,
            format!("{}: tensor v: expected one of the tensors of the file, found none of this name", path.display())
        );
    }
    Ok(())
}

#[test]
fn views_are_what_they_show() -> Outcome {
    let numbers: Vec<f32> = (0..12u8).map(f32::from).collect();
    /// Offset, shape, strides, and what is seen.
    type View<'a> = (i64, &'a [i64], &'a [i64], &'a [f32]);
    let cases: [View; 9] = [
        (0, &[3, 4], &[4, 1], &numbers),
        (5, &[2], &[1], &[5., 6.]),
        (1, &[4, 2], &[1, 4], &[1., 5., 2., 6., 3., 7., 4., 8.]),
        (2, &[2, 3], &[0, 1], &[2., 3., 4., 2., 3., 4.]),
        (11, &[3], &[0], &[11., 11., 11.]),
        (0, &[3, 2], &[1, 1], &[0., 1., 1., 2., 2., 3.]),
        (7, &[], &[], &[7.]),
        (3, &[0, 5], &[5, 1], &[]),
        // The stride of a dimension of one number does not matter.
        (4, &[2, 1, 2], &[2, i64::MAX, 1], &[4., 5., 6., 7.]),
    ];
    for (offset, shape, strides, expected) in cases {
        let code = dict(&[("w", view(storage("torch.FloatStorage", "0", 12), offset, shape, strides))]);
        for bytes in [archive(&code, &[("0", floats(&numbers))]), legacy(&code, &[("0", 12, floats(&numbers))])] {
            let tensor = only(&bytes)?;
            let dims: Vec<usize> = shape.iter().map(|len| usize::try_from(*len)).collect::<Result<_, _>>()?;
            assert_eq!(tensor.dims(), dims);
            assert!(tensor.is_contiguous());
            assert_eq!(values(&tensor)?, expected, "{offset} {shape:?} {strides:?}");
        }
    }
    Ok(())
}

#[test]
fn shared_storages_count_once() -> Outcome {
    let half = |offset| view(storage("torch.FloatStorage", "0", 4), offset, &[2], &[1]);
    let code = dict(&[("first", half(0)), ("second", half(2)), ("tied", half(0))]);
    let (_folder, path) = file(&archive(&code, &[("0", floats(&[1., 2., 3., 4.]))]));
    let checkpoint = Checkpoint::open(&path)?;
    assert_eq!(checkpoint.tensor_bytes(), 16);
    assert_eq!(values(&checkpoint.read("second")?)?, [3., 4.]);
    assert_eq!(values(&checkpoint.read("tied")?)?, [1., 2.]);
    Ok(())
}

#[test]
fn parameters_and_the_tensors_of_other_versions_are_tensors() -> Outcome {
    let hooks = || call("collections.OrderedDict", &[]);
    let parameter =
        |name: &str, rest: &[Code]| call(name, &[&[vector("0", 3), boolean(true), hooks()][..], rest].concat());
    let untyped = storage("torch.storage.UntypedStorage", "0", 12);
    let dtype = global("torch.float32");
    let v3 = [untyped, int(0), ints(&[3]), ints(&[1]), boolean(false), hooks(), dtype, none()];
    let size = call("torch.Size", &[ints(&[3])]);
    let in_lists = [storage("torch.FloatStorage", "0", 3), int(0), size, list(&[int(1)]), boolean(false), hooks()];
    for code in [
        parameter("torch._utils._rebuild_parameter", &[]),
        parameter("torch._utils._rebuild_parameter_with_state", &[dict(&[])]),
        call("torch._utils._rebuild_tensor_v3", &v3),
        call("torch._utils._rebuild_tensor_v2", &in_lists),
        call("torch._utils._rebuild_tensor", &in_lists[..4]),
    ] {
        assert_eq!(values(&only(&archive(&dict(&[("w", code)]), &[("0", three())]))?)?, [1., -2., 3.5]);
    }
    Ok(())
}

#[test]
fn numbers_keep_their_type() -> Outcome {
    let cases: [(&str, &[u8], DType, f32); 9] = [
        ("Double", &2.5f64.to_le_bytes(), DType::F64, 2.5),
        ("Float", &2.5f32.to_le_bytes(), DType::F32, 2.5),
        ("Half", &[0x00, 0x41], DType::F16, 2.5),
        ("BFloat16", &[0x20, 0x40], DType::BF16, 2.5),
        ("Long", &(-3i64).to_le_bytes(), DType::I64, -3.),
        ("Int", &(-3i32).to_le_bytes(), DType::I32, -3.),
        ("Short", &(-3i16).to_le_bytes(), DType::I16, -3.),
        ("Byte", &[200], DType::U8, 200.),
        ("Bool", &[1], DType::U8, 1.),
    ];
    for (class, bytes, dtype, expected) in cases {
        let code = dict(&[("w", view(storage(&format!("torch.{class}Storage"), "0", 1), 0, &[], &[]))]);
        for file in [archive(&code, &[("0", bytes.to_vec())]), legacy(&code, &[("0", 1, bytes.to_vec())])] {
            let tensor = only(&file)?;
            assert_eq!(tensor.dtype(), dtype);
            assert_eq!(values(&tensor)?, [expected], "{class}");
        }
    }
    Ok(())
}

#[test]
fn a_type_that_no_tensor_has_is_listed_and_refused_when_read() -> Outcome {
    let code = dict(&[("c", view(storage("torch.CharStorage", "0", 3), 0, &[3], &[1])), ("w", vector("1", 3))]);
    let (_folder, path) = file(&legacy(&code, &[("0", 3, vec![1, 2, 3]), ("1", 3, three())]));
    let checkpoint = Checkpoint::open(&path)?;
    assert_eq!(checkpoint.tensors()["c"].dtype(), None);
    assert_eq!(values(&checkpoint.read("w")?)?, [1., -2., 3.5]);
    let error = checkpoint.read("c").unwrap_err();
    assert!(matches!(error, WeightsError::Dtype { .. }), "{error}");
    assert!(error.to_string().ends_with("U8 or BOOL, found torch.CharStorage"), "{error}");
    Ok(())
}

#[test]
fn deflated_entries_are_inflated() -> Outcome {
    let numbers: Vec<f32> = (0..5000u16).map(f32::from).collect();
    let whole = vector("0", 5000);
    let part = view(storage("torch.FloatStorage", "0", 5000), 4000, &[2], &[1]);
    let mut entries = entries(&dict(&[("whole", whole), ("part", part)]), &[]);
    entries.push(deflated("net/data/0", &floats(&numbers)));
    entries[0] = deflated(&entries[0].name, &entries[0].bytes);
    let (_folder, path) = file(&zip(&entries));
    let checkpoint = Checkpoint::open(&path)?;
    assert_eq!(values(&checkpoint.read("whole")?)?, numbers);
    assert_eq!(values(&checkpoint.read("part")?)?, [4000., 4001.]);
    Ok(())
}

#[test]
fn safetensors_are_read_in_their_own_type() -> Outcome {
    let header = concat!(
        r#"{"__metadata__":{"format":"pt"},"w":{"dtype":"F32","shape":[3],"data_offsets":[0,12]},"#,
        r#""b":{"dtype":"BOOL","shape":[2],"data_offsets":[12,14]},"c":{"dtype":"I8","shape":[],"data_offsets":[14,15]}}"#
    );
    let (_folder, path) = file(&safetensors(header, &[three(), vec![1, 0, 9]].concat()));
    let checkpoint = Checkpoint::open(&path)?;
    assert_eq!(checkpoint.kind(), CheckpointKind::Safetensors);
    assert_eq!(checkpoint.tensor_bytes(), 15);
    assert_eq!(values(&checkpoint.read("w")?)?, [1., -2., 3.5]);
    assert_eq!(checkpoint.read("b")?.to_vec1::<u8>()?, [1, 0]);
    assert!(matches!(checkpoint.read("c"), Err(WeightsError::Dtype { .. })));
    Ok(())
}

#[test]
fn an_index_opens_the_files_beside_it() -> Outcome {
    let folder = tempfile::tempdir()?;
    let write = |name: &str, bytes: &[u8]| fs::write(folder.path().join(name), bytes);
    write("1.bin", &archive(&dict(&[("module.a", vector("0", 3))]), &[("0", three())]))?;
    let header = r#"{"module.b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#;
    write("2.safetensors", &safetensors(header, &floats(&[5.])))?;
    let path = folder.path().join("model.safetensors.index.json");
    let index = |map: &str| fs::write(&path, format!(r#"{{"metadata":{{"total_size":16}},"weight_map":{{{map}}}}}"#));
    index(r#""module.a":"1.bin","module.b":"2.safetensors""#)?;
    let checkpoint = Checkpoint::open(&path)?;
    assert_eq!((checkpoint.kind(), checkpoint.tensor_bytes()), (CheckpointKind::ShardIndex, 16));
    assert_eq!(values(&checkpoint.read("a")?)?, [1., -2., 3.5]);
    assert_eq!(values(&checkpoint.read("b")?)?, [5.]);

    let refused = |map: &str, part: &str| -> Outcome {
        index(map)?;
        let message = Checkpoint::open(&path).unwrap_err().to_string();
        assert!(message.contains(part), "no {part:?} in {message:?}");
        Ok(())
    };
    for name in ["../1.bin", "/1.bin", "..", "a/1.bin", r"a\\1.bin", "c:1.bin", ""] {
        refused(&format!(r#""module.a":"{name}""#), "expected names of files in the same folder")?;
    }
    refused(r#""module.a":"3.bin""#, "3.bin")?;
    refused(r#""module.x":"1.bin""#, "1.bin: tensor module.x: expected it where the index says")?;
    refused(r#""module.a":"1.bin","module.a":"1.bin""#, "the name module.a twice")?;
    refused(r#""module.a":"model.safetensors.index.json""#, "found another index")?;
    refused("", "weight_map: expected tensors, found none")?;
    write("2.safetensors", &fs::read(folder.path().join("1.bin"))?)?;
    refused(r#""module.a":"1.bin","module.a2":"2.safetensors""#, "module.a2")?;
    Ok(())
}

#[test]
fn the_first_number_that_is_none_is_found() -> Outcome {
    let mut numbers = vec![1f32; 100_000];
    let tensor = |numbers: &[f32]| Tensor::new(numbers, &Device::Cpu)?.reshape((100, 1000));
    assert_eq!(first_non_finite(&tensor(&numbers)?)?, None);
    numbers[99_999] = f32::NAN;
    assert_eq!(first_non_finite(&tensor(&numbers)?)?, Some(99_999));
    numbers[70_000] = f32::NEG_INFINITY;
    for dtype in [DType::F32, DType::F64, DType::F16, DType::BF16] {
        assert_eq!(first_non_finite(&tensor(&numbers)?.to_dtype(dtype)?)?, Some(70_000));
    }
    assert_eq!(first_non_finite(&Tensor::new(&[1u8, 2], &Device::Cpu)?)?, None);
    assert_eq!(first_non_finite(&Tensor::zeros(0, DType::F32, &Device::Cpu)?)?, None);
    Ok(())
}

// What is written.

fn to_write() -> candle_core::Result<BTreeMap<String, Tensor>> {
    let device = Device::Cpu;
    Ok(BTreeMap::from([
        ("a.weight".to_owned(), Tensor::new(&[[1f32, -2.5, 0.1], [4., 5., 6.]], &device)?),
        ("empty".to_owned(), Tensor::zeros((0, 3), DType::F32, &device)?),
        ("scale".to_owned(), Tensor::new(0.07f32, &device)?),
        ("view".to_owned(), Tensor::arange(0f32, 12., &device)?.reshape((3, 4))?.narrow(1, 1, 2)?.t()?),
    ]))
}

#[test]
fn what_is_written_for_pytorch_is_read_back() -> Outcome {
    let tensors = to_write()?;
    let entries: Vec<NamedShape> = tensors.iter().map(NamedShape::from).collect();
    for (stored, dtype) in
        [(StoredType::F32, DType::F32), (StoredType::F16, DType::F16), (StoredType::Bf16, DType::BF16)]
    {
        let mut bytes = Vec::new();
        write_pytorch(&mut bytes, &entries, stored, |name| Ok(tensors[name].clone()))?;
        let (_folder, path) = file(&bytes);
        let checkpoint = Checkpoint::open(&path)?;
        assert_eq!(checkpoint.kind(), CheckpointKind::PytorchZip);
        assert!(checkpoint.tensors().keys().eq(tensors.keys()));
        for (name, tensor) in &tensors {
            let read = checkpoint.read(name)?;
            assert_eq!((read.dtype(), read.dims()), (dtype, tensor.dims()), "{name}");
            assert_eq!(values(&read)?, values(&tensor.to_dtype(dtype)?)?, "{name}");
        }
        // As PyTorch has it: numbers begin at multiples of 64, after a first entry that names the folder.
        let mut zip = zip::ZipArchive::new(io::Cursor::new(&bytes))?;
        let names: Vec<String> =
            zip.file_names().map(|name| Ok(name?.into_owned())).collect::<Result<_, io::Error>>()?;
        assert_eq!(names[..3], ["archive/data.pkl", "archive/byteorder", "archive/data/0"]);
        for index in 0..zip.len() {
            assert_eq!(zip.by_index_raw(index)?.data_start().unwrap() % 64, 0);
        }
    }
    Ok(())
}

#[test]
fn what_cannot_be_written_is_named() -> Outcome {
    let entry = |name: &str| NamedShape { name: name.to_owned(), shape: vec![2] };
    let write = |entries: &[NamedShape], shape: usize| {
        let tensor = |_: &str| Tensor::zeros(shape, DType::F32, &Device::Cpu);
        let tensor = |name: &str| tensor(name).map_err(|error| panic!("{error}"));
        write_pytorch(&mut Vec::new(), entries, StoredType::F32, tensor).unwrap_err().to_string()
    };
    assert_eq!(write(&[entry("a"), entry("b"), entry("a")], 2), "tensor a: expected each name once, found it again");
    assert_eq!(write(&[entry("a")], 3), "tensor a: expected shape [2], found [3]");
    Ok(())
}

#[test]
fn an_error_of_the_source_comes_through_a_writer_as_it_was() -> Outcome {
    let (folder, path) = file(&archive(&one_vector(), &[("0", three())]));
    let source = Checkpoint::open(&path)?;
    let entries = [NamedShape { name: "missing".into(), shape: vec![3] }];
    let written = folder.path().join("written");
    let error =
        write_file_atomically(&written, |out| write_pytorch(out, &entries, StoredType::F32, |name| source.read(name)));
    assert!(matches!(&error, Err(WeightsError::NoSuchTensor { tensor, .. }) if tensor == "missing"), "{error:?}");
    assert!(!written.exists());
    Ok(())
}

// What is refused.

#[test]
fn what_is_no_checkpoint_is_named() {
    let expected = "expected a PyTorch zip, a legacy PyTorch pickle, safetensors or an index of shards, found";
    refused(b"", &[expected, "an empty file"]);
    refused(b"import torch\n", &[expected, "bytes that begin with [69, 6d, 70, 6f, 72, 74, 20, 74]"]);
    refused(b"{}", &["weight_map: expected an object of file names by tensor, found missing field"]);
}

#[test]
fn a_checkpoint_without_tensors_says_what_is_there() {
    let code = dict(&[("epoch", int(3)), ("net", object("net.Net", dict(&[("w", vector("0", 3))])))]);
    let found = "expected a dict of tensors, or one under model, state_dict, model_state_dict, module, \
                 found a dict with epoch (an integer), net (an object of net.Net)";
    refused(&archive(&code, &[("0", three())]), &["entry net/data.pkl: ", found]);
    refused(&legacy(&code, &[]), &["found a dict with epoch"]);
    refused(&archive(&object("net.Net", none()), &[]), &["found an object of net.Net"]);
    refused(&archive(&vector("0", 3), &[("0", three())]), &["found a tensor"]);
    refused(&archive(&dict(&[]), &[]), &["found a dict without names"]);
    let keys: Vec<String> = (10..40).map(|key| format!("k{key}")).collect();
    let many: Vec<(&str, Code)> = keys.iter().map(|key| (key.as_str(), none())).collect();
    refused(&archive(&dict(&many), &[]), &["k10 (a scalar or another object), k11", "and 10 other keys"]);
}

#[test]
fn no_call_is_made() -> Outcome {
    // What every pickle that attacks does, beside and in place of a tensor.
    let attack = || call("os.system", &[text("touch /tmp/owned")]);
    let code = ordered(&[("w", vector("0", 3)), ("x", attack())]);
    let checkpoint = open(&archive(&code, &[("0", three())]))?;
    assert!(checkpoint.left_out().contains("x"));
    refused(&archive(&attack(), &[]), &["found an object of os.system"]);
    Ok(())
}

#[test]
fn views_beyond_their_storage_are_refused() {
    let with = |offset: i64, shape: &[i64], strides: &[i64]| {
        let code = dict(&[("w", view(storage("torch.FloatStorage", "0", 3), offset, shape, strides))]);
        [archive(&code, &[("0", three())]), legacy(&code, &[("0", 3, three())])]
    };
    let cases: [(i64, &[i64], &[i64], &str); 9] = [
        (0, &[4], &[1], "expected a view of the 3 numbers of its storage, found one that reaches number 4"),
        (1, &[3], &[1], "reaches number 4"),
        (0, &[2, 2], &[2, 1], "reaches number 4"),
        (0, &[2], &[i64::MAX], "reaches number"),
        (i64::MAX, &[1], &[1], "reaches number"),
        (0, &[i64::MAX, 4], &[0, 1], "expected an offset, a shape, and a stride for each dimension"),
        (-1, &[1], &[1], "expected an offset"),
        (0, &[1, 1], &[1], "a stride for each dimension"),
        // Three numbers that claim to be four terabytes.
        (0, &[1 << 20, 1 << 20], &[0, 0], "bytes, as many as there are, found shape [1048576, 1048576]"),
    ];
    for (offset, shape, strides, message) in cases {
        for bytes in with(offset, shape, strides) {
            refused(&bytes, &["tensor w: ", message]);
        }
    }
}

#[test]
fn storages_of_another_size_are_refused() {
    let twice = dict(&[("w", vector("0", 3)), ("v", vector("0", 2))]);
    refused(
        &archive(&twice, &[("0", three())]),
        &["tensor v: expected a storage of 8 bytes, found 12 bytes in storage 0"],
    );
    refused(&legacy(&twice, &[("0", 3, three())]), &["storage 0: expected 2 numbers, found 3"]);
    let short = &three()[..8];
    refused(&archive(&one_vector(), &[("0", short.to_vec())]), &["tensor w: expected a storage of 12 bytes"]);
    refused(&archive(&one_vector(), &[]), &["tensor w: expected an entry net/data/0, found none of this name"]);
    refused(&legacy(&one_vector(), &[]), &["tensor w: expected storage 0, found 0 others"]);
    let huge = dict(&[("w", view(storage("torch.FloatStorage", "0", i64::MAX), 0, &[1], &[1]))]);
    refused(&legacy(&huge, &[("0", i64::MAX, three())]), &["storage 0: expected 9223372036854775807 numbers"]);
    refused(&archive(&huge, &[("0", three())]), &["tensor w: expected a length that is a number"]);
    let negative = dict(&[("w", storage("torch.FloatStorage", "0", -1))]);
    refused(&archive(&negative, &[]), &["expected the length of a storage, found an integer at byte"]);
}

#[test]
fn a_name_that_comes_twice_is_refused() {
    let code = dict(&[("w", vector("0", 3)), ("w", vector("0", 3))]);
    refused(&archive(&code, &[("0", three())]), &["tensor w: expected each name once, found it twice"]);
    let mut entries = entries(&one_vector(), &[("0", three())]);
    entries.push(stored("net/data/0", &three()));
    refused(&zip(&entries), &["archive: expected a name once, found two entries of the same name"]);
    refused(
        &legacy(&one_vector(), &[("0", 3, three()), ("0", 3, three())]),
        &["storage 0: expected each storage once"],
    );
    let entry = r#"{"dtype":"F32","shape":[3],"data_offsets":[0,12]}"#;
    refused(&safetensors(&format!(r#"{{"w":{entry},"w":{entry}}}"#), &three()), &["header: ", "the name w twice"]);
}

#[test]
fn entries_that_would_lead_elsewhere_are_refused() {
    for name in ["../w", "net/../../w", "/etc/passwd", r"net\w", "C:/w", "C:w", "net/w\0"] {
        let mut entries = entries(&one_vector(), &[("0", three())]);
        entries.push(stored(name, b""));
        refused(&zip(&entries), &["archive: expected entries whose names are relative paths", &format!("{name:?}")]);
    }
    let mut fine = entries(&one_vector(), &[("0", three())]);
    fine.push(stored("net/..w/.data/serialization_id", b"1"));
    assert!(open(&zip(&fine)).is_ok());
}

#[test]
fn an_archive_that_is_no_checkpoint_is_named() {
    refused(&zip(&[stored("word/document.xml", b"")]), &["expected one entry NAME/data.pkl, found 0 among 1 entries"]);
    let mut two = entries(&one_vector(), &[("0", three())]);
    two.push(stored("other/data.pkl", b""));
    refused(&zip(&two), &["found 2 among 5 entries"]);
}

#[test]
fn big_endian_files_are_refused() {
    let mut entries = entries(&one_vector(), &[("0", three())]);
    entries[1] = stored("net/byteorder", b"big");
    refused(&zip(&entries), &["entry net/byteorder: expected little, found big"]);
    let mut old = legacy(&one_vector(), &[("0", 3, three())]);
    let at = old.iter().position(|byte| *byte == 0x88).unwrap();
    old[at] = 0x89;
    refused(&old, &["system information", "expected little_endian to be true"]);
}

#[test]
fn entries_that_lie_about_their_size_are_refused() {
    let with = |change: fn(&mut Entry)| {
        let mut entries = entries(&one_vector(), &[("0", three())]);
        change(&mut entries[2]);
        zip(&entries)
    };
    let wrong_size = "tensor w: expected entry net/data/0 of a size that its 12 bytes can have, found 4096 bytes";
    refused(&with(|entry| entry.len = 4096), &[wrong_size]);
    refused(&with(|entry| (entry.method, entry.len) = (8, u32::MAX)), &["found 4294967295 bytes"]);
    refused(&with(|entry| entry.method = 12), &["expected entry net/data/0 stored or deflated"]);
    refused(&with(|entry| entry.flags = 1), &["expected entry net/data/0 in clear"]);
    refused(&with(|entry| entry.crc ^= 1), &["tensor w: expected numbers of checksum"]);
    refused(&with(|entry| entry.method = 8), &["tensor w: "]);
    assert!(open(&with(|entry| entry.crc = 0)).is_ok());

    // Honest headers, but deflated bytes that end before the numbers do.
    let code = dict(&[("w", vector("0", 1000))]);
    let mut entries = entries(&code, &[]);
    entries.push(Entry { len: 4000, ..deflated("net/data/0", &[0; 2000]) });
    refused(&zip(&entries), &["tensor w: expected 4000 bytes of numbers, found the end after 2000"]);
}

#[test]
fn truncated_files_are_refused_at_every_length() {
    let header = r#"{"w":{"dtype":"F32","shape":[3],"data_offsets":[0,12]}}"#;
    for whole in [
        archive(&one_vector(), &[("0", three())]),
        legacy(&one_vector(), &[("0", 3, three())]),
        safetensors(header, &three()),
    ] {
        assert!(only(&whole).is_ok());
        for len in 0..whole.len() {
            refused(&whole[..len], &["expected", "found"]);
        }
    }
    let whole = legacy(&one_vector(), &[("0", 3, three())]);
    refused(&whole[..whole.len() - 1], &["storage 0: expected 3 numbers of torch.FloatStorage, found 11 bytes"]);
    let whole = archive(&one_vector(), &[("0", three())]);
    refused(&whole[..whole.len() - 1], &["archive: expected a whole zip archive"]);
    refused(&safetensors(header, &three()[..11]), &["tensor w: expected data_offsets within the 11 bytes of data"]);
}

#[test]
fn damaged_pickles_say_where() {
    let with = |pickle: &[u8]| zip(&[stored("net/data.pkl", pickle)]);
    let cases: [(&[u8], &str); 18] = [
        (b"\x80\x02}P.", "expected an instruction of pickle protocol 2 to 5, found opcode 0x50 at byte 3"),
        (b"\x80\x02\xff", "found opcode 0xff at byte 2"),
        (b"\x80\x01}.", "expected a pickle of protocol 2 to 5, found protocol 1 at byte 2"),
        (b"\x80\x02}", "expected more of the pickle, found its end at byte 3"),
        (b"", "found its end at byte 0"),
        (b"\x80\x02.", "expected a value, found an empty stack at byte 3"),
        (b"\x80\x02(}0e", "expected a value, found an empty stack"),
        (b"\x80\x02t", "expected a mark, found none at byte 3"),
        (b"\x80\x02h\x07", "expected a memo slot that was filled, found slot 7 at byte 4"),
        (b"\x80\x02}r\xff\xff\xff\xff", "expected a memo slot below the number of bytes"),
        (b"\x80\x02X\x09\0\0\0abc", "expected 9 bytes, found the end after 3 of them"),
        (b"\x80\x02X\xff\xff\xff\xffabc", "expected a pickle of at most 67108864 bytes, found 4294967295 more bytes"),
        (b"\x80\x02\x8d\xff\xff\xff\xff\xff\xff\xff\xffabc", "found 18446744073709551615 more bytes"),
        (b"\x80\x02B\x09\0\0\0abc", "expected 9 bytes, found the end after 3 of them"),
        (b"\x80\x02X\x01\0\0\0\xff", "expected UTF-8, found invalid utf-8"),
        (b"\x80\x02}(NNNu", "expected keys and values, found a key without a value"),
        (b"\x80\x02NN\x93", "expected the name of a function or class"),
        (b"\x80\x02X\x07\0\0\0storage\x85Q", "expected type, key, place and length of a storage, found 1 values"),
    ];
    for (pickle, message) in cases {
        refused(&with(pickle), &["entry net/data.pkl: ", message]);
    }
    let long = "x".repeat(300);
    refused(&with(&pickle(&global(&format!("a.{long}")))), &["found a text of 301 bytes"]);
    let old_view = [text("storage"), global("torch.FloatStorage"), text("0"), text("cpu"), int(3), ints(&[0, 0, 3])];
    let code = [tuple(&old_view), b"Q".to_vec()].concat();
    refused(&with(&pickle(&code)), &["expected a storage, found a view of one, as PyTorch wrote before 0.4"]);
}

#[test]
fn legacy_files_must_begin_as_they_should() {
    let whole = legacy(&one_vector(), &[("0", 3, three())]);
    let mut magic = whole.clone();
    magic[5] ^= 1;
    refused(&magic, &["magic number: expected 0x1950a86a20f9469cfc6c of PyTorch, found [80, 02, 8a, 0a"]);
    let version = [MAGIC, &pickle(&int(1000))].concat();
    refused(&version, &["protocol version from byte 15 on: expected 1001, found 1000"]);
    let version = [MAGIC, &pickle(&text("1001"))].concat();
    refused(&version, &["protocol version", "expected 1001, found a text"]);
    let mut opcode = whole.clone();
    opcode[15 + 2] = 0xee;
    refused(&opcode, &["protocol version from byte 15 on: ", "found opcode 0xee at byte 2"]);
    let beyond = legacy(&one_vector(), &[("0", 3, three()), ("1", 3, three())]);
    refused(&beyond, &["storage 1: expected a tensor that looks at it, found none in the pickle"]);
}

#[test]
fn nesting_and_circles_do_no_harm() -> Outcome {
    const DEEP: usize = 1_000_000;
    let deep = |open: &[u8], close: &[u8]| [open.repeat(DEEP), b"N".to_vec(), close.repeat(DEEP)].concat();
    for nested in [deep(b"]", b"a"), deep(b"", b"\x85"), deep(b"}N", b"s"), deep(b"(", b"t")] {
        let code = dict(&[("history", nested), ("w", vector("0", 3))]);
        assert_eq!(names(&archive(&code, &[("0", three())]))?, ["w"]);
    }
    // A list and a dict that hold themselves.
    let code = dict(&[("list", b"]q\x01h\x01a".to_vec()), ("model", b"}q\x02X\x05\0\0\0modelh\x02s".to_vec())]);
    refused(&archive(&code, &[]), &["found a dict with list (a list), model (a dict)"]);
    Ok(())
}

#[test]
fn headers_of_safetensors_that_lie_are_refused() {
    let with = |entry: &str| safetensors(&format!(r#"{{"w":{entry}}}"#), &three());
    for (entry, message) in [
        (r#"{"dtype":"F32","shape":[4],"data_offsets":[0,12]}"#, "expected the bytes of shape [4] of F32, found 12"),
        (r#"{"dtype":"F32","shape":[3],"data_offsets":[12,0]}"#, "expected data_offsets within the 12 bytes of data"),
        (r#"{"dtype":"F32","shape":[3],"data_offsets":[4,16]}"#, "found 4 to 16"),
        (r#"{"dtype":"F32","shape":[18446744073709551615,2],"data_offsets":[0,12]}"#, "expected a shape"),
        (r#"{"dtype":"F32","shape":[-3],"data_offsets":[0,12]}"#, "expected dtype, shape and data_offsets"),
        (r#"{"dtype":"F32","shape":[3]}"#, "missing field `data_offsets`"),
    ] {
        refused(&with(entry), &["tensor w: ", message]);
    }
    let part = r#"{"dtype":"F32","shape":[2],"data_offsets":[0,8]}"#;
    refused(&with(part), &["header: expected tensors that cover the 12 bytes of data", "found 8 bytes of tensors"]);
    let hole = r#"{"dtype":"F32","shape":[2],"data_offsets":[4,12]}"#;
    refused(&with(hole), &["without hole or overlap"]);
    refused(&[&[0xff, 0xff, 0, 0, 0, 0, 0, 0][..], b"{}"].concat(), &["header: expected at most 2 bytes, found 65535"]);
    refused(&safetensors("{}      ", b""), &["header: expected tensors, found none"]);
    refused(&safetensors("{]", b""), &["header: expected names and tensors"]);
}
