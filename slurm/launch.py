"""`lvssl launch`: submit everything that isn't done or in progress, each stage after its dependencies."""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import submitit

from pipelines.errors import InputError
from slurm import scheduler
from slurm.dry_run import GpuHours, SizesOf, describe
from slurm.job import Job
from slurm.pipeline import Pipeline, Starts, read_pipeline
from slurm.records import claimed, read_jobs, read_json, read_record, stands, write_json
from slurm.snapshot import snapshot
from slurm.stages import Stage, Task, build_stages
from slurm.work import Work, awaited, executor

CLUSTERS = ("slurm", "local", "debug")
A_YEAR = 365 * 24 * 60  # in minutes; on this machine, jobs have no time limit


def launch(
    file: Path,
    starts: Starts,
    preset: str | None = None,
    cluster: str = "slurm",
    dry_run: bool = False,
    sizes: SizesOf | None = None,
    gpu_hours: GpuHours | None = None,
) -> int:
    """Submit a pipeline, or run it on this machine; returns the exit status.

    Args:
        file: the PIPELINE.toml.
        starts: by stage, the settings from which its command starts.
        preset: replaces the preset in [pretrain].
        cluster: slurm; local (processes of this machine, by submitit), debug (in this process).
        dry_run: only print what would be submitted.
        sizes: (pretraining's settings, count of images) -> sizes of what the network writes to disk.
        gpu_hours: (pretraining's settings, images, GPUs) -> GPU-hours, and what they were measured on.

    Raises:
        InputError: raised before anything is submitted.
    """
    if cluster not in CLUSTERS:
        raise InputError(f"unknown --cluster {cluster!r}; known: {', '.join(CLUSTERS)}")
    pipeline = read_pipeline(file, starts, preset)
    stages = build_stages(pipeline)
    if dry_run:
        print(describe(pipeline, stages, checked_plan(pipeline, stages), cluster, sizes, gpu_hours))
        return 0
    with claimed(pipeline.out):
        works = checked_plan(pipeline, stages)
        if cluster == "slurm":
            return submit_chain(pipeline, works, preset)
        return run_here(pipeline, works, preset, cluster)


def checked_plan(pipeline: Pipeline, stages: list[Stage]) -> list[Work]:
    """As `plan`. Raises InputError for a setting without effect, unless the pretraining is begun."""
    works = plan(pipeline.out, stages)
    (tasks,) = (work.tasks for work in works if work.stage.name == "pretrain")
    if any(task.run and not (task.run / "config.json").exists() for task in tasks):
        try:
            pipeline.stages["pretrain"].points[0].settings.require_used()
        except InputError as error:
            raise InputError(f"{pipeline.file}: [pretrain] {error}") from error
    return works


def as_launched(file: Path, starts: Starts) -> tuple[Pipeline, str | None]:
    """The pipeline with the --preset of its last launch, and this preset."""
    pipeline = read_pipeline(file, starts)
    preset = read_json(pipeline.out / "launch.json").get("preset")
    return (read_pipeline(file, starts, preset) if preset else pipeline), preset


def plan(out: Path, stages: list[Stage]) -> list[Work]:
    """The tasks of each stage that must run: those neither done, nor in progress, nor unneeded. Images that
    were removed after pretraining are needed again by a stage that reads them.

    Raises InputError if a job was submitted for an unfinished task and Slurm doesn't report its state.
    """
    jobs = {key: job for key, job in read_jobs(out).items() if job["cluster"] == "slurm"}
    lacking = {stage.name: [task for task in stage.tasks if not stands(out, task)] for stage in stages}
    asked = {jobs[t.key]["job"] for tasks in lacking.values() for t in tasks if t.key in jobs}
    queue = queue_of(out, asked)
    works: dict[str, Work] = {}
    for stage in reversed(stages):
        later = works.values()
        read = {path for work in later for task in work.tasks for path in task.reads}
        wanted = not stage.intermediate or any(
            work.tasks and stage.name in work.stage.after for work in later
        )
        missing = lacking[stage.name]
        busy = {
            t: jobs[t.key]["job"] for t in missing if t.key in jobs and is_busy(jobs[t.key]["job"], queue)
        }
        needed = [task for task in missing if wanted or not read.isdisjoint(task.outputs)]
        todo = tuple(task for task in needed if task not in busy)
        why = (
            "done" if not missing else "in progress" if not todo and busy else "" if needed else "not needed"
        )
        works[stage.name] = Work(stage, todo, tuple(sorted(set(busy.values()))), why)
    return [works[stage.name] for stage in stages]


