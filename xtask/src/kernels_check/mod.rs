//! `cargo xtask kernels-check`: what can be known of the CUDA kernels without a GPU.

mod ptxas;
mod table;

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::thread;

use clap::Args;

use self::ptxas::Usage;
use self::table::{Place, Table};
use crate::{Done, cargo, root};

// The same file that the build script of the kernels uses: what is checked is what is built.
#[path = "../../../crates/xvlm-kernels/nvcc.rs"]
mod nvcc;

/// Check the CUDA kernels without a GPU: registers, spills, and the numbers they compute on the host
///
/// Compiles every file of crates/xvlm-kernels/cuda for Ampere, Hopper and Blackwell, and compares what each kernel takes
/// of a GPU with crates/xvlm-kernels/resources.txt. Then runs the tests of the kernels as C++ on the host. Needs nvcc
/// (`scripts/cuda-toolchain.sh` fetches one) and a C++20 compiler.
#[derive(Args)]
pub(crate) struct KernelsCheck {
    /// Rewrite resources.txt instead of comparing with it, and leave out the tests
    #[arg(long)]
    bless: bool,
}

/// Compute capabilities: A100, H100 and H200, B200.
const ARCHITECTURES: [u32; 3] = [80, 90, 100];

/// The committed table, in the workspace.
const TABLE: &str = "crates/xvlm-kernels/resources.txt";

impl KernelsCheck {
    pub(crate) fn run(self) -> Done {
        let nvcc = nvcc::find()?;
        let version = version(&nvcc)?;
        let found = compile(&nvcc)?;
        let table = Table { nvcc: version, rows: resources(&found)? };
        print!("{}", table.summary(&ARCHITECTURES));
        refuse_spills(&found)?;

        let path = root().join(TABLE);
        if self.bless {
            return bless(&path, &table);
        }
        let text = fs::read_to_string(&path).map_err(|error| format!("{TABLE}: {error}; {BLESS}"))?;
        let pinned = Table::parse(&text).map_err(|error| format!("{TABLE}: {error}; {BLESS}"))?;
        if pinned.nvcc != table.nvcc {
            println!(
                "NOT COMPARED with {TABLE}: its numbers are those of nvcc {}, this is nvcc {}. All kernels compile, and \
                 none spills.",
                pinned.nvcc, table.nvcc
            );
        } else {
            let differences = pinned.differences(&table);
            if !differences.is_empty() {
                let count = differences.len();
                return Err(format!("{count} differences to {TABLE}:\n  {}\n{BLESS}", differences.join("\n  ")).into());
            }
            println!("{} rows are those of {TABLE} (nvcc {})", table.rows.len(), table.nvcc);
        }
        // `--workspace` only for the features of the dependencies: they are then those that other commands have compiled.
        cargo(["test", "--locked", "--workspace", "--features", "xvlm-kernels/emulation", "--test", "truth"])
    }
}

const BLESS: &str = "`cargo xtask kernels-check --bless` writes what was found";

fn bless(path: &Path, table: &Table) -> Done {
    let aside = path.with_extension("txt.new");
    fs::write(&aside, table.to_string())?;
    fs::rename(&aside, path)?;
    println!("wrote {} rows to {TABLE}; the tests of the kernels were left out", table.rows.len());
    Ok(())
}

/// What one file says for one architecture.
struct Compiled {
    file: String,
    architecture: u32,
    usage: Usage,
}

