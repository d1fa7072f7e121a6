//! Ranks over MPI.

use candle_core::{DType, Tensor, WithDType};
use mpi::Threading;
use mpi::collective::SystemOperation;
use mpi::environment::Universe;
use mpi::topology::SimpleCommunicator;
use mpi::traits::{Communicator as _, CommunicatorCollectives as _, Equivalence, Root as _};

use super::owner::Owner;
use super::{Communicator, launch};
use crate::error::{BoxError, TrainError};

/// The processes that `mpirun` or `srun` started; one, if this was started without.
///
/// A thread of its own initialises MPI, makes all calls, and finalises it (`MPI_THREAD_FUNNELED`). Errors inside MPI end all
/// processes, as is its default. Tensors of GPUs go through the memory of the host.
pub struct Mpi {
    owner: Owner<Universe>,
    rank: usize,
    size: usize,
}

impl Mpi {
    /// Initialises MPI, which a process can do once.
    ///
    /// # Errors
    /// [`TrainError::Ranks`] if it was initialised before, or cannot be called from a thread; [`TrainError::Environment`] if
    /// several processes were started, of which it sees one: `torchrun` starts none that know each other over MPI.
    pub fn start() -> Result<Self, TrainError> {
        let initialise = || match mpi::initialize_with_threading(Threading::Funneled) {
            Some((universe, Threading::Funneled | Threading::Serialized | Threading::Multiple)) => Ok(universe),
            Some((_, found)) => Err(format!("expected MPI to allow Funneled threads, found {found:?}").into()),
            None => Err("expected MPI not to be initialised before, found it initialised".into()),
        };
        let find = |universe: &Universe| (universe.world().rank() as usize, universe.world().size() as usize);
        let start = || -> Result<Self, BoxError> {
            let owner = Owner::start(initialise)?;
            let (rank, size) = owner.ask(find)?;
            Ok(Self { owner, rank, size })
        };
        let mpi = start().map_err(|source| TrainError::Ranks { rank: 0, operation: "start of MPI", source })?;
        match launch::ranks()? {
            started if mpi.size == 1 && started > 1 => Err(TrainError::Environment {
                variable: "MPI".to_owned(),
                expected: "all the processes that were started together",
                found: format!("1 of {started}"),
            }),
            _ => Ok(mpi),
        }
    }

    /// Does the work with the numbers of a tensor, and makes a tensor of the result: of the same size, or of as many rows from
    /// every rank.
    fn each<T: WithDType + Equivalence, W: Work>(&self, tensor: &Tensor, work: W) -> Result<Tensor, BoxError> {
        let mut shape = tensor.dims().to_vec();
        if let (true, Some(rows)) = (W::JOINS, shape.first_mut()) {
            *rows *= self.size;
        }
        // MPI counts in C's int.
        let count: usize = shape.iter().product();
        if count > i32::MAX as usize {
            return Err(format!("expected fewer than 2³¹ numbers in all, found {count}").into());
        }
        let numbers = tensor.flatten_all()?.to_vec1::<T>()?;
        let numbers = self.owner.ask(move |universe| work.run(&universe.world(), numbers))?;
        Ok(Tensor::from_vec(numbers, shape, tensor.device())?)
    }

    /// [`Self::each`] for the tensor's type: `f32` stands for the types of two bytes.
    fn run(&self, operation: &'static str, tensor: &Tensor, work: impl Work) -> Result<Tensor, TrainError> {
        let run = || match tensor.dtype() {
            DType::F32 => self.each::<f32, _>(tensor, work),
            DType::F64 => self.each::<f64, _>(tensor, work),
            DType::U8 => self.each::<u8, _>(tensor, work),
            DType::U32 => self.each::<u32, _>(tensor, work),
            DType::I64 => self.each::<i64, _>(tensor, work),
            narrow @ (DType::BF16 | DType::F16) => {
                let wide = tensor.to_dtype(DType::F32)?;
                let wide = self.each::<f32, _>(&wide, work)?;
                Ok(wide.to_dtype(narrow)?)
            }
            other => Err(format!("expected F64, F32, BF16, F16, U8, U32 or I64, found {other:?}").into()),
        };
        run().map_err(|source| TrainError::Ranks { rank: self.rank, operation, source })
    }
}

/// One collective operation, on numbers of any type.
trait Work: Send + 'static {
    /// Whether the result has the numbers of every rank.
    const JOINS: bool = false;

    fn run<T: WithDType + Equivalence>(self, world: &SimpleCommunicator, numbers: Vec<T>) -> Vec<T>;
}

struct Sum;
struct Join;
struct Copy {
    root: usize,
}

impl Work for Sum {
    fn run<T: WithDType + Equivalence>(self, world: &SimpleCommunicator, numbers: Vec<T>) -> Vec<T> {
        let mut sum = vec![T::zero(); numbers.len()];
        world.all_reduce_into(&numbers[..], &mut sum[..], SystemOperation::sum());
        sum
    }
}

impl Work for Join {
    const JOINS: bool = true;

    fn run<T: WithDType + Equivalence>(self, world: &SimpleCommunicator, numbers: Vec<T>) -> Vec<T> {
        let mut all = vec![T::zero(); numbers.len() * world.size() as usize];
        world.all_gather_into(&numbers[..], &mut all[..]);
        all
    }
}

impl Work for Copy {
    fn run<T: WithDType + Equivalence>(self, world: &SimpleCommunicator, mut numbers: Vec<T>) -> Vec<T> {
        world.process_at_rank(self.root as i32).broadcast_into(&mut numbers[..]);
        numbers
    }
}

impl Communicator for Mpi {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn all_reduce(&self, tensor: &Tensor) -> Result<Tensor, TrainError> {
        self.run("all-reduce", tensor, Sum)
    }

    fn all_gather(&self, tensor: &Tensor) -> Result<Tensor, TrainError> {
        self.run("all-gather", tensor, Join)
    }

    fn broadcast(&self, tensor: &Tensor, root: usize) -> Result<Tensor, TrainError> {
        self.run("broadcast", tensor, Copy { root })
    }

    fn barrier(&self) -> Result<(), TrainError> {
        let wait = self.owner.ask(|universe| universe.world().barrier());
        wait.map_err(|source| TrainError::Ranks { rank: self.rank, operation: "barrier", source })
    }

    fn abort(&self, code: i32) -> ! {
        self.owner.end(code, move |universe| universe.world().abort(code))
    }
}
