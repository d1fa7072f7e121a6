//! The kernels on NVIDIA GPUs, through cudarc.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use candle_core::cuda_backend::cudarc::driver::sys::CUfunction_attribute;
use candle_core::cuda_backend::cudarc::driver::{
    CudaFunction, CudaModule, CudaStream, DevicePtr, DevicePtrMut, LaunchConfig, PushKernelArg, SyncOnDrop,
};
use candle_core::cuda_backend::cudarc::nvrtc::Ptx;
use candle_core::cuda_backend::{CudaStorageSlice, DeviceId, WrapErr};
use candle_core::{CudaDevice, CudaStorage, DType, Result, Storage, bail};
use half::{bf16, f16};

use super::{Arg, Grid, offset};

// `BINARIES: &[(&str, &[u8])]`: the files of `cuda/` by name, as nvcc compiled them.
include!(concat!(env!("OUT_DIR"), "/binaries.rs"));

type Modules = HashMap<(DeviceId, &'static str), Arc<CudaModule>>;

fn module(device: &CudaDevice, file: &'static str) -> Result<Arc<CudaModule>> {
    static LOADED: LazyLock<Mutex<Modules>> = LazyLock::new(Mutex::default);
    let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(module) = loaded.get(&(device.id(), file)) {
        return Ok(module.clone());
    }
    let Some((_, binary)) = BINARIES.iter().find(|(name, _)| *name == file) else { bail!("no kernels `{file}`") };
    let module = device.cuda_stream().context().load_module(Ptx::from_binary(binary.to_vec())).w()?;
    loaded.insert((device.id(), file), module.clone());
    Ok(module)
}

pub(super) fn allocate(device: &CudaDevice, dtype: DType, len: usize) -> Result<CudaStorage> {
    // The driver has no memory of length 0.
    let len = len.max(1);
    // SAFETY: the memory is handed to a kernel that writes it before anything reads it.
    let slice = unsafe {
        match dtype {
            DType::F64 => CudaStorageSlice::F64(device.alloc::<f64>(len)?),
            DType::F32 => CudaStorageSlice::F32(device.alloc::<f32>(len)?),
            DType::BF16 => CudaStorageSlice::BF16(device.alloc::<bf16>(len)?),
            DType::F16 => CudaStorageSlice::F16(device.alloc::<f16>(len)?),
            DType::U32 => CudaStorageSlice::U32(device.alloc::<u32>(len)?),
            _ => bail!("kernels write no {dtype:?}"),
        }
    };
    Ok(CudaStorage { slice, device: device.clone() })
}

/// The address of an element, for a kernel that finds it in a table.
pub(super) fn listed(storage: &Storage, offset: usize) -> Result<u64> {
    let Storage::Cuda(near) = storage else { bail!("a kernel needs all its tensors on one GPU") };
    let stream = near.device.cuda_stream();
    Ok(address(storage, offset, &stream)?.0)
}

/// The address of a number of `f32` memory that a kernel is to write and finds in a table.
pub(super) fn listed_mut(storage: &mut CudaStorage, offset: usize) -> Result<u64> {
    let stream = storage.device.cuda_stream();
    let CudaStorageSlice::F32(slice) = &mut storage.slice else { bail!("kernels change variables of f32 only") };
    let (start, _order) = slice.device_ptr_mut(&stream);
    Ok(start + (offset * size_of::<f32>()) as u64)
}

/// The address of an element, and what keeps it in order with other streams until it is dropped.
fn address<'a>(storage: &'a Storage, offset: usize, stream: &'a CudaStream) -> Result<(u64, SyncOnDrop<'a>)> {
    let Storage::Cuda(storage) = storage else { bail!("a kernel needs all its tensors on one GPU") };
    let ((start, sync), bytes) = match &storage.slice {
        CudaStorageSlice::F64(slice) => (slice.device_ptr(stream), 8),
        CudaStorageSlice::F32(slice) => (slice.device_ptr(stream), 4),
        CudaStorageSlice::BF16(slice) => (slice.device_ptr(stream), 2),
        CudaStorageSlice::F16(slice) => (slice.device_ptr(stream), 2),
        CudaStorageSlice::U32(slice) => (slice.device_ptr(stream), 4),
        CudaStorageSlice::I64(slice) => (slice.device_ptr(stream), 8),
        _ => bail!("kernels read no such type"),
    };
    Ok((start + (offset * bytes) as u64, sync))
}

