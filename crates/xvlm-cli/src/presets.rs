//! `xvlm presets`.

use clap::Args;
use serde::Serialize;
use xvlm::tasks::presets::Preset;

use crate::output::{self, CliError};

/// List the configurations that are built in, or print one
///
/// There is one for each of the original's, and those of the built-in model. What is printed is YAML, to be changed and
/// given to `--config`.
#[derive(Args)]
pub(crate) struct Presets {
    /// The configuration to print
    name: Option<String>,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

/// A line of the list.
#[derive(Serialize)]
struct Entry {
    name: &'static str,
    task: &'static str,
    image_res: usize,
    data: &'static str,
    official: Option<&'static str>,
}

impl Entry {
    fn of(preset: &Preset) -> Result<Self, CliError> {
        let Preset { name, purpose, data, official, .. } = *preset;
        Ok(Self { name, task: purpose.name(), image_res: preset.config(&[])?.image_res(), data, official })
    }
}

impl Presets {
    pub(crate) fn run(self) -> Result<(), CliError> {
        if let Some(name) = &self.name {
            let preset = Preset::named(name)?;
            return output::print(self.json, &preset.config(&[])?, |_| preset.text.to_owned());
        }
        let entries = Preset::ALL.iter().map(Entry::of).collect::<Result<Vec<_>, _>>()?;
        output::print(self.json, &entries, |entries| {
            let width = |cell: fn(&Entry) -> &str| entries.iter().map(|entry| cell(entry).len()).max().unwrap_or(0);
            let (names, tasks) = (width(|entry| entry.name), width(|entry| entry.task));
            let line = |Entry { name, task, image_res, data, .. }: &Entry| {
                format!("{name:names$}  {task:tasks$}  {image_res} px  {data}\n")
            };
            entries.iter().map(line).collect()
        })
    }
}
