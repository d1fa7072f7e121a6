//! `xvlm pretrain`.

use clap::Args;
use xvlm::tasks::{PretrainConfig, pretrain};

use crate::dry_run::{self, DryRunArgs};
use crate::output::{self, CliError};
use crate::progress::Training;
use crate::run::RunArgs;

/// Pre-train a model on image-text pairs and on boxes with texts
///
/// The folder of the run gets metrics.jsonl (a row of losses every `train.log_every` iterations), the same in
/// tensorboard/, checkpoints, and at the end the finished model in model/, that of the best checkpoint in best/, and the
/// losses in losses.png and losses.svg.
///
/// SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 let it finish the iteration it is at, save, and exit with 0; --resume then goes
/// on as if nothing had happened. A second SIGTERM or SIGINT ends it at once.
#[derive(Args)]
pub(crate) struct Pretrain {
    #[command(flatten)]
    run: RunArgs,
    #[command(flatten)]
    dry: DryRunArgs,
}

impl Pretrain {
    pub(crate) fn run(self) -> Result<(), CliError> {
        let Self { run, dry: DryRunArgs { dry_run, processes } } = self;
        if let Some(name) = run.printed_preset() {
            return output::print_text(PretrainConfig::preset_text(name)?);
        }
        let config = match (&run.config, &run.preset) {
            (Some(path), _) => PretrainConfig::open(path, &run.set)?,
            (None, preset) => PretrainConfig::preset(preset.as_deref().unwrap_or_default(), &run.set)?,
        };
        if run.print_config {
            return output::print_text(&config.to_yaml()?);
        }
        if dry_run {
            let (ranks, on_gpu) = (processes.unwrap_or(1).into(), run.device.is_gpu()?);
            return dry_run::run(&config, ranks, on_gpu, run.out.as_deref(), run.json);
        }
        run.train(config.train.keep_best, |out, session, device| {
            pretrain::run(&config, out, session, device, &mut Training::new())
        })
    }
}
