use candle_core::{DType, Device, Tensor, Var};
use proptest::prelude::*;
use xvlm_kernels as kernels;

use crate::check::{Array, At, check};

fn plain(table: &Array, ids: &[u32], shape: &[usize]) -> Array {
    let width = table.shape[1];
    let row = |&id: &u32| table.values[id as usize * width..][..width].to_vec();
    Array::new(&[shape, &[width]].concat(), ids.iter().flat_map(row).collect())
}

fn compare(table: [usize; 2], shape: [usize; 2], seed: u64) {
    let ids: Vec<u32> =
        Array::random(&shape, seed).values.iter().map(|x| ((x + 1.0) / 2.0 * table[0] as f64) as u32).collect();
    check(
        [Array::random(&table, seed ^ 1)],
        |[table]| plain(table, &ids, &shape),
        |at, [table]| kernels::embedding(table, &Tensor::from_slice(&ids, &shape, &at.device)?, None),
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(10))]

    #[test]
    fn embeddings(rows in 1usize..9, width in 1usize..40, batch in 0usize..4, words in 1usize..12, seed: u64) {
        compare([rows, width], [batch, words], seed);
    }
}

#[test]
fn more_rows_than_a_thread_takes() {
    compare([150, 8], [2, 40], 9);
}

#[test]
fn padding_is_not_trained() {
    for at in At::all() {
        let table = Var::from_tensor(&Array::random(&[4, 5], 1).tensor(&at, false)).unwrap();
        let ids = Tensor::new(&[[1u32, 1, 0], [3, 1, 0]], &at.device).unwrap();
        let (padded, plain, gradients) = at.computer.run(|| {
            let padded = kernels::embedding(&table, &ids, Some(1)).unwrap();
            let plain = kernels::embedding(&table, &ids, None).unwrap();
            let gradients = padded.sum_all().unwrap().backward().unwrap();
            (Array::from(&padded), Array::from(&plain), gradients)
        });
        assert_eq!(padded.values, plain.values);
        let gradient = Array::from(gradients.get(&table).unwrap()).values;
        assert_eq!(gradient.iter().step_by(5).copied().collect::<Vec<_>>(), [2.0, 0.0, 0.0, 1.0], "{at:?}");
    }
}

#[test]
fn wrong_ids_are_named() {
    for at in At::all() {
        let table = Var::from_tensor(&Array::random(&[4, 5], 1).tensor(&at, false)).unwrap();
        let ids = Tensor::new(&[1u32, 4], &at.device).unwrap();
        let of_host = matches!(at.computer, crate::device::Computer::Host);
        match at.computer.run(|| kernels::embedding(&table, &ids, None)) {
            Ok(rows) => {
                assert!(!of_host);
                let values = Array::from(&rows).values;
                assert!(values[..5].iter().all(|x| x.is_finite()) && values[5..].iter().all(|x| x.is_nan()));
                let error = at.computer.run(|| rows.sum_all().unwrap().backward()).unwrap_err().to_string();
                assert!(error.contains("below 4") && error.contains("found 4"), "{error}");
            }
            Err(_) if at.dtype == DType::F64 => (),
            Err(error) => {
                let error = error.to_string();
                assert!(of_host && error.contains("below 4") && error.contains("found 4"), "{error}");
            }
        }
    }
    let table = Tensor::zeros((4, 5), DType::F32, &Device::Cpu).unwrap();
    let error = kernels::embedding(&table, &Tensor::new(&[1i64], &Device::Cpu).unwrap(), None).unwrap_err();
    assert!(error.to_string().contains("embedding: `ids` should be U32"), "{error}");
    assert!(
        kernels::embedding(&table.flatten_all().unwrap(), &Tensor::new(&[1u32], &Device::Cpu).unwrap(), None).is_err()
    );
}