def queue_of(out: Path, jobs: set[str]) -> dict[str, tuple[str, str]]:
    """`scheduler.states` of jobs of the pipeline in `out`. Nothing starts or ends before they are known."""
    try:
        return scheduler.states(jobs)
    except scheduler.UnknownQueue as error:
        hint = f"try again; if all jobs of this pipeline have ended, remove {out / 'jobs.json'}"
        raise InputError(f"{error}; {hint}") from error


def is_busy(job: str, queue: dict[str, tuple[str, str]]) -> bool:
    return queue.get(job, ("", ""))[0] in scheduler.ALIVE


# ---- Slurm


def submit_chain(pipeline: Pipeline, works: list[Work], preset: str | None) -> int:
    """Check everything, then submit the stages in order. `preset` is noted for `status` and `retry`."""
    out = pipeline.out
    for work in works:
        if work.tasks:
            scheduler.check_cluster(f"{table_of(work.stage)}.cluster", work.stage.cluster)
    refuse_other_settings(out, works)
    code = snapshot(out)
    for work in works:
        if work.tasks:
            script = executor(pipeline, work.stage, code, []).script(len(work.tasks))
            scheduler.test_submission(f"{table_of(work.stage)}.cluster", script, out)
    write_json(out / "launch.json", {"preset": preset})  # only now: a refused launch is none
    jobs = read_jobs(out)
    submitted: dict[str, list[str]] = {}
    for work in works:
        stage = work.stage
        after = [job for name in awaited(work, works) for job in submitted[name]]
        new = submit(pipeline, work, code, after, jobs) if work.tasks else []
        write_json(out / "jobs.json", jobs)
        # Depend on a new array as a whole, but only on the tasks of an older one that are still in progress.
        submitted[stage.name] = sorted({job.split("_")[0] for job in new} | set(work.under_way))
        print(f"{stage.name:10} {in_words(work, new)}")
    if any(work.tasks for work in works):
        print(f"to follow its progress: lvssl status {pipeline.file}")
    return 0


def submit(
    pipeline: Pipeline, work: Work, code: Path, after: list[str], jobs: dict[str, dict[str, str]]
) -> list[str]:
    """Submit a stage's tasks as one job or one array, and enter them into `jobs`."""
    stage = work.stage
    made = executor(pipeline, stage, code, after)
    calls = calls_of(pipeline.out, work, code)
    with own_environment():
        done = made.map_array(Job.__call__, calls) if len(calls) > 1 else [made.submit(calls[0])]
    jobs.update((task.key, noted(task, job, "slurm")) for task, job in zip(work.tasks, done))
    return [job.job_id for job in done]


def noted(task: Task, job: submitit.Job, cluster: str) -> dict[str, str]:
    """The entry for a job in jobs.json."""
    return {"task": task.name, "job": job.job_id, "log": str(job.paths.stdout), "cluster": cluster}


def calls_of(out: Path, work: Work, code: Path) -> list[Job]:
    siblings = work.stage.tasks if work.stage.swept else ()
    return [Job(out, task, work.stage.cluster, code, siblings) for task in work.tasks]


@contextlib.contextmanager
def own_environment() -> Iterator[None]:
    """Remove the variables of a job in which `launch` may run, as sbatch would take them as options."""
    taken = {
        name: os.environ.pop(name)
        for name in list(os.environ)
        if name.startswith(("SLURM_", "SBATCH_")) and name != "SLURM_CONF"
    }
    try:
        yield
    finally:
        os.environ.update(taken)


def refuse_other_settings(out: Path, works: list[Work]) -> None:
    """Raise InputError if a job is running a task with other settings, which would then go unnoticed."""
    jobs = read_jobs(out)
    keys = {task.key for work in works for task in work.stage.tasks}
    other = {key: job for key, job in jobs.items() if key not in keys and job["cluster"] == "slurm"}
    queue = queue_of(out, {job["job"] for job in other.values()})
    for job in other.values():
        if is_busy(job["job"], queue):
            raise InputError(
                f"job {job['job']} is running {job['task']} with other settings: "
                "`lvssl cancel` it first, or wait until it has finished"
            )


