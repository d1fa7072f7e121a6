//! What the program that started this process says about the others.

use std::time::Duration;

use crate::error::TrainError;

/// What ranks talk through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// Nothing: one process.
    Alone,
    /// MPI, between processes that compute on CPUs (feature `mpi`).
    Mpi,
    /// NCCL, between GPUs, each with a process (feature `nccl`).
    Nccl,
}

impl Engine {
    /// The engine for this environment: NCCL between GPUs, MPI between CPUs, none where this process was started on its own.
    ///
    /// # Errors
    /// [`TrainError::Environment`] if several processes were started, and this build does not have the engine: each would take
    /// itself for the only one.
    pub fn find(on_gpu: bool) -> Result<Self, TrainError> {
        Self::find_in(&from_process, on_gpu)
    }

    fn find_in(get: Get, on_gpu: bool) -> Result<Self, TrainError> {
        let engine = match (ranks_in(get)?, on_gpu) {
            (0 | 1, _) => return Ok(Self::Alone),
            (_, true) => Self::Nccl,
            (_, false) => Self::Mpi,
        };
        if engine.is_built() { Ok(engine) } else { Err(lacks(engine)) }
    }

    fn is_built(self) -> bool {
        match self {
            Self::Alone => true,
            Self::Mpi => cfg!(feature = "mpi"),
            Self::Nccl => cfg!(feature = "nccl"),
        }
    }
}

/// The error of a build without an engine.
pub(super) fn lacks(engine: Engine) -> TrainError {
    let expected = match engine {
        Engine::Nccl => "a build with the feature `nccl`, to share work among several GPUs, or `--ranks alone`",
        _ => "a build with the feature `mpi`, to share work among several processes on CPUs, or `--ranks alone`",
    };
    TrainError::Environment { variable: "several ranks".to_owned(), expected, found: "one without".to_owned() }
}

/// This process among those that `torchrun` or `srun` started, and where they meet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launch {
    /// The number of this process: `RANK`, or `SLURM_PROCID`.
    pub rank: usize,
    /// How many there are: `WORLD_SIZE`, or `SLURM_NTASKS`.
    pub size: usize,
    /// The number of this process on its machine: `LOCAL_RANK`, or `SLURM_LOCALID`.
    pub local_rank: usize,
    /// Where rank 0 waits for the others: `MASTER_ADDR` (under Slurm, `SLURM_LAUNCH_NODE_IPADDR` if that is not set).
    pub host: String,
    /// And the port: `XVLM_PORT`; or `MASTER_PORT`, but the one after it if `torchrun` itself listens there
    /// (`TORCHELASTIC_USE_AGENT_STORE`); or PyTorch's 29500.
    pub port: u16,
}

/// The value of an environment variable, if it is set.
type Get<'a> = &'a dyn Fn(&str) -> Option<String>;

fn from_process(name: &str) -> Option<String> {
    std::env::var_os(name).map(|value| value.to_string_lossy().into_owned())
}

impl Launch {
    /// How long rank 0 waits for the others, and they for it: as PyTorch's `TCPStore`.
    pub const PATIENCE: Duration = Duration::from_secs(300);

    /// From the environment of this process; `None` if it was not started by `torchrun`, `srun` or the like.
    ///
    /// # Errors
    /// [`TrainError::Environment`] naming a variable that is missing or makes no sense.
    pub fn find() -> Result<Option<Self>, TrainError> {
        Self::find_in(&from_process)
    }

    fn find_in(get: Get) -> Result<Option<Self>, TrainError> {
        let (by, [rank, size, local]) = if get("RANK").or_else(|| get("WORLD_SIZE")).is_some() {
            ("MASTER_ADDR", ["RANK", "WORLD_SIZE", "LOCAL_RANK"])
        } else if by_slurm(get) {
            ("SLURM_LAUNCH_NODE_IPADDR", ["SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"])
        } else {
            return Ok(None);
        };
        let launch = Self {
            rank: number(get, rank, "the number of this process")?,
            size: number(get, size, "the number of processes")?,
            local_rank: number(get, local, "the number of this process on its machine")?,
            host: String::new(),
            port: 29500,
        };
        if launch.size == 0 {
            return Err(wrong(size, "at least 1", "0"));
        }
        if launch.rank >= launch.size {
            return Err(wrong(
                rank,
                "a number below that of all processes",
                format!("{} of {}", launch.rank, launch.size),
            ));
        }
        let host = get("MASTER_ADDR").or_else(|| get(by)).filter(|host| !host.is_empty());
        let port = port_in(get)?.unwrap_or(launch.port);
        match host {
            Some(host) => Ok(Some(Self { host, port, ..launch })),
            // Nobody has to be met.
            None if launch.size == 1 => Ok(Some(Self { port, ..launch })),
            None => Err(wrong("MASTER_ADDR", "the address of the machine of rank 0", "none")),
        }
    }
}

