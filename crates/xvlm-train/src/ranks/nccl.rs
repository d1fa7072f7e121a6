//! Ranks over NCCL.

use std::sync::Arc;

use candle_core::cuda_backend::CudaDType;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaStream, DeviceRepr, ValidAsZeroBits};
use candle_core::cuda_backend::cudarc::nccl::{Comm, Id, NcclType, ReduceOp};
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, CudaStorage, DType, Device, Storage, Tensor};

use super::owner::Owner;
use super::rendezvous::meet;
use super::{Communicator, Launch};
use crate::error::{BoxError, TrainError};

/// The processes that `torchrun`, `srun` or `mpirun` started, each with a GPU of its own.
///
/// They find together over TCP as [`Launch`] says, or over MPI where it says nothing (feature `mpi`). A thread
/// of its own makes all calls into NCCL, on a stream of its own: that waits, by an event, for what the tensor is computed
/// from, and the thread waits for the stream. Meanwhile the stream that computes goes on. Tensors of the host are moved to the
/// GPU and back.
pub struct Nccl {
    owner: Owner<Talk>,
    device: CudaDevice,
    rank: usize,
    size: usize,
}

/// What the thread has.
struct Talk {
    comm: Comm,
    /// On which tensors are computed.
    compute: Arc<CudaStream>,
}

/// What all ranks do with their numbers.
#[derive(Clone, Copy)]
enum Operation {
    Sum,
    Join,
    Copy { root: usize },
}

impl Nccl {
    /// Joins the other ranks; waits for them. `device` is this one's GPU.
    ///
    /// # Errors
    /// [`TrainError::Environment`] if it is no GPU, or the environment does not say who takes part; [`TrainError::Ranks`] if
    /// they do not come, or NCCL says so.
    pub fn start(device: &Device) -> Result<Self, TrainError> {
        let Device::Cuda(gpu) = device else {
            let (variable, expected) = ("device".to_owned(), "a GPU, to talk over NCCL");
            return Err(TrainError::Environment { variable, expected, found: format!("{:?}", device.location()) });
        };
        let (rank, size, id) = found()?;
        let (device, compute) = (gpu.clone(), gpu.cuda_stream());
        let join = move || -> Result<Talk, BoxError> {
            let stream = compute.context().new_stream()?;
            let comm = Comm::from_rank(stream, rank, size, Id::uninit(id.map(|byte| byte as _))).map_err(said)?;
            Ok(Talk { comm, compute })
        };
        let owner = Owner::start(join);
        let owner = owner.map_err(|source| TrainError::Ranks { rank, operation: "start of NCCL", source })?;
        Ok(Self { owner, device, rank, size })
    }

    fn run(&self, name: &'static str, tensor: &Tensor, operation: Operation) -> Result<Tensor, TrainError> {
        let run = || -> Result<Tensor, BoxError> {
            let home = tensor.device();
            let here = tensor.to_device(&Device::Cuda(self.device.clone()))?.contiguous()?;
            let dtype = here.dtype();
            let here = if matches!(dtype, DType::BF16 | DType::F16) { here.to_dtype(DType::F32)? } else { here };
            let done = match here.dtype() {
                DType::F32 => self.each::<f32>(here, operation),
                DType::F64 => self.each::<f64>(here, operation),
                DType::U8 => self.each::<u8>(here, operation),
                DType::U32 => self.each::<u32>(here, operation),
                DType::I64 => self.each::<i64>(here, operation),
                other => Err(format!("expected F64, F32, BF16, F16, U8, U32 or I64, found {other:?}").into()),
            };
            Ok(done?.to_dtype(dtype)?.to_device(home)?)
        };
        run().map_err(|source| TrainError::Ranks { rank: self.rank, operation: name, source })
    }

    fn each<T>(&self, tensor: Tensor, operation: Operation) -> Result<Tensor, BoxError>
    where
        T: CudaDType + DeviceRepr + ValidAsZeroBits + NcclType + Send + Sync + 'static,
    {
        let mut shape = tensor.dims().to_vec();
        if let (Operation::Join, Some(rows)) = (operation, shape.first_mut()) {
            *rows *= self.size;
        }
        let count = shape.iter().product();
        // NCCL has no numbers of length 0, nor has the driver.
        if count == 0 {
            return Ok(Tensor::zeros(shape, tensor.dtype(), tensor.device())?);
        }
        // Of the stream that computes, which thus frees it in order with what reads it.
        let into = self.device.alloc_zeros::<T>(count)?;
        let result = self.owner.ask(move |talk| talk.run::<T>(&tensor, into, operation))??;
        let storage = Storage::Cuda(CudaStorage::wrap_cuda_slice(result, self.device.clone()));
        Ok(Tensor::from_storage(storage, shape, BackpropOp::none(), false))
    }
}

