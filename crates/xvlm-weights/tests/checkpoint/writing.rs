//! Checkpoints for PyTorch.

use super::*;

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
