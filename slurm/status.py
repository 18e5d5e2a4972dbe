"""`lvssl status`, `cancel`, `retry`: show a pipeline's state, end its jobs, or run failed tasks again."""

import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pipelines.amounts import time_text
from pipelines.errors import InputError
from slurm import scheduler
from slurm.launch import as_launched, is_busy, launch, queue_of
from slurm.pipeline import Pipeline, Starts, read_pipeline
from slurm.records import claimed, last_error, last_row, read_jobs, read_record, remaining, stands
from slurm.stages import Stage, Task, build_stages

FAILED = ("failed", "lost", "cancelled")
COLUMNS = ("stage", "state", "step", "img/s", "left", "last metric", "restarts", "job", "log")


@dataclass(frozen=True)
class Standing:
    """The state of one task."""

    task: Task
    state: str  # done, running, queued, waiting, stopped, failed, lost, cancelled, not run, unknown
    job: str = ""
    log: str = ""
    restarts: int = 0
    crashes: int = 0
    error: str = ""
    reason: str = ""  # why it is waiting


def status(file: Path, starts: Starts) -> str:
    """A table of the pipeline, followed by the last error line of each failed task."""
    pipeline, _ = as_launched(file, starts)
    stages = build_stages(pipeline)
    by_stage = standings(pipeline.out, stages)
    rows = [list(COLUMNS)]
    for stage in stages:
        each = by_stage[stage.name]
        failed_ones = [s for s in each if s.state in FAILED]
        shown = each if len(each) == 1 or stage.swept else [summary(stage, each), *failed_ones]
        rows += [row_of(pipeline, standing, stage.swept) for standing in shown]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    for each in by_stage.values():
        lines += [f"{s.task.name}: {s.error}" for s in each if s.error and s.state != "done"]
    failed = next((name for name, each in by_stage.items() if any(s.state in FAILED for s in each)), None)
    if failed:
        lines.append(f"once this is fixed: lvssl retry {failed} {file}")
    if all(s.state == "not run" and not s.job for each in by_stage.values() for s in each):
        lines.append(f"not launched yet: lvssl launch {file}")
    return "\n".join(lines)


def standings(out: Path, stages: list[Stage]) -> dict[str, list[Standing]]:
    """Every task's state, from its record, Slurm's queue and, if the cluster has job accounting, sacct. If
    Slurm doesn't answer, the state of a job that may be in progress is unknown."""
    jobs = read_jobs(out)
    known = {job["job"] for job in jobs.values() if job["cluster"] == "slurm"}
    queue: dict[str, tuple[str, str]] | None = None
    with suppress(scheduler.UnknownQueue):
        queue = scheduler.states(known)
    accounts = scheduler.accounted(known - set(queue)) if queue is not None else {}
    found: dict[str, list[Standing]] = {}
    broken: dict[str, str] = {}
    for stage in stages:
        behind = [name for name in stage.after if any(s.state in FAILED for s in found[name])]
        broken[stage.name] = next(filter(None, [*behind, *(broken[name] for name in stage.after)]), "")
        found[stage.name] = [
            standing(out, task, jobs.get(task.key, {}), queue, accounts, broken[stage.name])
            for task in stage.tasks
        ]
    whole = all(s.state == "done" for stage in stages if not stage.intermediate for s in found[stage.name])
    for stage in reversed(stages):  # parts removed after their merge, data of finished stages
        later = [s for other in stages if stage.name in other.after for s in found[other.name]]
        if stage.intermediate and later and all(s.state == "done" for s in later):
            found[stage.name] = [
                Standing(s.task, "done", s.job, s.log, s.restarts, s.crashes)
                if whole or s.state in ("not run", "unknown")
                else s  # it is being made again for a later stage, or that failed
                for s in found[stage.name]
            ]
    return found


def standing(
    out: Path,
    task: Task,
    job: dict[str, str],
    queue: dict[str, tuple[str, str]] | None,
    accounts: dict[str, str],
    broken: str,
) -> Standing:
    """One task's state; `broken`: a failed stage that it depends on, directly or not; empty without one."""
    record = read_record(out, task)
    number, log = job.get("job", ""), job.get("log", "")
    restarts, crashes, error = 0, 0, ""
    if record is not None:
        restarts, crashes, error = record.restarts, record.crashes, record.error
        number, log = number or record.job, record.log or log

    def made(state: str, error: str = error, reason: str = "") -> Standing:
        return Standing(task, state, number, log, restarts, crashes, error, reason)

    if stands(out, task):
        return made("done", "")
    if queue is None and job.get("cluster") == "slurm":
        return made("unknown", "", "Slurm doesn't answer")
    state, reason = (queue or {}).get(number, ("", ""))
    if state in scheduler.ALIVE and number:
        if state == "PENDING":
            return made("waiting" if reason == "Dependency" else "queued", "", reason)
        return made("running")
    if not number:
        return made("not run", f"{broken} failed" if broken else "")
    if record is None:  # it never began: ended by Slurm, mostly because what it waited for failed
        return made(
            "not run", f"{broken} failed" if broken else accounts.get(number, state or "never started")
        )
    cluster = job.get("cluster", record.cluster)
    if record.state == "running" and cluster != "slurm" and scheduler.alive(number, record.host, cluster):
        return made("running")
    if record.state == "done":
        return made("not run", "its result was removed or replaced since")
    if record.state == "running":
        verdict = accounts.get(number) or state or "it exited without an error message"
        return made(
            "cancelled" if verdict == "CANCELLED" else "lost", f"{verdict}: {last_error(Path(record.log))}"
        )
    return made(record.state)


