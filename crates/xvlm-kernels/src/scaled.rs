//! A factor on gradients.

use candle_core::{Result, Tensor};

use crate::graph::{Fresh, differentiable_by_gradient};

/// `x` itself, of which the gradient is multiplied by `factor` on its way back.
///
/// # Errors
/// If there is no memory for a copy of `x`.
pub fn scale_gradient(x: &Tensor, factor: f64) -> Result<Tensor> {
    if factor == 1.0 {
        return Ok(x.clone());
    }
    let own = x.detach().force_contiguous()?;
    let copy = {
        let (storage, layout) = own.storage_and_layout();
        Fresh::new(storage.try_clone(layout)?, own.shape())
    };
    differentiable_by_gradient("scale_gradient", [x], copy, move |gradient| Ok([Some((gradient * factor)?)]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Var};

    #[test]
    fn the_value_stays_and_the_gradient_is_scaled() {
        let x = Var::new(&[[1f64, -2.0, 3.0], [0.5, 0.25, 4.0]], &Device::Cpu).unwrap();
        // Of a view that begins inside, and is not contiguous.
        let view = x.t().unwrap().narrow(0, 1, 2).unwrap();
        let y = scale_gradient(&view, 2.5).unwrap();
        assert_eq!(y.to_vec2::<f64>().unwrap(), [[-2.0, 0.25], [3.0, 4.0]]);
        let gradients = (y.sqr().unwrap().sum_all().unwrap()).backward().unwrap();
        let found = gradients.get(&x).unwrap().to_vec2::<f64>().unwrap();
        assert_eq!(found, [[0.0, -10.0, 15.0], [0.0, 1.25, 20.0]]);
    }
}
