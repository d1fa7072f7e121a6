use candle_core::{Result, Tensor};

/// Rows of a table: `table [V, C]`, `ids [..]` (u32) → `[.., C]`. Gradients are added up in the order of `ids`; the row of
/// the `padding` id, if there is one, gets none (as PyTorch's `padding_idx`).
///
/// # Errors
/// If an id is not below `V`.
pub fn embedding(table: &Tensor, ids: &Tensor, padding: Option<u32>) -> Result<Tensor> {
    let mut shape = ids.dims().to_vec();
    shape.push(table.dim(1)?);
    let rows = ids.flatten_all()?;
    let found = table.index_select(&rows, 0)?;
    let Some(padding) = padding.filter(|_| found.track_op()) else { return found.reshape(shape) };
    let trained = rows.ne(padding)?.unsqueeze(1)?.broadcast_as(found.shape())?;
    trained.where_cond(&found, &found.detach())?.reshape(shape)
}
