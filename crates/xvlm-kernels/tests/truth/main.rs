//! Every operation, in every float type and on every device there is, against plain loops in `f64`; its gradients against
//! finite differences of those loops; and its bits from run to run.
//!
//! `--features emulation` adds the CUDA kernels on the host, `--features cuda` those on the first GPU.

mod activation;
mod attention;
mod boxes;
mod check;
mod cross_entropy;
mod device;
mod dropout;
mod embedding;
mod linear;
mod norm;
mod optim;
mod patches;
mod pool;
mod resize;
mod softmax;
mod window;