/// The address of memory that is written.
fn address_mut<'a>(storage: &'a mut Storage, stream: &'a CudaStream) -> Result<(u64, SyncOnDrop<'a>)> {
    let Storage::Cuda(storage) = storage else { bail!("a kernel needs all its tensors on one GPU") };
    Ok(match &mut storage.slice {
        CudaStorageSlice::F64(slice) => slice.device_ptr_mut(stream),
        CudaStorageSlice::F32(slice) => slice.device_ptr_mut(stream),
        CudaStorageSlice::BF16(slice) => slice.device_ptr_mut(stream),
        CudaStorageSlice::F16(slice) => slice.device_ptr_mut(stream),
        CudaStorageSlice::U32(slice) => slice.device_ptr_mut(stream),
        _ => bail!("kernels write no such type"),
    })
}

/// Lets a kernel have so much dynamic shared memory, if that is more than every kernel may have.
fn allow(device: &CudaDevice, name: &str, function: &CudaFunction, shared: usize) -> Result<()> {
    /// 48 KiB, less what a kernel has of fixed size.
    const ALL_MAY_HAVE: usize = 46 * 1024;
    static ALLOWED: LazyLock<Mutex<HashMap<(DeviceId, String), usize>>> = LazyLock::new(Mutex::default);
    if shared <= ALL_MAY_HAVE {
        return Ok(());
    }
    let mut allowed = ALLOWED.lock().unwrap_or_else(PoisonError::into_inner);
    let allowed = allowed.entry((device.id(), name.to_owned())).or_default();
    // Never less than before: another thread may be about to launch with that.
    if shared > *allowed {
        let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        function.set_attribute(attribute, shared as i32).w()?;
        *allowed = shared;
    }
    Ok(())
}

pub(super) fn launch(
    device: &CudaDevice,
    file: &'static str,
    name: &str,
    grid: Grid,
    arguments: &mut [Arg],
) -> Result<()> {
    let function = module(device, file)?.load_function(name).w()?;
    allow(device, name, &function, grid.shared)?;
    let stream = device.cuda_stream();
    let guards: Vec<_> =
        arguments.iter().map(|a| if let Arg::In(t) = a { Some(t.storage_and_layout().0) } else { None }).collect();
    let (mut values, mut order) = (Vec::with_capacity(arguments.len()), Vec::new());
    for (argument, guard) in arguments.iter_mut().zip(&guards) {
        let mut pointer = |(address, sync)| {
            order.push(sync);
            Value::Long(address)
        };
        values.push(match (argument, guard) {
            (Arg::In(tensor), Some(storage)) => pointer(address(storage, offset(tensor)?, &stream)?),
            (Arg::Made(buffer), _) => pointer(address(&buffer.storage, 0, &stream)?),
            (Arg::Out(buffer), _) => pointer(address_mut(&mut buffer.storage, &stream)?),
            (Arg::U32(value), _) => Value::Int(*value),
            (Arg::F32(value), _) => Value::Float(*value),
            (Arg::Absent | Arg::In(_), _) => Value::Long(0),
        });
    }
    let mut builder = stream.launch_builder(&function);
    for value in &values {
        match value {
            Value::Long(value) => builder.arg(value),
            Value::Int(value) => builder.arg(value),
            Value::Float(value) => builder.arg(value),
        };
    }
    let [x, y, z] = grid.blocks.map(|n| n as u32);
    let shared_mem_bytes = grid.shared as u32;
    // SAFETY: the arguments are in the order and of the types of the kernel's parameters (every launch is run by the
    // emulated tests), and the kernel stays inside the memory they point to.
    unsafe { builder.launch(LaunchConfig { grid_dim: (x, y, z), block_dim: (grid.threads, 1, 1), shared_mem_bytes }) }
        .w()?;
    Ok(())
}

enum Value {
    Long(u64),
    Int(u32),
    Float(f32),
}
