//! Every operation of `xvlm-kernels` at the sizes of the base model, beside the same in plain candle operations and beside
//! the least it could cost on this machine.

use candle_core::{DType, Device, Result, Tensor, Var};
use xvlm::kernels::{
    self, AdamW, BoxFormat, Cover, Dropout, Dropped, Epilogue, KeyValueCache, PackedLinear, PackedWeights, Update,
    WindowBias, WindowShape,
};
use xvlm_benches::{Case, Comparison, Floor, device, plain, random_at};

/// Tokens of the first and the last stage of Swin-B, of the texts, and of the image they look at.
const FIRST: usize = 56 * 56;
const LAST: usize = 7 * 7;
const TEXTS: usize = 8;
const WORDS: usize = 40;
const HEADS: usize = 12;

/// What the measurements of one float type share.
struct Bench<'a> {
    comparison: &'a mut Comparison,
    dtype: DType,
    device: Device,
}

impl Bench<'_> {
    fn random(&self, shape: &[usize]) -> Result<Var> {
        random_at(shape, self.dtype, &self.device)
    }

    fn zeros(&self, shape: (usize, usize)) -> Result<Tensor> {
        Tensor::zeros(shape, self.dtype, &self.device)
    }

    fn ids(&self, ids: &[u32]) -> Result<Tensor> {
        Tensor::new(ids, &self.device)
    }

    /// Bytes of so many numbers.
    fn bytes(&self, numbers: usize) -> Floor {
        Floor::Bytes(numbers * self.dtype.size_in_bytes())
    }

    fn case(
        &mut self,
        name: &str,
        floors: [Floor; 2],
        ours: impl Fn() -> Result<Tensor>,
        plain: impl Fn() -> Result<Tensor>,
    ) -> Result<()> {
        let name = format!("{name} {}", self.dtype.as_str());
        let dtype = self.dtype;
        self.comparison.measure(&Case { name, ours: Box::new(ours), plain: Box::new(plain), floors, dtype })
    }

    fn linear(&mut self) -> Result<()> {
        for (m, k, n) in [(FIRST, 128, 512), (LAST, 1024, 4096)] {
            let (x, weight, bias) = (self.random(&[1, m, k])?, self.random(&[n, k])?, self.random(&[n])?);
            let floors = [2, 6].map(|products| Floor::Flops(products * m * k * n));
            let name = format!("linear {m}x{k}x{n}");
            self.case(&name, floors, || kernels::linear(&x, &weight, &bias), || plain::linear(&x, &weight, &bias))?;
            let ours = || kernels::gelu_linear(&x, &weight, &bias);
            let plain = || plain::linear(&x.gelu_erf()?, &weight, &bias);
            self.case(&format!("gelu + linear {m}x{k}x{n}"), floors, ours, plain)?;
        }
        Ok(())
    }

    /// Layers for inference, whose weights get no gradients; those of bytes beside plain ones of `f32`, and so are their floors.
    fn packed_linear(&mut self) -> Result<()> {
        let kinds = [("packed linear", PackedWeights::AsGiven), ("packed linear of bytes", PackedWeights::Int8)];
        let kinds = if self.dtype == DType::F32 { &kinds[..] } else { &kinds[..1] };
        for (m, k, n) in [(FIRST, 128, 512), (LAST, 1024, 4096)] {
            let (x, weight, bias) = (self.random(&[1, m, k])?, self.random(&[n, k])?, self.random(&[n])?);
            let (weight, bias) = (weight.detach(), bias.detach());
            let floors = [2, 4].map(|products| Floor::Flops(products * m * k * n));
            for (kind, weights) in kinds {
                let layer = PackedLinear::new(&weight, Some(&bias), *weights)?;
                let ours = || layer.forward(&x, Epilogue::Nothing);
                self.case(&format!("{kind} {m}x{k}x{n}"), floors, ours, || plain::linear(&x, &weight, &bias))?;
            }
        }
        Ok(())
    }

    /// The linear layers of the base model's Swin stages, of four images, and of its texts, beside the same by `f32`
    /// arithmetic on widened tensors.
    fn widened_linear(&mut self) -> Result<()> {
        for (m, k, n) in [
            (4 * FIRST, 128, 512),
            (4 * FIRST, 512, 128),
            (FIRST, 256, 1024),
            (4 * 196, 512, 2048),
            (4 * LAST, 1024, 4096),
            (4 * LAST, 4096, 1024),
            (4 * WORDS, 768, 3072),
        ] {
            let (x, weight, bias) = (self.random(&[1, m, k])?, self.random(&[n, k])?, self.random(&[n])?);
            let wide = |tensor: &Var| tensor.to_dtype(DType::F32);
            let widened = || kernels::linear(&wide(&x)?, &wide(&weight)?, &wide(&bias)?)?.to_dtype(self.dtype);
            let floors = [2, 6].map(|products| Floor::Flops(products * m * k * n));
            let name = format!("linear {m}x{k}x{n} {} beside f32", self.dtype.as_str());
            let ours = || kernels::linear(&x, &weight, &bias);
            let (ours, plain) = (Box::new(ours), Box::new(widened));
            self.comparison.measure(&Case { name, ours, plain, floors, dtype: DType::F32 })?;
        }
        Ok(())
    }

    fn rows(&mut self) -> Result<()> {
        // Backward passes read the input and the gradient and write the input's gradient.
        let floors = |count: usize, bench: &Self| [bench.bytes(2 * count), bench.bytes(5 * count)];
        // What one image needs stays in the processor's caches; what eight need does not.
        for rows in [FIRST, 8 * FIRST] {
            let wide = self.random(&[1, rows, 512])?;
            let of_wide = floors(wide.elem_count(), self);
            self.case(&format!("gelu {rows}x512"), of_wide, || kernels::gelu(&wide), || wide.gelu_erf())?;
            let quick = || kernels::quick_gelu(&wide);
            self.case(&format!("quick gelu {rows}x512"), of_wide, quick, || plain::quick_gelu(&wide))?;
            let dropout = Dropout { probability: 0.1, seed: 0 };
            let ours = || kernels::dropout(&wide, dropout);
            self.case(&format!("dropout {rows}x512"), of_wide, ours, || plain::dropout(&wide, 0.1))?;
            let bias = self.random(&[512])?;
            let shifted = || wide.broadcast_add(&bias)?.gelu_erf();
            let name = format!("bias + gelu {rows}x512");
            self.case(&name, of_wide, || kernels::bias_gelu(&wide, &bias), shifted)?;

            for width in [128, 512] {
                let x = self.random(&[1, rows, width])?;
                let (weight, bias) = (self.random(&[width])?, self.random(&[width])?);
                let ours = || kernels::layer_norm(&x, &weight, &bias, 1e-5);
                let plain = || plain::layer_norm(&x, &weight, &bias, 1e-5);
                let name = format!("layer norm {rows}x{width}");
                self.case(&name, floors(x.elem_count(), self), ours, plain)?;
            }
        }
        let texts = self.random(&[TEXTS, WORDS, 768])?;
        let residual = self.random(&[TEXTS, WORDS, 768])?;
        let (weight, bias) = (self.random(&[768])?, self.random(&[768])?);
        let count = texts.elem_count();
        let ours = || kernels::add_layer_norm(&texts, &residual, &weight, &bias, 1e-12);
        let plain = || plain::layer_norm(&(texts.as_tensor() + residual.as_tensor())?, &weight, &bias, 1e-12);
        self.case("residual + layer norm 320x768", [self.bytes(3 * count), self.bytes(7 * count)], ours, plain)?;

        let branch = self.random(&[8, FIRST, 128])?;
        let x = self.random(&[8, FIRST, 128])?;
        let count = x.elem_count();
        let scales = [0f32, 1.1, 1.1, 1.1, 1.1, 1.1, 1.1, 1.1];
        let per_sample = Tensor::from_slice(&scales, (8, 1, 1), &self.device)?.to_dtype(self.dtype)?;
        let ours = || kernels::add_branch(&x, &branch, Some(&scales));
        let plain = || x.as_tensor() + branch.broadcast_mul(&per_sample)?;
        self.case("residual branch 25088x128", [self.bytes(3 * count), self.bytes(5 * count)], ours, plain)?;

        for texts in [TEXTS, 8 * TEXTS] {
            let scores = self.random(&[texts, HEADS, WORDS, 145])?;
            let rows = texts * HEADS * WORDS;
            let floors = floors(scores.elem_count(), self);
            let ours = || kernels::softmax(&scores, 3);
            self.case(&format!("softmax {rows}x145"), floors, ours, || plain::softmax(&scores))?;
            let ours = || kernels::log_softmax(&scores, 3);
            self.case(&format!("log softmax {rows}x145"), floors, ours, || plain::log_softmax(&scores))?;
        }

        let logits = self.random(&[64, 30_522])?;
        let labels: Vec<i64> = (0..64).map(|i| i * 401).collect();
        let ids = self.ids(&labels.iter().map(|&label| label as u32).collect::<Vec<_>>())?;
        let count = logits.elem_count();
        let floors = [self.bytes(count), self.bytes(3 * count)];
        let ours = || kernels::cross_entropy(&logits, &labels, 0.1);
        self.case("cross entropy 64x30522", floors, ours, || plain::cross_entropy(&logits, &ids, 0.1))
    }

    fn windows(&mut self) -> Result<()> {
        for (side, window, heads, c) in [(56, 7, 4, 128), (28, 7, 8, 256), (14, 7, 16, 512), (96, 12, 4, 128)] {
            for shift in [0, window / 2] {
                let shape = WindowShape { height: side, width: side, window, shift };
                let area = window * window;
                let (qkv, bias) = (self.random(&[1, side * side, 3 * c])?, self.random(&[heads, area, area])?);
                let mask = (shift > 0).then(|| plain::window_mask(shape, &qkv)).transpose()?;
                let products = [4, 12].map(|products| Floor::Flops(products * side * side * area * c));
                let name = format!("window attention {side}x{side} window {window} shift {shift}");
                let ours = || kernels::window_attention(&qkv, &bias, shape);
                self.case(&name, products, ours, || plain::window_attention(&qkv, &bias, shape, mask.as_ref()))?;
                let (given, laid_out) = (bias.detach(), WindowBias::new(&bias)?);
                let name = format!("{name}, bias laid out");
                let ours = || kernels::window_attention_with(&qkv, &laid_out, shape);
                self.case(&name, products, ours, || plain::window_attention(&qkv, &given, shape, mask.as_ref()))?;
            }
        }
        Ok(())
    }

    fn patches(&mut self) -> Result<()> {
        for (res, c) in [(224, 128), (384, 128)] {
            let side = res / 4;
            let pixels = self.random(&[1, 3, res, res])?;
            let moves = |count: usize, bench: &Self| [bench.bytes(2 * count), bench.bytes(4 * count)];
            let ours = || kernels::split_patches(&pixels, 4);
            let cut = || pixels.reshape((1, 3, side, 4, side, 4))?.permute([0, 2, 4, 1, 3, 5])?.contiguous();
            let plain = || cut()?.reshape((1, side * side, 48));
            self.case(&format!("split patches {res}"), moves(pixels.elem_count(), self), ours, plain)?;
            let tokens = self.random(&[1, side * side, c])?;
            let half = side / 2;
            let ours = || kernels::merge_patches(&tokens, side, side);
            let cut = || tokens.reshape((1, half, 2, half, 2, c))?.permute([0, 1, 3, 4, 2, 5])?.contiguous();
            let plain = || cut()?.reshape((1, half * half, 4 * c));
            self.case(&format!("merge patches {side}x{side}"), moves(tokens.elem_count(), self), ours, plain)?;
        }
        Ok(())
    }

    fn attention(&mut self) -> Result<()> {
        for (name, batch, t, causal, dropped) in [
            ("self", TEXTS, WORDS, false, None),
            ("dropped self", TEXTS, WORDS, false, Some(0.1)),
            ("causal", TEXTS, WORDS, true, None),
            ("self", 4, 197, false, None),
        ] {
            let qkv = self.random(&[batch, t, 3 * 768])?;
            let seen = self.zeros((batch, t))?;
            let mut bias = plain::score_bias(&seen, self.dtype)?;
            if causal {
                bias = bias.broadcast_add(&plain::causal_bias(t, &bias)?)?;
            }
            let floors = [4, 12].map(|products| Floor::Flops(products * batch * t * t * 768));
            let dropout = dropped.map(|probability| Dropped::AtRandom(Dropout { probability, seed: 0 }));
            let ours = || kernels::self_attention(&qkv, &seen, HEADS, causal, dropout);
            let name = format!("{name}-attention {batch}x{t}");
            self.case(&name, floors, ours, || plain::self_attention(&qkv, &bias, HEADS, dropped))?;
        }
        for images in [1, TEXTS] {
            let (q, kv) = (self.random(&[TEXTS, WORDS, 768])?, self.random(&[images, 145, 2 * 768])?);
            let seen = self.zeros((TEXTS, 145))?;
            let bias = plain::score_bias(&seen, self.dtype)?;
            let index: Vec<u32> = (0..TEXTS).map(|text| (text % images) as u32).collect();
            let ids = self.ids(&index)?;
            let floors = [4, 12].map(|products| Floor::Flops(products * TEXTS * WORDS * 145 * 768));
            let name = format!("cross-attention 8x40 at {images} of 145");
            let ours = || kernels::cross_attention(&q, &kv, &index, &seen, HEADS, None);
            self.case(&name, floors, ours, || plain::cross_attention(&q, &kv, &ids, &bias, HEADS))?;
        }
        Ok(())
    }

    fn regions(&mut self) -> Result<()> {
        const REGIONS: usize = 32;
        const IMAGES: usize = 8;
        let patches = self.random(&[IMAGES, LAST, 1024])?;
        let index: Vec<u32> = (0..REGIONS as u32).map(|region| region / 4).collect();
        let covered: Vec<f32> = (0..REGIONS)
            .flat_map(|region| kernels::patch_rectangle_mask([0.2 + 0.02 * region as f32, 0.5, 0.3, 0.4], 7))
            .collect();
        let covered = Tensor::from_vec(covered, (REGIONS, LAST), &Device::Cpu)?;
        let covered = covered.to_dtype(self.dtype)?.to_device(&self.device)?;
        let ids = self.ids(&index)?;
        let (read, written) = (IMAGES * LAST * 1024, REGIONS * (1 + LAST) * 1024);
        let floors = [self.bytes(read + written), self.bytes(2 * (read + written))];
        let ours = || kernels::patch_pool(&patches, &index, Cover::Mask(&covered));
        self.case("patch pool 32 of 8x49x1024", floors, ours, || plain::patch_pool(&patches, &ids, &covered))?;
        let boxes: Vec<f32> = (0..REGIONS).flat_map(|region| [0.2 + 0.02 * region as f32, 0.5, 0.3, 0.4]).collect();
        let boxes = Tensor::from_vec(boxes, (REGIONS, 4), &self.device)?;
        let ours = || kernels::patch_pool(&patches, &index, Cover::Boxes(&boxes));
        let name = "patch pool by boxes 32 of 8x49x1024";
        self.case(name, floors, ours, || plain::patch_pool(&patches, &ids, &covered))
    }

    fn boxes(&mut self) -> Result<()> {
        let boxes = Var::from_tensor(&self.random(&[1024, 4])?.affine(0.1, 0.5)?)?;
        let targets = boxes.affine(0.9, 0.02)?.detach();
        let floors = [self.bytes(10 * 1024), self.bytes(24 * 1024)];
        let ours = || kernels::box_losses(&boxes, &targets);
        self.case("box losses 1024", floors, ours, || plain::box_losses(&boxes, &targets))?;

        let floors = [self.bytes(9 * 1024), self.bytes(21 * 1024)];
        let ours = || kernels::giou(&boxes, &targets, BoxFormat::Cxcywh);
        let plain = || plain::giou(&plain::corners(&boxes)?, &plain::corners(&targets)?);
        self.case("giou 1024", floors, ours, plain)?;

        let others = targets.narrow(0, 0, 64)?;
        let pairs = 1024 * 64;
        let floors = [self.bytes(pairs), self.bytes(2 * pairs)];
        let ours = || kernels::pairwise_giou(&boxes, &others, BoxFormat::Cxcywh);
        let plain = || plain::giou(&plain::corners(&boxes)?.unsqueeze(1)?, &plain::corners(&others)?.unsqueeze(0)?);
        self.case("giou 1024x64", floors, ours, plain)
    }

    fn words(&mut self) -> Result<()> {
        const VOCABULARY: usize = 30_522;
        let table = self.random(&[VOCABULARY, 768])?;
        let ids: Vec<u32> = (0..TEXTS * WORDS).map(|i| (i * 7919 % VOCABULARY) as u32).collect();
        let ids = self.ids(&ids)?.reshape((TEXTS, WORDS))?;
        let count = TEXTS * WORDS * 768;
        let floors = [self.bytes(2 * count), self.bytes(3 * count + VOCABULARY * 768)];
        let flat = ids.flatten_all()?;
        let plain = || table.index_select(&flat, 0);
        self.case("embedding 8x40 of 30522x768", floors, || kernels::embedding(&table, &ids, None), plain)
    }

    fn all(&mut self) -> Result<()> {
        self.linear()?;
        self.packed_linear()?;
        if self.dtype != DType::F32 {
            self.widened_linear()?;
        }
        self.rows()?;
        self.windows()?;
        self.patches()?;
        self.attention()?;
        self.regions()?;
        self.boxes()?;
        self.words()
    }
}