/// The port at which ranks meet, if the environment says it.
fn port_in(get: Get) -> Result<Option<u16>, TrainError> {
    let port = |name: &str, expected: &'static str, more: u16| {
        let parse = |port: String| {
            let found = port.trim().parse::<u16>().ok().filter(|port| *port > 0);
            found.and_then(|port| port.checked_add(more)).ok_or_else(|| wrong(name, expected, port))
        };
        get(name).map(parse).transpose()
    };
    if let Some(own) = port("XVLM_PORT", "a port", 0)? {
        return Ok(Some(own));
    }
    // The agent of `torchrun` then has its store at the port, on which nobody else can listen.
    match get("TORCHELASTIC_USE_AGENT_STORE").as_deref() {
        Some("True" | "true" | "1") => port("MASTER_PORT", "a port below 65535: ranks meet at the one after it", 1),
        _ => port("MASTER_PORT", "a port", 0),
    }
}

/// The number of this process on its machine, which says what GPU is its own; `None` if it was started on its own.
///
/// # Errors
/// [`TrainError::Environment`] naming a variable that makes no sense.
pub fn local_rank() -> Result<Option<usize>, TrainError> {
    local_rank_in(&from_process)
}

fn local_rank_in(get: Get) -> Result<Option<usize>, TrainError> {
    let slurm = by_slurm(get).then_some("SLURM_LOCALID");
    let names = [Some("LOCAL_RANK"), Some("OMPI_COMM_WORLD_LOCAL_RANK"), slurm, Some("MPI_LOCALRANKID")];
    let found = names.into_iter().flatten().find(|name| get(name).is_some());
    found.map(|name| number(get, name, "the number of this process on its machine")).transpose()
}

/// How many processes were started together, as far as the environment says: by `torchrun`, Open MPI, Slurm, or MPICH and its
/// like.
#[cfg(feature = "mpi")]
pub(super) fn ranks() -> Result<usize, TrainError> {
    ranks_in(&from_process)
}

fn ranks_in(get: Get) -> Result<usize, TrainError> {
    let slurm = by_slurm(get).then_some("SLURM_NTASKS");
    let names = [Some("WORLD_SIZE"), Some("OMPI_COMM_WORLD_SIZE"), slurm, Some("PMI_SIZE")];
    let found = names.into_iter().flatten().find(|name| get(name).is_some());
    found.map_or(Ok(1), |name| number(get, name, "the number of processes"))
}

/// Whether `srun` started this process. What Open MPI starts inside a job of Slurm has the variables of the job.
fn by_slurm(get: Get) -> bool {
    get("SLURM_PROCID").is_some() && get("OMPI_COMM_WORLD_SIZE").is_none()
}

fn number(get: Get, name: &str, expected: &'static str) -> Result<usize, TrainError> {
    let found = get(name).ok_or_else(|| wrong(name, expected, "none"))?;
    found.trim().parse().map_err(|_| wrong(name, expected, found))
}

