use candle_core::{Result, Tensor};

/// Rows of a table: `table [V, C]`, `ids [..]` (u32) → `[.., C]`. Gradients are added up in the order of `ids`.
///
/// # Errors
/// If an id is not below `V`.
pub fn embedding(table: &Tensor, ids: &Tensor) -> Result<Tensor> {
    let mut shape = ids.dims().to_vec();
    shape.push(table.dim(1)?);
    table.index_select(&ids.flatten_all()?, 0)?.reshape(shape)
}