/// A step of sixteen matrices of 4096 × 1024 with clipping, of which the kernel reads the gradients twice, everything else
/// once, and writes all but those.
fn optimizer(comparison: &mut Comparison, device: &Device) -> Result<()> {
    const MATRICES: usize = 16;
    let matrix = || random_at(&[4096, 1024], DType::F32, device);
    let tensors = (0..MATRICES)
        .map(|_| Ok([matrix()?, matrix()?, Var::from_tensor(&matrix()?.abs()?)?, matrix()?]))
        .collect::<Result<Vec<_>>>()?;
    fn update([parameter, first_moment, second_moment, gradient]: &[Var; 4]) -> Update<'_> {
        Update { parameter, rest: None, first_moment, second_moment, gradient, lr: 1e-4, weight_decay: 0.01, step: 10 }
    }
    let updates: Vec<Update> = tensors.iter().map(update).collect();
    let settings = AdamW { beta1: 0.9, beta2: 0.98, eps: 1e-8, max_norm: Some(1.0) };
    let bytes = Floor::Bytes(8 * 4 * MATRICES * 4096 * 1024);
    comparison.measure_step(
        "adamw 16x4096x1024",
        bytes,
        &|| kernels::adamw_step(&settings, &updates).map(drop),
        &|| plain::adamw(&settings, &updates),
    )?;
    if !device.is_cpu() {
        return Ok(());
    }
    // Parameters of bf16 with the rest of their numbers, beside ones that are rounded from f32.
    let zeros = |dtype| Var::zeros((4096, 1024), dtype, device);
    let halves = tensors
        .iter()
        .map(|[wide, .., gradient]| {
            let (parameter, rest) = (zeros(DType::BF16)?, zeros(DType::I16)?);
            kernels::split_into(&parameter, &rest, wide)?;
            Ok((parameter, rest, gradient.to_dtype(DType::BF16)?))
        })
        .collect::<Result<Vec<_>>>()?;
    let by_halves: Vec<Update> = updates
        .iter()
        .zip(&halves)
        .map(|(update, (parameter, rest, gradient))| Update { parameter, rest: Some(rest), gradient, ..*update })
        .collect();
    let rounded = || {
        plain::adamw(&settings, &updates)?;
        let mut pairs = updates.iter().zip(&halves);
        pairs.try_for_each(|(update, (parameter, ..))| parameter.set(&update.parameter.to_dtype(DType::BF16)?))
    };
    comparison.measure_step(
        "adamw by halves 16x4096x1024",
        // Gradients twice, both halves and both moments in and out.
        Floor::Bytes((2 * 2 + 2 * (2 + 2) + 2 * (4 + 4)) * MATRICES * 4096 * 1024),
        &|| kernels::adamw_step(&settings, &by_halves).map(drop),
        &rounded,
    )
}

