//! The types of numbers that checkpoints hold.

use candle_core::DType;

/// The types that can be read, by the names of safetensors.
pub(crate) const READABLE: &str = "F64, F32, F16, BF16, F8_E4M3, I64, I32, I16, U32, U8 or BOOL";

/// What is known of a type: bytes a number, and the dtype it is read as, if there is one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Numbers {
    pub(super) size: Option<usize>,
    pub(super) dtype: Option<DType>,
}

/// Looks a type up by its name in safetensors, or that of PyTorch's storage class or dtype (`torch.FloatStorage`,
/// `torch.float32`).
pub(super) fn numbers(name: &str) -> Numbers {
    let (size, dtype) = match name.rsplit('.').next().unwrap_or_default() {
        "F64" | "DoubleStorage" | "float64" => (8, Some(DType::F64)),
        "F32" | "FloatStorage" | "float32" => (4, Some(DType::F32)),
        "F16" | "HalfStorage" | "float16" => (2, Some(DType::F16)),
        "BF16" | "BFloat16Storage" | "bfloat16" => (2, Some(DType::BF16)),
        "F8_E4M3" | "float8_e4m3fn" => (1, Some(DType::F8E4M3)),
        "I64" | "LongStorage" | "int64" => (8, Some(DType::I64)),
        "I32" | "IntStorage" | "int32" => (4, Some(DType::I32)),
        "I16" | "ShortStorage" | "int16" => (2, Some(DType::I16)),
        "U32" | "uint32" => (4, Some(DType::U32)),
        "U8" | "ByteStorage" | "uint8" | "BOOL" | "BoolStorage" | "bool" => (1, Some(DType::U8)),
        "C128" | "ComplexDoubleStorage" | "complex128" => (16, None),
        "C64" | "ComplexFloatStorage" | "complex64" => (8, None),
        "U64" | "uint64" => (8, None),
        "U16" | "uint16" => (2, None),
        "I8" | "CharStorage" | "int8" => (1, None),
        "F8_E5M2" | "float8_e5m2" | "F8_E4M3FNUZ" | "float8_e4m3fnuz" | "F8_E5M2FNUZ" | "float8_e5m2fnuz" => (1, None),
        "F8_E8M0" | "float8_e8m0fnu" | "UntypedStorage" | "QInt8Storage" | "QUInt8Storage" => (1, None),
        "QInt32Storage" => (4, None),
        _ => return Numbers::default(),
    };
    Numbers { size: Some(size), dtype }
}

/// What safetensors calls the type of a tensor.
pub(super) fn type_name(dtype: DType) -> String {
    match dtype {
        DType::F8E4M3 => "F8_E4M3".to_owned(),
        dtype => dtype.as_str().to_uppercase(),
    }
}
