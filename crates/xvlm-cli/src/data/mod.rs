//! `xvlm data`: what is done to data sets before training.

mod convert;

use clap::{Args, Subcommand};

use crate::output::CliError;

/// Prepare data sets
#[derive(Args)]
pub(crate) struct Data {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Convert(convert::Convert),
}

impl Data {
    pub(crate) fn run(self) -> Result<(), CliError> {
        match self.command {
            Command::Convert(command) => command.run(),
        }
    }
}
