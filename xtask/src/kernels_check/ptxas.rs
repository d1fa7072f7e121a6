//! What the assembler of PTX says of the kernels (`nvcc --resource-usage`, that is `ptxas -v`).

/// What a kernel takes of a multiprocessor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Resources {
    /// Registers of a thread.
    pub(crate) registers: u32,
    /// Bytes of shared memory of a block, without those that the launch adds.
    pub(crate) shared: u32,
    /// Bytes of stack of a thread.
    pub(crate) stack: u32,
}

/// Registers that a function moves to memory because it has too few.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Spill {
    pub(crate) function: String,
    /// Bytes a thread.
    pub(crate) stores: u32,
    /// Bytes a thread.
    pub(crate) loads: u32,
}

/// What is said of a file.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Usage {
    pub(crate) kernels: Vec<(String, Resources)>,
    pub(crate) spills: Vec<Spill>,
}

/// Reads the output for one file and one architecture.
pub(crate) fn parse(said: &str) -> Result<Usage, String> {
    let mut usage = Usage::default();
    // The kernel whose registers are still to come, and the function whose memory is.
    let (mut kernel, mut function) = (None::<(String, u32)>, None::<String>);
    for line in said.lines() {
        let line = line.strip_prefix("ptxas info    :").unwrap_or(line).trim();
        if let Some(rest) = line.strip_prefix("Compiling entry function '") {
            if let Some((name, _)) = kernel {
                return Err(format!("found no registers of {name}"));
            }
            kernel = Some((rest.split('\'').next().unwrap_or(rest).to_owned(), 0));
        } else if let Some(name) = line.strip_prefix("Function properties for ") {
            function = Some(name.to_owned());
        } else if line.contains("bytes stack frame") {
            let name = function.take().ok_or_else(|| format!("found no name of the function of `{line}`"))?;
            let [stack, stores, loads] =
                ["bytes stack frame", "bytes spill stores", "bytes spill loads"].map(|unit| amount(line, unit));
            if let Some((_, of_kernel)) = kernel.as_mut().filter(|(kernel, _)| *kernel == name) {
                *of_kernel = stack?;
            }
            let (stores, loads) = (stores?, loads?);
            if stores > 0 || loads > 0 {
                usage.spills.push(Spill { function: name, stores, loads });
            }
        } else if line.starts_with("Used ") {
            let Some((name, stack)) = kernel.take() else { continue };
            // What is not used is not named.
            let shared = amount(line, "bytes smem").unwrap_or(0);
            let registers = amount(line.trim_start_matches("Used "), "registers")?;
            usage.kernels.push((name, Resources { registers, shared, stack }));
        }
    }
    match kernel {
        Some((name, _)) => Err(format!("found no registers of {name}")),
        None if usage.kernels.is_empty() => Err("expected kernels, found none".to_owned()),
        None => Ok(usage),
    }
}

/// The number before `unit` in a list with commas.
fn amount(line: &str, unit: &str) -> Result<u32, String> {
    let part = line.split(',').find_map(|part| part.trim().strip_suffix(unit));
    part.and_then(|number| number.trim().parse().ok()).ok_or_else(|| format!("expected `… {unit}`, found `{line}`"))
}

/// The version in the output of `nvcc --version`: `13.0.88`.
pub(crate) fn version(said: &str) -> Option<String> {
    let line = said.lines().find(|line| line.contains("release"))?;
    let version = line.rsplit(", V").next()?.trim();
    version.starts_with(|first: char| first.is_ascii_digit()).then(|| version.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What nvcc 13.0 says of two kernels, of which the second spills and calls a function that does.
    const SAID: &str = "\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'gelu_f32' for 'sm_80'
ptxas info    : Function properties for gelu_f32
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 30 registers, used 0 barriers, 384 bytes cmem[0]
ptxas info    : Compile time = 12.367 ms
ptxas info    : Compiling entry function 'spilling' for 'sm_90'
ptxas info    : Function properties for spilling
    1512 bytes stack frame, 2224 bytes spill stores, 2484 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 1512 bytes cumulative stack size, 512 bytes smem
ptxas info    : Compile time = 101.351 ms
ptxas info    : Function properties for _Z6helperPf
    0 bytes stack frame, 176 bytes spill stores, 180 bytes spill loads
";

    #[test]
    fn kernels_and_spills() {
        let usage = parse(SAID).unwrap();
        let plain = Resources { registers: 30, shared: 0, stack: 0 };
        let spilling = Resources { registers: 32, shared: 512, stack: 1512 };
        assert_eq!(usage.kernels, [("gelu_f32".to_owned(), plain), ("spilling".to_owned(), spilling)]);
        let spills = [("spilling", 2224, 2484), ("_Z6helperPf", 176, 180)];
        let spills = spills.map(|(name, stores, loads)| Spill { function: name.to_owned(), stores, loads });
        assert_eq!(usage.spills, spills);
    }

    #[test]
    fn output_of_another_form_is_an_error() {
        let missing = SAID.replace("Used 30", "Took 30");
        assert_eq!(parse(&missing).unwrap_err(), "found no registers of gelu_f32");
        let other = SAID.replace("0 bytes spill stores", "no spill stores");
        assert!(parse(&other).unwrap_err().contains("bytes spill stores"));
        assert!(parse("ptxas info    : 0 bytes gmem\n").unwrap_err().contains("expected kernels"));
    }

    #[test]
    fn version_of_the_compiler() {
        let said = "nvcc: NVIDIA (R) Cuda compiler driver\nBuilt on Wed_Aug_20_01:58:59_PM_PDT_2025\n\
                    Cuda compilation tools, release 13.0, V13.0.88\nBuild cuda_13.0.r13.0/compiler.36424714_0\n";
        assert_eq!(version(said).as_deref(), Some("13.0.88"));
        assert_eq!(version("nvcc: not found"), None);
    }
}
