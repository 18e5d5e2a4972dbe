"""Commands for pipelines on a cluster: launch, status, cancel and retry."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lvssl.commands.arguments import parse


def chain_starts() -> dict[str, Callable[[str | None], Any]]:
    """Map each stage with settings to a function from a preset's name, or None, to the initial settings."""
    from lvssl.settings import stages
    from lvssl.settings.measure import AnalyseSettings, EvaluateSettings
    from lvssl.settings.pretrain import PretrainSettings, preset

    return {
        "pretrain": lambda name: preset(name) if name else PretrainSettings(),
        "evaluate": lambda _: EvaluateSettings(Path()),
        "analyse": lambda _: AnalyseSettings(Path()),
        "linear": lambda name: stages.start_from(stages.LinearSettings, name),
        "knn": lambda name: stages.start_from(stages.KnnSettings, name),
        "finetune": lambda name: stages.start_from(stages.FinetuneSettings, name),
    }


def launch(arguments: list[str]) -> int:
    import tyro

    from slurm.dry_run import Sizes
    from slurm.launch import launch as run

    @dataclass(frozen=True)
    class Launch:
        """Submit a pipeline, from images to report, to a cluster. Stages that are finished or running are not
        submitted again.

        The pipeline file has a table for each stage to run, whose keys are options of the stage's command:
        [pretrain], and any of [evaluate], [analyse], [knn], [linear] and [finetune]. The images are either
        the betons `train` and `test` of the table [data], or converted, by [convert.train] and
        [convert.test], from a `source` each. [cluster] says what a job requests: partition, time, gpus."""

        file: tyro.conf.Positional[Path] = Path("pipeline.toml")
        """The pipeline file, in TOML."""
        preset: str | None = None
        """Pretrain with this preset instead of the one in the file."""
        dry_run: bool = False
        """Print the scripts, the dependency graph, the GPU-hours and the disk space; submit nothing."""
        cluster: str = "slurm"
        """Where to run: slurm, local (as processes on this machine) or debug (within this process)."""

    def sizes(settings: Any, images: int) -> Sizes:
        import torch

        from lvssl.evaluation.embedding import LARGE_SET, bytes_an_image
        from lvssl.models.network import LVNet

        with torch.device("meta"):
            network = LVNet(settings.model, settings.latent, settings.view.resolution)
        parameters = sum(parameter.numel() for parameter in network.parameters())
        width = network.feature_dim
        kept = bytes_an_image(width, network.family.code_bits(network.dim), images)
        return Sizes(parameters, kept, 4 * width if images >= LARGE_SET else 0)

    def gpu_hours(settings: Any, images: int, gpus: int) -> tuple[float, str]:
        from lvssl.plan import MEASURED, hours
        from lvssl.settings.start import of_pretraining

        plan = replace(of_pretraining(settings), images=images, gpus=gpus)
        rate = "rate measured on one" if plan.backbone in MEASURED["H100"] else "guessed rate"
        basis = f"{plan.epochs:,} epochs, on H100s at the {rate}"
        return gpus * hours(plan), f"{basis}, if the loader keeps up"

    chosen = parse(Launch, arguments, "launch")
    how = chosen.preset, chosen.cluster, chosen.dry_run
    return run(chosen.file, chain_starts(), *how, sizes, gpu_hours)


def chain_file(arguments: list[str], command: str, about: str) -> Path:
    import tyro

    @dataclass(frozen=True)
    class Chain:
        file: tyro.conf.Positional[Path] = Path("pipeline.toml")
        """The pipeline file that was launched."""

    return parse(Chain, arguments, command, about=about).file


def status(arguments: list[str]) -> None:
    from slurm.status import status as table

    about = "Show the status of a pipeline: stages, jobs, steps, speed, restarts, logs and errors."
    print(table(chain_file(arguments, "status", about), chain_starts()))


def cancel(arguments: list[str]) -> None:
    from slurm.status import cancel as end

    about = (
        "Cancel all jobs of a pipeline. Checkpoints and results are kept; `lvssl launch` resumes from them."
    )
    print(end(chain_file(arguments, "cancel", about), chain_starts()))


def retry(arguments: list[str]) -> int:
    import tyro

    from slurm.status import retry as run

    @dataclass(frozen=True)
    class Retry:
        """Resubmit a failed stage and the stages that depend on it, with the current code."""

        stage: tyro.conf.Positional[str]
        """Name of the stage, as shown by `lvssl status`."""
        file: tyro.conf.Positional[Path] = Path("pipeline.toml")
        """The pipeline file that was launched."""
        cluster: str = "slurm"
        """Where to run: slurm, local or debug."""

    chosen = parse(Retry, arguments, "retry")
    return run(chosen.stage, chosen.file, chain_starts(), chosen.cluster)
