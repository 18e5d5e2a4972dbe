"""Chains of stages on a cluster: submit, look, end, submit again."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lvssl.commands.arguments import parse


def chain_starts() -> dict[str, Callable[[str | None], Any]]:
    """Stages of a chain that have settings: a preset's name, or None -> the settings to start from."""
    from lvssl.settings import stages
    from lvssl.settings.pretrain import PretrainSettings, preset

    def evaluation(_: str | None) -> Any:
        from lvssl.evaluation.evaluate import EvaluateSettings  # imports torch

        return EvaluateSettings(Path())

    def analysis(_: str | None) -> Any:
        from lvssl.evaluation.analyse import AnalyseSettings

        return AnalyseSettings(Path())

    return {
        "pretrain": lambda name: preset(name) if name else PretrainSettings(),
        "evaluate": evaluation,
        "analyse": analysis,
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
        """Submit a chain of stages, from images to report; what is done or under way is not done again."""

        file: tyro.conf.Positional[Path] = Path("pipeline.toml")
        """The chain's description (docs/cluster.md)."""
        preset: str | None = None
        """Pretrain with this preset instead of the file's."""
        dry_run: bool = False
        """Print the scripts, the graph, the GPU-hours and the disk it needs, and submit nothing."""
        cluster: str = "slurm"
        """slurm; local: processes of this machine; debug: in this very process."""

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
        from lvssl.plan import MEASURED, hours, of_pretraining

        plan = replace(of_pretraining(settings), images=images, gpus=gpus)
        rate = "rate measured on one" if plan.backbone in MEASURED["H100"] else "guessed rate"
        basis = f"{plan.epochs:,} epochs, on H100s at the {rate} (docs/gpu.md)"
        return gpus * hours(plan), f"{basis}, where the loader keeps up"

    chosen = parse(Launch, arguments, "launch")
    how = chosen.preset, chosen.cluster, chosen.dry_run
    return run(chosen.file, chain_starts(), *how, sizes, gpu_hours)


def chain_file(arguments: list[str], command: str, about: str) -> Path:
    import tyro

    @dataclass(frozen=True)
    class Chain:
        file: tyro.conf.Positional[Path] = Path("pipeline.toml")
        """The chain's description (docs/cluster.md)."""

    return parse(Chain, arguments, command, about=about).file


def status(arguments: list[str]) -> None:
    from slurm.status import status as table

    about = "How a chain stands: stages, jobs, steps, speed, restarts, logs, and what went wrong."
    print(table(chain_file(arguments, "status", about), chain_starts()))


def cancel(arguments: list[str]) -> None:
    from slurm.status import cancel as end

    about = "End every job of a chain; what is saved stays, and `lvssl launch` goes on from there."
    print(end(chain_file(arguments, "cancel", about), chain_starts()))


def retry(arguments: list[str]) -> int:
    import tyro

    from slurm.status import retry as run

    @dataclass(frozen=True)
    class Retry:
        """Submit a stage that failed again, and what hangs on it, with the code as it is now."""

        stage: tyro.conf.Positional[str]
        """As `lvssl status` names it."""
        file: tyro.conf.Positional[Path] = Path("pipeline.toml")
        """The chain's description (docs/cluster.md)."""
        cluster: str = "slurm"
        """slurm, local or debug."""

    chosen = parse(Retry, arguments, "retry")
    return run(chosen.stage, chosen.file, chain_starts(), chosen.cluster)
