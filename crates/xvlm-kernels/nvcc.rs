//! The compiler of the CUDA toolkit, as the build script and `cargo xtask kernels-check` call it.

use std::env;
use std::path::PathBuf;

/// How the kernels are compiled.
pub(crate) const FLAGS: [&str; 2] = ["-std=c++17", "-O3"];

/// The variables of the environment that `find` reads.
#[allow(dead_code, reason = "for the build script")]
pub(crate) const VARIABLES: [&str; 4] = ["NVCC", "CUDA_HOME", "CUDA_PATH", "PATH"];

/// Where it is.
pub(crate) fn find() -> Result<PathBuf, &'static str> {
    if let Some(nvcc) = env::var_os("NVCC") {
        return Ok(nvcc.into());
    }
    let path = env::var_os("PATH").unwrap_or_default();
    let homes = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(env::var_os).map(PathBuf::from);
    let homes = homes.chain([PathBuf::from("/usr/local/cuda")]).map(|home| home.join("bin"));
    let mut places = env::split_paths(&path).chain(homes).map(|folder| folder.join("nvcc"));
    places.find(|nvcc| nvcc.is_file()).ok_or(
        "found no CUDA compiler: no nvcc on PATH, in $CUDA_HOME/bin, in $CUDA_PATH/bin or in /usr/local/cuda/bin. \
         Install the CUDA toolkit, name its compiler in $NVCC, or run `scripts/cuda-toolchain.sh FOLDER` and source \
         FOLDER/env.sh",
    )
}
