//! Which processes work together.

use std::sync::Arc;

use clap::{Args, ValueEnum};
use xvlm::train::ranks::{self, Alone, Communicator, Engine};

use crate::DeviceArgs;
use crate::output::{self, CliError};

/// What several processes work together with.
#[derive(Args)]
pub(crate) struct RanksArgs {
    /// What several processes talk through, once mpirun, torchrun or srun has started them
    #[arg(long, value_name = "ENGINE", value_enum, default_value_t = Ranks::Auto)]
    ranks: Ranks,
}

/// What processes talk through.
#[derive(Clone, Copy, ValueEnum)]
enum Ranks {
    /// NCCL between GPUs, MPI between CPUs, nothing if there is one process
    Auto,
    /// Nothing: one process
    Alone,
    /// MPI
    Mpi,
    /// NCCL; each process has a GPU
    Nccl,
}

impl RanksArgs {
    /// Joins the processes that were started together.
    pub(crate) fn connect(&self, device: &DeviceArgs) -> Result<Arc<dyn Communicator>, CliError> {
        let device = device.open_for_rank()?;
        let engine = match self.ranks {
            Ranks::Auto => Engine::find(device.is_cuda())?,
            Ranks::Alone => Engine::Alone,
            Ranks::Mpi => Engine::Mpi,
            Ranks::Nccl => Engine::Nccl,
        };
        Ok(ranks::connect(engine, &device)?)
    }

    /// The same for what processes cannot share, which each of them does alone unless `--ranks` says otherwise.
    pub(crate) fn connect_if_told(&self, device: &DeviceArgs) -> Result<Arc<dyn Communicator>, CliError> {
        match self.ranks {
            Ranks::Auto => Ok(Arc::new(Alone)),
            Ranks::Alone | Ranks::Mpi | Ranks::Nccl => self.connect(device),
        }
    }
}

/// Ends all processes where one has failed: the others wait for it.
pub(crate) fn or_abort<T>(ranks: &dyn Communicator, ended: Result<T, CliError>) -> Result<T, CliError> {
    match ended {
        Err(error) if ranks.size() > 1 => {
            output::say(&format!("error on rank {} of {}: {error}", ranks.rank(), ranks.size()));
            ranks.abort(1)
        }
        ended => ended,
    }
}