def summary(stage: Stage, each: list[Standing]) -> Standing:
    """One line for an array: the number of tasks in each state."""
    states = [s.state for s in each]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    job = each[0].job.split("_")[0]
    logs = str(Path(each[0].log).parent) if each[0].log else ""
    named = Task(stage.name, "", "", (), ())
    return Standing(named, counts, job, logs, sum(s.restarts for s in each), sum(s.crashes for s in each))


def row_of(pipeline: Pipeline, each: Standing, swept: bool) -> list[str]:
    step, speed, left, metric = progress(pipeline, each) if each.task.name == "pretrain" else ("", "", "", "")
    if swept and each.task.label:
        metric = each.task.label
    state = each.state + (f" ({each.reason})" if each.reason not in ("", "None", "Dependency") else "")
    restarts = f"{each.restarts}" + (f", {each.crashes} crashes" if each.crashes else "") if each.job else ""
    return [each.task.name, state, step, speed, left, metric, restarts, each.job, each.log]


def progress(pipeline: Pipeline, each: Standing) -> tuple[str, str, str, str]:
    """(step of steps, img/s, time left, last loss) from the run's metrics.jsonl."""
    assert each.task.run is not None
    row = last_row(each.task.run / "metrics.jsonl")
    if not row:
        return "", "", "", ""
    total, speed, seconds = remaining(row, pipeline.stages["pretrain"].points[0].settings)
    left = time_text(max(seconds, 1)) if each.state == "running" and seconds > 0 else ""
    return f"{row['step']}/{total}", f"{speed:.0f}", left, f"loss {row['loss']:.3f}" if "loss" in row else ""


def cancel(file: Path, starts: Starts) -> str:
    """End every job of the pipeline; saved states remain.

    Raises:
        InputError: Slurm doesn't report which jobs are queued or running, or refuses to end them.
    """
    pipeline = read_pipeline(file, starts)
    with claimed(pipeline.out):
        jobs = read_jobs(pipeline.out)
        mine = {job["job"]: job["task"] for job in jobs.values() if job["cluster"] == "slurm"}
        queue = queue_of(pipeline.out, set(mine))
        # In reverse order, as otherwise a job would see its predecessor fail, which isn't informative.
        live = sorted((job for job in mine if is_busy(job, queue)), key=number_of, reverse=True)
        scheduler.cancel(live)
        until = time.monotonic() + 60
        while live and time.monotonic() < until and still_there(live):
            time.sleep(0.5)
    if not live:
        return "no job of this pipeline is queued or running"
    return f"cancelled: {', '.join(f'{mine[job]} ({job})' for job in reversed(live))}"


def still_there(jobs: list[str]) -> bool:
    """Whether any of these may be queued or running; also true if Slurm doesn't answer."""
    try:
        queue = scheduler.states(set(jobs))
    except scheduler.UnknownQueue:
        return True
    return any(is_busy(job, queue) for job in jobs)


def number_of(job: str) -> tuple[int, int]:
    main, _, task = job.partition("_")
    return int(main), int(task or 0)


def retry(stage: str, file: Path, starts: Starts, cluster: str = "slurm") -> int:
    """Submit a stage again, and its dependents, with the present code; it resumes from a saved state.

    Raises:
        InputError: the stage doesn't exist, or has no task to repeat.
    """
    pipeline, preset = as_launched(file, starts)
    stages = {each.name: each for each in build_stages(pipeline)}
    if stage not in stages:
        raise InputError(f"no stage {stage!r} in {file}; its stages: {', '.join(stages)}")
    tasks = [task for task in stages[stage].tasks if not stands(pipeline.out, task)]
    if not tasks:
        raise InputError(
            f"{stage}: its result exists already; to compute it again, remove "
            f"{stages[stage].tasks[0].outputs[0]}"
        )
    return launch(file, starts, preset, cluster)
