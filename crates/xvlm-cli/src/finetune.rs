//! `xvlm finetune`.

use clap::Args;
use xvlm::Bundled;
use xvlm::tasks::FinetuneConfig;
use xvlm::tasks::finetune::{self, FinetuneKind};

use crate::dry_run::{self, DryRunArgs};
use crate::output::{self, CliError};
use crate::progress::Training;
use crate::run::RunArgs;

/// Train a pre-trained model on a task
///
/// The folder of the run is that of `xvlm pretrain`: metrics.jsonl, tensorboard/, checkpoints, and at the end the finished model in
/// model/, that of the best checkpoint in best/, and the losses in losses.png and losses.svg. Signals and --resume are as there.
#[derive(Args)]
pub(crate) struct Finetune {
    /// The task: retrieval, vqa, nlvr, nlvr_pretrain, weak_grounding, bbox, bbox_pretrain, captioning, captioning_pretrain or
    /// captioning_scst
    #[arg(value_name = "TASK", value_parser = FinetuneKind::of_name)]
    task: FinetuneKind,
    #[command(flatten)]
    run: RunArgs,
    /// Start from the built-in model, if the configuration names none
    #[arg(long)]
    built_in: bool,
    #[command(flatten)]
    dry: DryRunArgs,
}

impl Finetune {
    pub(crate) fn run(self) -> Result<(), CliError> {
        let Self { task, run, built_in, dry: DryRunArgs { dry_run, processes } } = self;
        if let Some(name) = run.printed_preset() {
            return output::print_text(FinetuneConfig::preset_text(name)?);
        }
        let config = match (&run.config, &run.preset) {
            (Some(path), _) => FinetuneConfig::open(path, task, &run.set)?,
            (None, preset) => FinetuneConfig::preset(preset.as_deref().unwrap_or_default(), &run.set)?,
        };
        if config.task.kind() != task {
            let (expected, found) = ("a configuration for this task", config.task.kind().name().to_owned());
            return Err(CliError::Option { option: "--preset", expected, found });
        }
        if run.print_config {
            return output::print_text(&config.to_yaml()?);
        }
        let start = built_in.then(|| Bundled::General.files()).transpose()?;
        if dry_run {
            let (ranks, on_gpu) = (processes.unwrap_or(1).into(), run.device.is_gpu()?);
            return dry_run::finetuning(&config, start.as_ref(), ranks, on_gpu, run.out.as_deref(), run.json);
        }
        let keeps_best = config.train.as_ref().is_some_and(|train| train.keep_best);
        run.train(keeps_best, |out, session, device| {
            finetune::run(&config, start.as_ref(), out, session, device, &mut Training::new())
        })
    }
}
