//! Every operation, in every float type and on every device there is, against plain loops in `f64`; its gradients against
//! finite differences of those loops; and its bits from run to run.
//!
//! `--features emulation` adds the CUDA kernels on the host, `--features cuda` those on the first GPU.

mod activation;
mod boxes;
mod check;
mod device;
mod optim;
mod pool;
