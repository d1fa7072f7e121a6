//! The committed table of what the kernels take of a GPU.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use super::ptxas::Resources;

/// A kernel, compiled for one architecture.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Place {
    pub(crate) kernel: String,
    /// Compute capability, as the `90` of `sm_90`.
    pub(crate) architecture: u32,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:<44} {:<7}", self.kernel, format!("sm_{}", self.architecture))
    }
}

impl fmt::Display for Resources {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:>3} registers {:>6} shared {:>5} stack", self.registers, self.shared, self.stack)
    }
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Table {
    /// Version of the compiler that the numbers belong to.
    pub(crate) nvcc: String,
    pub(crate) rows: BTreeMap<Place, Resources>,
}

impl Table {
    /// Reads what `Display` writes.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let (mut nvcc, mut rows) = (None, BTreeMap::new());
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let expected = || format!("expected `KERNEL sm_N R registers S shared T stack`, found `{line}`");
            let fields: Vec<&str> = line.split_whitespace().collect();
            match fields[..] {
                ["nvcc", version] => nvcc = Some(version.to_owned()),
                [kernel, architecture, registers, "registers", shared, "shared", stack, "stack"] => {
                    let number = |text: &str| text.parse().map_err(|_| expected());
                    let architecture = number(architecture.strip_prefix("sm_").ok_or_else(expected)?)?;
                    let (registers, shared, stack) = (number(registers)?, number(shared)?, number(stack)?);
                    let place = Place { kernel: kernel.to_owned(), architecture };
                    rows.insert(place, Resources { registers, shared, stack });
                }
                _ => return Err(expected()),
            }
        }
        Ok(Self { nvcc: nvcc.ok_or("expected a line `nvcc VERSION`, found none")?, rows })
    }

    /// What `found` has otherwise, a line for each kernel and architecture.
    pub(crate) fn differences(&self, found: &Self) -> Vec<String> {
        let places: BTreeSet<&Place> = self.rows.keys().chain(found.rows.keys()).collect();
        let difference = |place: &Place| match (self.rows.get(place), found.rows.get(place)) {
            (Some(expected), Some(found)) if expected == found => None,
            (Some(expected), Some(found)) => {
                let numbers = |r: &Resources| [("registers", r.registers), ("shared", r.shared), ("stack", r.stack)];
                let changes = numbers(expected).into_iter().zip(numbers(found)).filter(|(a, b)| a != b);
                let changes = changes.map(|((name, a), (_, b))| format!("{name} {a} → {b}"));
                Some(format!("changed  {place} {}", changes.collect::<Vec<_>>().join(", ")))
            }
            (None, Some(found)) => Some(format!("new      {place} {found}")),
            (expected, None) => expected.map(|expected| format!("missing  {place} {expected}")),
        };
        places.into_iter().filter_map(difference).collect()
    }

    /// For people: a line for each kernel, its registers by architecture.
    pub(crate) fn summary(&self, architectures: &[u32]) -> String {
        let columns: String = architectures.iter().map(|n| format!(" {:>7}", format!("sm_{n}"))).collect();
        let mut summary = format!("{:<44}{columns} {:>8} {:>7}\n", "registers a thread", "shared", "stack");
        let kernels: BTreeSet<&String> = self.rows.keys().map(|place| &place.kernel).collect();
        for kernel in kernels {
            let of = |&architecture: &u32| self.rows.get(&Place { kernel: kernel.clone(), architecture });
            let cells = architectures.iter().map(|n| of(n).map_or("-".to_owned(), |r| r.registers.to_string()));
            let cells: String = cells.map(|cell| format!(" {cell:>7}")).collect();
            let most =
                |number: fn(&Resources) -> u32| architectures.iter().filter_map(of).map(number).max().unwrap_or(0);
            let (shared, stack) = (most(|r| r.shared), most(|r| r.stack));
            summary += &format!("{kernel:<44}{cells} {shared:>8} {stack:>7}\n");
        }
        summary
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "# What each kernel takes of a GPU: registers of a thread, bytes of static shared memory of a block,"
        )?;
        writeln!(
            f,
            "# bytes of stack of a thread. None spills registers. Written by `cargo xtask kernels-check --bless`."
        )?;
        writeln!(f, "nvcc {}", self.nvcc)?;
        self.rows.iter().try_for_each(|(place, resources)| writeln!(f, "{place} {resources}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(rows: &[(&str, u32, u32)]) -> Table {
        let rows = rows.iter().map(|&(kernel, architecture, registers)| {
            let place = Place { kernel: kernel.to_owned(), architecture };
            (place, Resources { registers, shared: 128, stack: 0 })
        });
        Table { nvcc: "13.0.88".to_owned(), rows: rows.collect() }
    }

    #[test]
    fn what_is_written_is_read() {
        let table = table(&[("gelu_f32", 80, 30), ("gelu_f32", 100, 28), ("norm_f16", 80, 255)]);
        let text = table.to_string();
        assert_eq!(Table::parse(&text), Ok(table));
        let kernels: Vec<&str> = text.lines().skip(3).collect();
        assert!(kernels[0].contains("sm_80") && kernels[1].contains("sm_100"), "by number: {kernels:?}");
        for wrong in [text.replace("30 registers", "many registers"), text.replace("nvcc 13", "<<<<<<< 13")] {
            assert!(Table::parse(&wrong).unwrap_err().contains("found `"), "{wrong}");
        }
    }

    #[test]
    fn differences_are_named() {
        let pinned = table(&[("a", 80, 30), ("a", 90, 30), ("b", 80, 8)]);
        assert!(pinned.differences(&pinned).is_empty());
        let differences = pinned.differences(&table(&[("a", 80, 30), ("a", 90, 41), ("c", 80, 8)]));
        let words: Vec<Vec<&str>> = differences.iter().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(words[0], ["changed", "a", "sm_90", "registers", "30", "→", "41"]);
        assert_eq!(words[1][..3], ["missing", "b", "sm_80"]);
        assert_eq!(words[2][..3], ["new", "c", "sm_80"]);
        assert_eq!(words.len(), 3);
    }

    #[test]
    fn the_summary_has_a_line_for_each_kernel() {
        let summary = table(&[("a", 80, 30), ("a", 90, 31), ("b", 80, 8)]).summary(&[80, 90]);
        let lines: Vec<Vec<&str>> = summary.lines().skip(1).map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(lines, [["a", "30", "31", "128", "0"], ["b", "8", "-", "128", "0"]]);
    }
}
