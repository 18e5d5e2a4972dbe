"""What is submitted: a stage's tasks, and the Slurm job that runs them."""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit

from slurm.pipeline import ClusterSettings, Pipeline
from slurm.stages import Stage, Task


@dataclass(frozen=True)
class Work:
    """A stage, with those of its tasks that are to be submitted."""

    stage: Stage
    tasks: tuple[Task, ...]
    under_way: tuple[str, ...] = ()  # jobs that run its other tasks
    why: str = ""


def awaited(work: Work, works: Sequence[Work]) -> list[str]:
    """The stages whose jobs must have ended before this one's start. Those that make the images it reads are
    among them, unless a stage in between awaits these."""
    after = work.stage.after
    if any(each.tasks for each in works if each.stage.name in after):
        return [*after]
    read = {path for task in work.tasks for path in task.reads}
    making = [w.stage.name for w in works for task in w.tasks if not read.isdisjoint(task.outputs)]
    return [*dict.fromkeys([*making, *after])]


class ChainExecutor(submitit.SlurmExecutor):
    """submitit's Slurm executor, which can also write its script without Slurm (--dry-run)."""

    @classmethod
    def affinity(cls) -> int:
        return 2

    def script(self, tasks: int) -> str:
        """The text passed to sbatch."""
        array = {"map_count": tasks} if tasks > 1 else {}
        before = dict(self.parameters)
        self.parameters.update(array)
        try:
            return self._make_submission_file_text(self._submitit_command_str, "")
        finally:
            self.parameters = before


def executor(pipeline: Pipeline, stage: Stage, code: Path, after: list[str]) -> ChainExecutor:
    """An executor with everything that a stage's job requests; `after`: jobs that must succeed first."""
    cluster = stage.cluster
    python = shlex.quote(cluster.python or sys.executable)
    made = ChainExecutor(pipeline.out / "jobs" / stage.name, python=python)
    # With submitit's own names, so that these options win: gpus-per-node = "a100:4".
    more = {name.replace("-", "_"): value for name, value in cluster.options.items()}
    options: dict[str, Any] = {"requeue": True, "chdir": str(code), **more}
    if after:
        options |= {"dependency": f"afterok:{':'.join(after)}", "kill-on-invalid-dep": "yes"}
    if cluster.memory:
        options["mem"] = cluster.memory.removesuffix("B")
    wanted = {name: getattr(cluster, name) for name in ("partition", "account", "qos", "constraint")}
    wanted |= {"cpus_per_task": cluster.cpus, "gpus_per_node": cluster.gpus}
    made.update_parameters(
        job_name=f"{pipeline.name}-{stage.name}",
        time=cluster.minutes,
        nodes=cluster.nodes,
        ntasks_per_node=cluster.ranks_per_node,
        **{name: value for name, value in wanted.items() if value},
        setup=setup_lines(cluster, code),
        signal_delay_s=cluster.warning,
        stderr_to_stdout=True,
        array_parallelism=cluster.concurrency,
        additional_parameters=options,
        use_srun=False,  # the job itself starts its ranks: see slurm/job.py
    )
    return made


def setup_lines(cluster: ClusterSettings, code: Path) -> list[str]:
    """The script's lines before its command. The frozen code precedes installed packages, and the working
    folder, which Python puts first, is that code too."""
    lines = [f"module load {shlex.quote(module)}" for module in cluster.modules]
    lines += cluster.setup
    lines += [f"export {name}={shlex.quote(value)}" for name, value in cluster.environment.items()]
    return [*lines, f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}"]
