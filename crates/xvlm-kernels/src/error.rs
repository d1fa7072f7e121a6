use thiserror::Error;

/// What is wrong with the arguments of an operation.
#[derive(Debug, Error)]
pub enum KernelError {
    /// A tensor has another shape than the operation needs.
    #[error("{op}: `{argument}` should have shape {expected}, found {found:?}")]
    Shape {
        /// The operation that was called.
        op: &'static str,
        /// The argument at fault.
        argument: &'static str,
        /// The shape it needs, in words or letters.
        expected: String,
        /// The shape it has.
        found: Vec<usize>,
    },
    /// A value lies outside what the operation is defined for.
    #[error("{op}: `{argument}` should be {expected}, found {found}")]
    Value {
        /// The operation that was called.
        op: &'static str,
        /// The argument at fault.
        argument: &'static str,
        /// What it should be.
        expected: String,
        /// What it is.
        found: String,
    },
    /// A file of numbers was written to while it was open.
    #[error(
        "{file}: expected a file that stays as it is while a model has it open, found that it was written to meanwhile"
    )]
    Changed {
        /// The file.
        file: String,
    },
}

impl From<KernelError> for candle_core::Error {
    fn from(error: KernelError) -> Self {
        candle_core::Error::wrap(error)
    }
}

/// Fails with [`KernelError::Shape`] unless `tensor` has exactly the dimensions `expected`.
pub(crate) fn check_shape(
    op: &'static str,
    argument: &'static str,
    tensor: &candle_core::Tensor,
    expected: &[usize],
) -> candle_core::Result<()> {
    if tensor.dims() == expected {
        return Ok(());
    }
    Err(KernelError::Shape { op, argument, expected: format!("{expected:?}"), found: tensor.dims().to_vec() }.into())
}
