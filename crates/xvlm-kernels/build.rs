//! Compiles the kernels of `cuda/`: with nvcc for GPUs (feature `cuda`), as C++ for the host (feature `emulation`).

use std::env;
use std::error::Error;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

mod nvcc;

type Done = Result<(), Box<dyn Error>>;

fn main() -> Done {
    println!("cargo::rustc-check-cfg=cfg(gpu)");
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=cuda");
    let enabled = |feature: &str| env::var_os(format!("CARGO_FEATURE_{feature}")).is_some();
    if enabled("CUDA") || enabled("EMULATION") {
        println!("cargo::rustc-cfg=gpu");
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?);
    if enabled("CUDA") {
        compile_for_gpus(&out)?;
    }
    #[cfg(feature = "emulation")]
    compile_for_host(&out)?;
    Ok(())
}

/// The kernels' files, without their folder and extension.
fn kernels() -> Result<Vec<String>, Box<dyn Error>> {
    let mut names = Vec::new();
    for entry in fs::read_dir("cuda")? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "cu") {
            names.extend(path.file_stem().and_then(|stem| stem.to_str()).map(str::to_owned));
        }
    }
    names.sort();
    Ok(names)
}

/// One fat binary a file: machine code for one architecture and PTX that the driver translates for newer ones.
fn compile_for_gpus(out: &Path) -> Done {
    println!("cargo::rerun-if-env-changed=CUDA_COMPUTE_CAP");
    let targets = match env::var("CUDA_COMPUTE_CAP") {
        Ok(cap) => {
            let cap = cap.replace('.', "");
            vec![format!("arch=compute_{cap},code=[sm_{cap},compute_{cap}]")]
        }
        Err(_) => ["arch=compute_80,code=compute_80", "arch=compute_90,code=sm_90"].map(str::to_owned).to_vec(),
    };
    println!("cargo::rerun-if-changed=nvcc.rs");
    for variable in nvcc::VARIABLES {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    let nvcc = nvcc::find()?;
    let mut table = String::from("static BINARIES: &[(&str, &[u8])] = &[\n");
    let names = kernels()?;
    let at_once = env::var("NUM_JOBS").ok().and_then(|jobs| jobs.parse().ok()).unwrap_or(1usize).max(1);
    for names in names.chunks(at_once) {
        let mut running: Vec<(&str, Child)> = Vec::new();
        for name in names {
            let binary = out.join(name).with_extension("fatbin");
            writeln!(table, "    ({name:?}, include_bytes!({:?})),", binary.display().to_string())?;
            let mut command = Command::new(&nvcc);
            command.arg("--fatbin").args(nvcc::FLAGS).arg("-o").arg(&binary).arg(format!("cuda/{name}.cu"));
            for target in &targets {
                command.args(["-gencode", target]);
            }
            let child = command.spawn().map_err(|error| format!("{}: {error}", nvcc.display()))?;
            running.push((name, child));
        }
        for (name, mut child) in running {
            let status = child.wait()?;
            if !status.success() {
                return Err(format!("nvcc failed on cuda/{name}.cu for {targets:?}: {status}").into());
            }
        }
    }
    table.push_str("];\n");
    fs::write(out.join("binaries.rs"), table)?;
    Ok(())
}

/// All kernels in one object, with the shim that runs them.
#[cfg(feature = "emulation")]
fn compile_for_host(out: &Path) -> Done {
    let mut includes = String::new();
    for name in kernels()? {
        // Each in a namespace of its own: the files share the names of their constants.
        writeln!(includes, "namespace {name} {{\n#include \"{name}.cu\"\n}}\n#undef DEFINE")?;
    }
    fs::write(out.join("kernels.inc"), includes)?;
    cc::Build::new()
        .cpp(true)
        .std("c++20")
        .opt_level(2)
        .define("XVLM_HOST", None)
        .include("cuda")
        .include("cuda/host")
        .include(out)
        .warnings(true)
        .flag_if_supported("-Wno-unknown-pragmas")
        .file("cuda/host/shim.cpp")
        .try_compile("xvlm_emulated")?;
    Ok(())
}
