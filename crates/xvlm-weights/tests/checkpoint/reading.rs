//! What checkpoints hold, in whatever form.

use super::*;

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