/// Twenty tokens of three beams, one after the other: with the keys and values of those before, and from the start each time.
fn decoding(comparison: &mut Comparison, device: &Device) -> Result<()> {
    const BEAMS: usize = 3;
    const TOKENS: usize = 20;
    let qkv = random_at(&[BEAMS, TOKENS, 3 * 768], DType::F32, device)?.detach();
    let seen = Tensor::zeros((BEAMS, TOKENS), DType::F32, device)?;
    let steps = (0..TOKENS)
        .map(|token| Ok((qkv.narrow(1, token, 1)?.contiguous()?, seen.narrow(1, 0, token + 1)?.contiguous()?)))
        .collect::<Result<Vec<_>>>()?;
    let bias = plain::score_bias(&seen, DType::F32)?.broadcast_add(&plain::causal_bias(TOKENS, &seen)?)?;
    let cached = || {
        let mut cache = KeyValueCache::new(BEAMS, TOKENS, 768, DType::F32, device)?;
        steps.iter().try_for_each(|(new, seen)| kernels::cached_attention(new, &mut cache, seen, HEADS).map(drop))
    };
    let again = || {
        (1..=TOKENS).try_for_each(|tokens| {
            let bias = bias.narrow(2, 0, tokens)?.narrow(3, 0, tokens)?;
            plain::self_attention(&qkv.narrow(1, 0, tokens)?, &bias, HEADS, None).map(drop)
        })
    };
    // Each step reads what is cached and its own row, and writes its keys, its values and its result.
    let numbers = (1..=TOKENS).map(|tokens| (2 * tokens + 6) * BEAMS * 768).sum::<usize>();
    comparison.measure_step("cached attention, 20 tokens of 3 beams", Floor::Bytes(4 * numbers), &cached, &again)
}

fn main() {
    xvlm_benches::run(|comparison| {
        let device = device();
        optimizer(comparison, &device)?;
        decoding(comparison, &device)?;
        let dtypes: &[DType] =
            if device.is_cpu() { &[DType::F32, DType::BF16] } else { &[DType::F32, DType::BF16, DType::F16] };
        for &dtype in dtypes {
            Bench { comparison, dtype, device: device.clone() }.all()?;
        }
        Ok(())
    });
}
