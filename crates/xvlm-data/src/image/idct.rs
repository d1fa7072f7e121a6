//! The inverse cosine transform of JPEG's 8 × 8 blocks, in single precision.
//!
//! libjpeg's default is in fixed point; rounding to 8 bits, the two differ by 1 of 255 in few pixels (as JPEG's standard allows
//! any two decoders to).

/// ½ cos(kπ/16): the transform's entries.
const C1: f32 = 0.490_392_64;
const C2: f32 = 0.461_939_76;
const C3: f32 = 0.415_734_8;
const C4: f32 = 0.353_553_4;
const C5: f32 = 0.277_785_12;
const C6: f32 = 0.191_341_71;
const C7: f32 = 0.097_545_16;

/// Row x (of the first four): what frequencies 1, 3, 5 and 7 give at position x; at 7 − x they give the opposite.
const ODD: [[f32; 4]; 4] = [[C1, C3, C5, C7], [C3, -C7, -C1, -C5], [C5, -C1, C7, C3], [C7, -C5, C3, -C1]];
/// The same of frequencies 0, 2, 4 and 6; at 7 − x they give the same.
const EVEN: [[f32; 4]; 4] = [[C4, C2, C4, C6], [C4, C6, -C4, -C2], [C4, -C6, -C4, C2], [C4, -C2, C4, -C6]];

/// The 8 × 8 pixels of a block of dequantised coefficients, `[8][8]` in natural order, of which those of a row or column of
/// `N` and more are 0. Row y goes to `out[y · stride..]`.
///
/// Panics if `out` is too short for that.
#[inline(always)]
pub(super) fn inverse<const N: usize>(block: &[f32; 64], out: &mut [u8], stride: usize) {
    let mut columns = [[0f32; 8]; 8];
    let row = |v: usize| -> &[f32; 8] { block[v * 8..].first_chunk().expect("eight rows of eight") };
    for y in 0..4 {
        let (mut even, mut odd) = ([0f32; 8], [0f32; 8]);
        for half in 0..N / 2 {
            let (e, o) = (row(2 * half), row(2 * half + 1));
            for u in 0..N {
                even[u] += EVEN[y][half] * e[u];
                odd[u] += ODD[y][half] * o[u];
            }
        }
        for u in 0..N {
            columns[y][u] = even[u] + odd[u];
            columns[7 - y][u] = even[u] - odd[u];
        }
    }
    for (y, t) in columns.iter().enumerate() {
        let (mut even, mut odd) = ([CENTRE; 4], [0f32; 4]);
        for half in 0..N / 2 {
            for x in 0..4 {
                even[x] += EVEN[x][half] * t[2 * half];
                odd[x] += ODD[x][half] * t[2 * half + 1];
            }
        }
        let mut bytes = [0u8; 8];
        for x in 0..4 {
            bytes[x] = to_byte(even[x] + odd[x]);
            bytes[7 - x] = to_byte(even[x] - odd[x]);
        }
        out[y * stride..][..8].copy_from_slice(&bytes);
    }
}

/// The pixels of a block of which only the mean is not 0.
#[inline(always)]
pub(super) fn inverse_flat(mean: f32, out: &mut [u8], stride: usize) {
    let byte = to_byte(mean * (C4 * C4) + CENTRE);
    for y in 0..8 {
        out[y * stride..][..8].fill(byte);
    }
}

/// Pixels are coded around this.
const CENTRE: f32 = 128.0;

/// Rounds and clamps, by the bits of a number so large that its last bit is worth 1: quicker than a cast, which looks for what
/// is no number.
#[inline(always)]
fn to_byte(value: f32) -> u8 {
    const LARGE: f32 = (1 << 23) as f32;
    let value = if value > 0.0 { value } else { 0.0 };
    let value = if value < 255.0 { value } else { 255.0 };
    (value + LARGE).to_bits() as u8
}

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;

    /// The definition (ITU-T T.81, A.3.3).
    fn slow(block: &[f32; 64]) -> Vec<f64> {
        let cosine = |x: usize, u: usize| ((2 * x + 1) as f64 * u as f64 * std::f64::consts::PI / 16.0).cos();
        let c = |u: usize| if u == 0 { 0.5f64.sqrt() } else { 1.0 };
        let pixel = |y: usize, x: usize| -> f64 {
            let term = |i: usize| {
                let (v, u) = (i / 8, i % 8);
                c(u) * c(v) / 4.0 * f64::from(block[i]) * cosine(x, u) * cosine(y, v)
            };
            128.0 + (0..64).map(term).sum::<f64>()
        };
        (0..64).map(|i| pixel(i / 8, i % 8)).collect()
    }

    #[test]
    fn blocks_are_transformed_as_defined() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        for round in 0..200 {
            let corner = [8, 4, 1][round % 3];
            let mut block = [0f32; 64];
            for i in (0..64).filter(|i| i / 8 < corner && i % 8 < corner) {
                block[i] = rng.random_range(-60.0f32..60.0).round() * if i == 0 { 16.0 } else { 1.0 };
            }
            let mut found = [0u8; 64];
            match corner {
                8 => inverse::<8>(&block, &mut found, 8),
                4 => inverse::<4>(&block, &mut found, 8),
                _ => inverse_flat(block[0], &mut found, 8),
            }
            for (found, expected) in found.iter().zip(slow(&block)) {
                let error = (f64::from(*found) - expected.clamp(0.0, 255.0)).abs();
                assert!(error < 0.5 + 1e-3, "{found} instead of {expected}");
            }
        }
    }
}