def in_words(work: Work, new: list[str]) -> str:
    if not new:
        return f"in progress as job {', '.join(work.under_way)}" if work.under_way else work.why
    first = new[0].split("_")[0]
    text = f"job {first}" + (f", an array of {len(new)}" if len(new) > 1 else "")
    others = len(work.stage.tasks) - len(new)
    return text + (f" ({others} tasks are done or in progress)" if others else "")


def table_of(stage: Stage) -> str:
    """The table of PIPELINE.toml that has a stage's settings."""
    return "convert" if stage.name == "merge" else stage.name


# ---- On this machine, without a scheduler


def run_here(pipeline: Pipeline, works: list[Work], preset: str | None, cluster: str) -> int:
    """Run the stages one after the other on this machine, up to the first that fails."""
    out = pipeline.out
    write_json(out / "launch.json", {"preset": preset})
    code = snapshot(out)
    os.environ.update(pipeline.local.environment)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(code), os.environ.get("PYTHONPATH"))))
    os.chdir(code)
    for work in works:
        if not work.tasks:
            print(f"{work.stage.name:10} {work.why}", flush=True)
            continue
        print(f"{work.stage.name:10} {len(work.tasks)} to do", flush=True)
        calls = calls_of(out, work, code)
        size = pipeline.local.concurrency if cluster == "local" else 1
        for first in range(0, len(calls), size):
            run_some(pipeline, work, calls[first : first + size], cluster)
        for task in work.tasks:
            if not stands(out, task):
                return not_done(out, task)
    print(f"done: {works[-1].stage.tasks[0].outputs[0]}")
    return 0


def not_done(out: Path, task: Task, stopped: bool = False) -> int:
    """Print why a task isn't done, and return the exit status. `stopped`: its job got a signal to stop, of
    which there is no record if it hadn't begun."""
    record = read_record(out, task)
    state = record.state if record is not None else ""
    if state == "stopped" or (stopped and state != "failed"):
        print(f"{task.name}: stopped; launch again to go on", file=sys.stderr)
        return 143
    error = record.error if record is not None and record.error else "it exited without an error message"
    log = record.log if record is not None else out / "jobs"
    print(f"error: {task.name}: {error} (log: {log})", file=sys.stderr)
    return 1


def run_some(pipeline: Pipeline, work: Work, calls: list[Job], cluster: str) -> None:
    """Run some tasks at the same time; returns when they have ended."""
    folder = pipeline.out / "jobs" / work.stage.name
    if cluster == "debug":
        made: Any = submitit.DebugExecutor(folder)
        for job in [made.submit(call) for call in calls]:
            with contextlib.suppress(SystemExit):  # the record says why; others open the debugger
                job.results()
        return
    made = submitit.LocalExecutor(folder)
    made.update_parameters(timeout_min=A_YEAR, gpus_per_node=work.stage.cluster.gpus, stderr_to_stdout=True)
    with stoppable() as running:
        for call in calls:
            if not running.signal:
                running.append(made.submit(call))
        signal.signal(signal.SIGINT, running.stop)
        jobs = read_jobs(pipeline.out)
        jobs.update((call.task.key, noted(call.task, job, "local")) for call, job in zip(calls, running))
        write_json(pipeline.out / "jobs.json", jobs)
        told = False
        while not all(job.done() for job in running):
            if running.signal and not told:
                running.tell()
                told = True
            time.sleep(0.2)
    if stopped_by := running.signal:
        for call in calls[: len(running)]:
            if not stands(pipeline.out, call.task):
                not_done(pipeline.out, call.task, stopped=True)
        raise SystemExit(128 + stopped_by)


class Running(list):
    """Jobs on this machine, and the signal at which they are to stop."""

    signal = 0

    def stop(self, number: int, _: Any) -> None:
        self.signal = number

    def tell(self) -> None:
        """Pass the signal on as SIGTERM."""
        for job in self:
            job._process.send_signal(signal.SIGTERM)


@contextlib.contextmanager
def stoppable() -> Iterator[Running]:
    """Pass Ctrl-C and SIGTERM on to the jobs as SIGTERM, at which they save their state and end.

    Jobs are started with SIGINT ignored: a terminal sends it to all processes at once, and submitit's
    controller would react by killing jobs that are still saving.
    """
    running = Running()
    before = {signal.SIGTERM: signal.signal(signal.SIGTERM, running.stop)}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield running
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
