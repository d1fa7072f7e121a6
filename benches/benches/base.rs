//! The base model in use, with drawn weights: the cases of `cargo xtask bench --peers`.

use criterion::Criterion;
use xvlm::Precision;
use xvlm::encoders::XvlmConfig;
use xvlm_benches::base::{Prepared, model};
use xvlm_benches::cases::{CASES, Work};
use xvlm_benches::device;

/// A case is at most some seconds long.
const SAMPLES: usize = 10;

fn inference(criterion: &mut Criterion) -> candle_core::Result<()> {
    let device = device();
    let mut group = criterion.benchmark_group("base model");
    group.sample_size(SAMPLES);
    let mut built = None;
    for case in CASES.iter().filter(|case| case.is_inference() && case.work != Work::CaptionCached) {
        for precision in [Precision::F32, Precision::Bf16] {
            group.bench_function(format!("{} {}", case.name, precision), |bencher| {
                // Built only when it is to be measured.
                let is_built =
                    |&&(resolution, of, _): &&(usize, Precision, _)| resolution == case.resolution && of == precision;
                if built.as_ref().filter(is_built).is_none() {
                    built = None;
                    let model = model(&XvlmConfig::base(case.resolution), precision, &device).expect("a model");
                    built = Some((case.resolution, precision, model));
                }
                let prepared = Prepared::new(case, precision, &device).expect("inputs");
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
    xvlm_benches::measure(inference);
}
