//! The base model in use, with drawn weights: the cases of `cargo xtask bench --peers`.

use candle_core::DType;
use criterion::Criterion;
use xvlm::kernels::PackedWeights;
use xvlm_benches::base::{Prepared, model};
use xvlm_benches::cases::{CASES, Work};
use xvlm_benches::{criterion, device};

/// A case is at most some seconds long.
const SAMPLES: usize = 10;

fn inference(criterion: &mut Criterion) -> candle_core::Result<()> {
    let device = device();
    let mut group = criterion.benchmark_group("base model");
    group.sample_size(SAMPLES);
    let mut built = None;
    for case in CASES.iter().filter(|case| case.is_inference() && case.work != Work::CaptionCached) {
        for dtype in [DType::F32, DType::BF16] {
            group.bench_function(format!("{} {}", case.name, dtype.as_str()), |bencher| {
                // Built only when it is to be measured.
                let is_built =
                    |&&(resolution, of, _): &&(usize, DType, _)| resolution == case.resolution && of == dtype;
                if built.as_ref().filter(is_built).is_none() {
                    built = None;
                    let model = model(case.resolution, dtype, PackedWeights::AsGiven, &device).expect("a model");
                    built = Some((case.resolution, dtype, model));
                }
                let prepared = Prepared::new(case, dtype, &device).expect("inputs");
                let (_, _, model) = built.as_ref().expect("it has been built");
                bencher.iter(|| {
                    let output = prepared.run(model).expect("a result");
                    device.synchronize().expect("the device");
                    output
                });
            });
        }
    }
    group.finish();
    Ok(())
}

fn main() {
    xvlm::kernels::process::run(|| {
        let mut criterion = criterion();
        inference(&mut criterion).expect("inputs of a measurement");
        criterion.final_summary();
    });
}