/// Compiles all files for all architectures, as many at once as there are processors.
fn compile(nvcc: &Path) -> Result<Vec<Compiled>, Box<dyn std::error::Error>> {
    let files = kernel_files(&root().join("crates/xvlm-kernels/cuda"))?;
    let jobs = files.iter().flat_map(|file| ARCHITECTURES.map(|architecture| (file, architecture)));
    let jobs = Mutex::new(jobs.collect::<Vec<_>>().into_iter());
    let objects = std::env::temp_dir().join(format!("xvlm-kernels-check-{}", std::process::id()));
    fs::create_dir_all(&objects)?;
    let results = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                let next = || jobs.lock().unwrap_or_else(|broken| broken.into_inner()).next();
                while let Some((file, architecture)) = next() {
                    let result = compile_one(nvcc, file, architecture, &objects);
                    results.lock().unwrap_or_else(|broken| broken.into_inner()).push(result);
                }
            });
        }
    });
    fs::remove_dir_all(&objects)?;
    let results = results.into_inner().unwrap_or_else(|broken| broken.into_inner());
    let (mut compiled, mut complaints) = (Vec::new(), Vec::new());
    for result in results {
        match result {
            Ok(one) => compiled.push(one),
            Err(complaint) => complaints.push(complaint),
        }
    }
    if !complaints.is_empty() {
        complaints.sort();
        return Err(complaints.join("\n").into());
    }
    compiled.sort_by(|a, b| (&a.file, a.architecture).cmp(&(&b.file, b.architecture)));
    Ok(compiled)
}

fn kernel_files(folder: &Path) -> Result<Vec<PathBuf>, Box<dyn std::error::Error>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).map_err(|error| format!("{}: {error}", folder.display()))? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "cu") {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

fn compile_one(nvcc: &Path, file: &Path, architecture: u32, objects: &Path) -> Result<Compiled, String> {
    let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let mut command = Command::new(nvcc);
    command.args(nvcc::FLAGS).args(["--cubin", "--resource-usage", "--Werror", "all-warnings"]);
    command.args(["-gencode", &format!("arch=compute_{architecture},code=sm_{architecture}")]);
    command.arg("-o").arg(objects.join(format!("{name}.{architecture}.cubin"))).arg(file);
    let output = command.output().map_err(|error| format!("{}: {error}", nvcc.display()))?;
    // The sizes come on one of the two, the messages on both.
    let said = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    let named = |problem: String| format!("{name} for sm_{architecture}: {problem}");
    if !output.status.success() {
        return Err(named(format!("nvcc failed ({})\n{said}", output.status)));
    }
    let usage = ptxas::parse(&said).map_err(|problem| named(format!("{problem}\n{said}")))?;
    Ok(Compiled { file: name, architecture, usage })
}

/// The rows of the table. Kernels have names of their own: on the host they are looked up by nothing else.
fn resources(found: &[Compiled]) -> Result<BTreeMap<Place, ptxas::Resources>, String> {
    let (mut rows, mut files) = (BTreeMap::new(), HashMap::new());
    for Compiled { file, architecture, usage } in found {
        for (kernel, resources) in &usage.kernels {
            let other = *files.entry(kernel).or_insert(file);
            if other != file {
                return Err(format!("expected kernels with names of their own, found {kernel} in {other} and {file}"));
            }
            rows.insert(Place { kernel: kernel.clone(), architecture: *architecture }, *resources);
        }
    }
    Ok(rows)
}

fn refuse_spills(found: &[Compiled]) -> Result<(), String> {
    let spills: Vec<String> = found
        .iter()
        .flat_map(|one| one.usage.spills.iter().map(move |spill| (one, spill)))
        .map(|(Compiled { file, architecture, .. }, spill)| {
            let ptxas::Spill { function, stores, loads } = spill;
            format!("{file}: {function} for sm_{architecture} stores {stores} bytes and loads {loads}")
        })
        .collect();
    if spills.is_empty() {
        return Ok(());
    }
    Err(format!("expected no kernel to spill registers into memory, found\n  {}", spills.join("\n  ")))
}

/// The version of the compiler: `13.0.88`.
fn version(nvcc: &Path) -> Result<String, String> {
    let output = Command::new(nvcc).arg("--version").output();
    let output = output.map_err(|error| format!("{}: {error}", nvcc.display()))?;
    let said = String::from_utf8_lossy(&output.stdout);
    let version = ptxas::version(&said);
    version.ok_or_else(|| format!("{} --version: expected a line `… release …, V…`, found\n{said}", nvcc.display()))
}