impl Talk {
    /// Returns when the numbers are there.
    fn run<T>(&self, from: &Tensor, mut into: CudaSlice<T>, operation: Operation) -> Result<CudaSlice<T>, BoxError>
    where
        T: CudaDType + DeviceRepr + NcclType,
    {
        let stream = self.comm.stream();
        stream.join(&self.compute)?;
        let (storage, layout) = from.storage_and_layout();
        let Storage::Cuda(storage) = &*storage else { return Err("expected a tensor of this rank's GPU".into()) };
        let start = layout.start_offset();
        let numbers = storage.as_cuda_slice::<T>()?.slice(start..start + layout.shape().elem_count());
        match operation {
            Operation::Sum => self.comm.all_reduce(&numbers, &mut into, &ReduceOp::Sum),
            Operation::Join => self.comm.all_gather(&numbers, &mut into),
            Operation::Copy { root } => self.comm.broadcast(Some(&numbers), &mut into, root as i32),
        }
        .map_err(said)?;
        stream.synchronize()?;
        Ok(into)
    }
}

/// This rank, how many there are, and the name of their group, which rank 0 makes.
fn found() -> Result<(usize, usize, [u8; 128]), TrainError> {
    let make = || -> Result<[u8; 128], BoxError> { Ok(Id::new().map_err(said)?.internal().map(|byte| byte as u8)) };
    match Launch::find()? {
        Some(launch) => Ok((launch.rank, launch.size, meet(&launch, Launch::PATIENCE, make)?)),
        #[cfg(feature = "mpi")]
        None => {
            let mpi = super::Mpi::start()?;
            let rank = mpi.rank();
            let failed = || TrainError::tensor("name of the group");
            let none = |source: BoxError| TrainError::Ranks { rank, operation: "start of NCCL", source };
            let made = if rank == 0 { make() } else { Ok([0; 128]) };
            // Where rank 0 has none, the others are told: a name of no bytes.
            let len = Tensor::new(&[made.as_ref().map_or(0, |id| id.len() as i64)], &Device::Cpu).map_err(failed())?;
            let len = mpi.broadcast(&len, 0)?.to_vec1::<i64>().map_err(failed())?;
            let id = made.map_err(none)?;
            if len != [id.len() as i64] {
                return Err(none("expected a name of the group from rank 0, found none".into()));
            }
            let id = Tensor::from_slice(&id, id.len(), &Device::Cpu).map_err(failed())?;
            let id = mpi.broadcast(&id, 0)?.to_vec1::<u8>().map_err(failed())?;
            Ok((rank, mpi.size(), std::array::from_fn(|i| id[i])))
        }
        #[cfg(not(feature = "mpi"))]
        None => {
            let (variable, expected) = ("RANK".to_owned(), "the number of this process, as torchrun and srun set it");
            Err(TrainError::Environment { variable, expected, found: "none".to_owned() })
        }
    }
}

/// NCCL's errors are only of use to programmers.
fn said(error: impl std::fmt::Debug) -> BoxError {
    format!("NCCL: {error:?}").into()
}

impl Communicator for Nccl {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn all_reduce(&self, tensor: &Tensor) -> Result<Tensor, TrainError> {
        self.run("all-reduce", tensor, Operation::Sum)
    }

    fn all_gather(&self, tensor: &Tensor) -> Result<Tensor, TrainError> {
        self.run("all-gather", tensor, Operation::Join)
    }

    fn broadcast(&self, tensor: &Tensor, root: usize) -> Result<Tensor, TrainError> {
        self.run("broadcast", tensor, Operation::Copy { root })
    }

    fn barrier(&self) -> Result<(), TrainError> {
        super::sum(self, [1.0]).map(drop)
    }

    /// Ends this process; `torchrun`, `srun` and `mpirun` end the others.
    fn abort(&self, code: i32) -> ! {
        std::process::exit(code)
    }
}