fn wrong(variable: &str, expected: &'static str, found: impl Into<String>) -> TrainError {
    TrainError::Environment { variable: variable.to_owned(), expected, found: found.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What `find` makes of an environment.
    fn of<R>(find: impl FnOnce(Get) -> Result<R, TrainError>, set: &[(&str, &str)]) -> Result<R, String> {
        let get = |name: &str| set.iter().find(|(set, _)| *set == name).map(|(_, value)| (*value).to_owned());
        find(&get).map_err(|error| error.to_string())
    }

    const TORCHRUN: [(&str, &str); 5] =
        [("RANK", "9"), ("WORLD_SIZE", "16"), ("LOCAL_RANK", "1"), ("MASTER_ADDR", "node0"), ("MASTER_PORT", "4000")];
    const SLURM: [(&str, &str); 4] = [
        ("SLURM_PROCID", "3"),
        ("SLURM_NTASKS", "8"),
        ("SLURM_LOCALID", "3"),
        ("SLURM_LAUNCH_NODE_IPADDR", "10.0.0.1"),
    ];

    fn launch(rank: usize, size: usize, local_rank: usize, host: &str, port: u16) -> Launch {
        Launch { rank, size, local_rank, host: host.into(), port }
    }

    #[test]
    fn what_torchrun_sets() {
        assert_eq!(of(Launch::find_in, &TORCHRUN), Ok(Some(launch(9, 16, 1, "node0", 4000))));
        let both = [&TORCHRUN[..], &SLURM].concat();
        assert_eq!(of(Launch::find_in, &both), Ok(Some(launch(9, 16, 1, "node0", 4000))), "torchrun under Slurm");
        assert_eq!(of(local_rank_in, &both), Ok(Some(1)));
    }

    #[test]
    fn the_port_is_not_that_of_torchruns_agent() {
        let port = |more: &[(&str, &str)]| {
            let set = [more, &TORCHRUN].concat();
            of(Launch::find_in, &set).map(|launch| launch.unwrap().port)
        };
        for yes in ["True", "true", "1"] {
            assert_eq!(port(&[("TORCHELASTIC_USE_AGENT_STORE", yes)]), Ok(4001), "{yes}");
        }
        assert_eq!(port(&[("TORCHELASTIC_USE_AGENT_STORE", "False")]), Ok(4000));
        assert_eq!(port(&[("TORCHELASTIC_USE_AGENT_STORE", "True"), ("XVLM_PORT", "5000")]), Ok(5000));
        let error = port(&[("TORCHELASTIC_USE_AGENT_STORE", "True"), ("MASTER_PORT", "65535")]).unwrap_err();
        assert!(error.starts_with("MASTER_PORT: expected a port below 65535"), "{error}");
        assert_eq!(port(&[("XVLM_PORT", "0")]), Err("XVLM_PORT: expected a port, found 0".to_owned()));
    }

    #[test]
    fn what_slurm_sets() {
        assert_eq!(of(Launch::find_in, &SLURM), Ok(Some(launch(3, 8, 3, "10.0.0.1", 29500))));
        assert_eq!((of(ranks_in, &SLURM), of(local_rank_in, &SLURM)), (Ok(8), Ok(Some(3))));
        assert_eq!(of(Launch::find_in, &SLURM[1..]), Ok(None), "in a shell of `salloc`");
        let other = [&SLURM[..], &[("MASTER_ADDR", "node7"), ("MASTER_PORT", "29501")]].concat();
        assert_eq!(of(Launch::find_in, &other), Ok(Some(launch(3, 8, 3, "node7", 29501))));
    }

    #[test]
    fn what_mpirun_sets() {
        let set = [("OMPI_COMM_WORLD_SIZE", "4"), ("OMPI_COMM_WORLD_LOCAL_RANK", "2"), ("OMPI_COMM_WORLD_RANK", "2")];
        assert_eq!(of(Launch::find_in, &set), Ok(None));
        assert_eq!(of(local_rank_in, &set), Ok(Some(2)));
        assert_eq!(of(ranks_in, &set), Ok(4));
        let in_a_job = [&set[..], &SLURM].concat();
        assert_eq!(of(Launch::find_in, &in_a_job), Ok(None), "the job's variables are not this process'");
        assert_eq!((of(ranks_in, &in_a_job), of(local_rank_in, &in_a_job)), (Ok(4), Ok(Some(2))));
    }

    #[test]
    fn a_process_on_its_own() {
        assert_eq!(of(Launch::find_in, &[]), Ok(None));
        assert_eq!(of(local_rank_in, &[]), Ok(None));
        assert_eq!(of(|get| Engine::find_in(get, true), &[]), Ok(Engine::Alone));
        let one = [("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")];
        assert_eq!(of(|get| Engine::find_in(get, true), &one), Ok(Engine::Alone));
    }

    #[test]
    fn several_processes_never_train_apart_unseen() {
        for (on_gpu, engine) in [(false, Engine::Mpi), (true, Engine::Nccl)] {
            let found = of(|get| Engine::find_in(get, on_gpu), &TORCHRUN);
            match engine.is_built() {
                true => assert_eq!(found, Ok(engine)),
                false => assert!(found.unwrap_err().contains("expected a build with the feature")),
            }
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        let without = |name: &str| TORCHRUN.into_iter().filter(|(set, _)| *set != name).collect::<Vec<_>>();
        let with = |name, value| [&without(name)[..], &[(name, value)]].concat();
        for (set, expected) in [
            (without("RANK"), "RANK: expected the number of this process, found none"),
            (without("MASTER_ADDR"), "MASTER_ADDR: expected the address of the machine of rank 0, found none"),
            (with("WORLD_SIZE", "many"), "WORLD_SIZE: expected the number of processes, found many"),
            (with("WORLD_SIZE", "0"), "WORLD_SIZE: expected at least 1, found 0"),
            (with("WORLD_SIZE", "9"), "RANK: expected a number below that of all processes, found 9 of 9"),
            (with("MASTER_PORT", "0"), "MASTER_PORT: expected a port, found 0"),
            (with("MASTER_PORT", "70000"), "MASTER_PORT: expected a port, found 70000"),
        ] {
            assert_eq!(of(Launch::find_in, &set).unwrap_err(), expected);
        }
    }
}
