"""A submitted job: run one command on all its ranks, through preemption, time limits and crashes.

submitit runs a `Job` once, in the batch step, and srun starts the ranks below it (use_srun=False). Slurm's
signals therefore reach every rank directly (`--signal` goes to all steps), and this supervisor survives a
killed step. submitit's own requeueing isn't used: in its handler only rank 0 acts, and any signal in the last
ten minutes of the time limit (in a short job, every signal) counts as one of a few allowed timeouts.
"""

import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import NoReturn

import submitit

from pipelines.datasets.parts import files_of
from pipelines.staging import stage
from slurm import scheduler
from slurm.pipeline import ClusterSettings
from slurm.rank import STOPPED, STOPPED_EARLY
from slurm.records import Record, fingerprints, last_error, read_record, stands, write_record
from slurm.stages import Task
from slurm.sweep import write_table

BAD_INPUT = 2  # exit status of a user error, which a retry can't fix


@dataclass
class Outcome:
    """The result of running the ranks."""

    status: int = 0
    stopped: bool = False
    saved: bool = False  # stopped with a state to resume from


@dataclass
class Job:
    """One task of the pipeline; submitit runs it on the cluster, in a local process, or in this process."""

    out: Path
    task: Task
    cluster: ClusterSettings
    code: Path
    siblings: tuple[Task, ...] = ()  # all tasks of a sweep, including this one
    environment: dict[str, str] = field(default_factory=dict)
    signals: list[int] = field(default_factory=list)
    children: list[subprocess.Popen] = field(default_factory=list)

    def __call__(self) -> None:
        where = submitit.JobEnvironment()
        self.kind, self.id = where.cluster, where.job_id
        self.log = Path(os.devnull) if self.kind == "debug" else where.paths.stdout
        if stands(self.out, self.task):
            say(f"{self.task.name}: its result exists already")
            return
        self.listen()
        record = self.begin()
        while True:
            outcome = self.run_ranks(record)
            record.ended = time.time()
            record.seconds += record.ended - record.started
            if outcome.stopped or self.being_ended():
                self.stopped(record, outcome)
            elif outcome.status == 0:
                self.done(record)
                return
            else:
                self.crashed(record, outcome.status)
            record.state, record.started = "running", time.time()
            write_record(self.out, self.task, record)

    def listen(self) -> None:
        """Collect signals in a list. Slurm signals the ranks itself; elsewhere signals are passed on."""

        def heard(number: int, _: FrameType | None) -> None:
            self.signals.append(number)
            for child in self.children if self.kind == "local" else ():
                child.send_signal(number)

        if self.kind != "debug":
            for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGCONT):
                signal.signal(number, heard)

    def begin(self) -> Record:
        record = read_record(self.out, self.task) or Record(self.task.name, self.task.digest)
        if record.state == "running" and record.job not in ("", self.id):
            try:
                # A record without a cluster is an older one. Here, only processes can still be running this
                # task then: `launch` has asked Slurm about jobs submitted earlier.
                taken = scheduler.alive(record.job, record.host, record.cluster or self.kind)
            except scheduler.UnknownQueue as error:
                self.fail(None, f"{error}; it was running this task on {record.host}")
            if taken:
                self.fail(None, f"job {record.job} on {record.host} is already running this task")
        if record.job != self.id:
            record.crashes = 0
        elif record.state == "running":  # this job was killed without notice and requeued by Slurm
            record.restarts += 1
        record.state, record.job, record.host = "running", self.id, socket.gethostname()
        record.cluster = self.kind
        record.log, record.code, record.error = str(self.log), self.code.name, ""
        record.command = " ".join(["python", "-m", self.task.module, *self.task.arguments])
        record.started = time.time()
        write_record(self.out, self.task, record)
        return record

    def run_ranks(self, record: Record) -> Outcome:
        if self.asked_to_stop():  # before the first start, or after a crash
            return Outcome(stopped=True)
        start = {"slurm": self.with_srun, "local": self.with_processes, "debug": self.in_process}[self.kind]
        say(f"{self.task.name}: start {record.restarts + record.crashes + 1} on {record.host}")
        return start(record)

    def with_srun(self, record: Record) -> Outcome:
        if self.staging() and self.cluster.nodes > 1:  # on all nodes first: ranks only wait minutes for it
            outcome = self.step(record, 1, [*self.staging(), "true"], subprocess.DEVNULL)
            if outcome.stopped:
                return outcome  # otherwise the ranks try again, and report the error
        return self.step(record, self.cluster.ranks_per_node, self.command())

    def step(self, record: Record, per_node: int, command: list[str], errors: int | None = None) -> Outcome:
        """Run a command in `per_node` processes on every node."""
        cluster = self.cluster
        ranks = cluster.nodes * per_node
        mark = self.log.with_name(f".stopped-{self.id}-{record.restarts}-{record.crashes}")
        for left_by_a_killed_start in mark.parent.glob(f"{mark.name}-*"):
            left_by_a_killed_start.unlink()
        host, port = scheduler.meeting_point(record.restarts + record.crashes)
        srun = ["srun", "--unbuffered", "--kill-on-bad-exit=1", f"--nodes={cluster.nodes}"]
        srun += [f"--ntasks={ranks}", f"--ntasks-per-node={per_node}"]
        srun += [f"--cpus-per-task={cluster.cpus}"] if cluster.cpus else []  # srun doesn't inherit sbatch's
        rank = [sys.executable, "-m", "slurm.rank", str(mark), host, str(port)]
        status = subprocess.Popen([*srun, *rank, *command], cwd=self.code, stderr=errors).wait()
        marks = list(mark.parent.glob(f"{mark.name}-*"))
        saved = bool(marks) and all(each.read_text() == "saved" for each in marks)
        for each in marks:
            each.unlink()
        return Outcome(status, len(marks) == ranks or (bool(marks) and status == 0), saved)

    def with_processes(self, record: Record) -> Outcome:
        """Run the ranks as processes of this machine, with the variables that torchrun sets."""
        ranks, children = self.cluster.ranks_per_node, []
        _, port = scheduler.meeting_point(record.restarts + record.crashes)
        for rank in range(ranks):
            environment = dict(os.environ)
            if ranks > 1:
                environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
                environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            children.append(subprocess.Popen(self.command(), cwd=self.code, env=environment))
        self.children += children
        for number in self.asked_to_stop():  # heard while they were started
            for child in children:
                child.send_signal(number)
        statuses = [child.wait() for child in self.children]
        self.children.clear()
        stopped = any(s == STOPPED or s in STOPPED_EARLY for s in statuses) and bool(self.asked_to_stop())
        return Outcome(max(map(abs, statuses)), stopped, STOPPED in statuses)

    def in_process(self, record: Record) -> Outcome:
        """Run in this very process, for a debugger."""
        before = sys.argv
        if self.cluster.stage_to:
            stage(self.cluster.stage_to, (file for path in self.task.reads for file in files_of(path)))
        sys.argv = [self.task.module, *self.task.arguments]
        try:
            runpy.run_module(self.task.module, run_name="__main__", alter_sys=True)
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
            return Outcome(status, status == STOPPED, status == STOPPED)
        finally:
            sys.argv = before
        return Outcome()

    def command(self) -> list[str]:
        """The command of one rank. The supervisor stays outside a container: it needs the host's srun."""
        start = [*self.cluster.container, "python3"] if self.cluster.container else [sys.executable]
        return [*self.staging(), *start, "-m", self.task.module, *self.task.arguments]

    def staging(self) -> list[str]:
        """A prefix of the command, run outside a container, to copy its images to the node; may be empty."""
        if not self.cluster.stage_to or not self.task.reads:
            return []
        sets = map(str, self.task.reads)
        return [sys.executable, "-m", "pipelines.staging", self.cluster.stage_to, *sets, "--"]

    def asked_to_stop(self) -> list[int]:
        return [number for number in self.signals if number in (signal.SIGTERM, signal.SIGUSR2)]

    def being_ended(self) -> bool:
        """Whether Slurm is ending this job, in which case a failing rank isn't a crash."""
        return self.kind == "slurm" and scheduler.job_state(self.id) not in ("RUNNING", "")

    def done(self, record: Record) -> None:
        outputs = fingerprints(self.task.outputs)
        if outputs is None:
            missing = next(path for path in self.task.outputs if not path.exists())
            self.fail(record, f"{missing} is missing, although the command succeeded")
        record.state, record.outputs = "done", outputs
        write_record(self.out, self.task, record)
        for beton in self.task.removes:
            for path in beton.parent.glob(f"{beton.name}*"):
                path.unlink()
        if self.siblings:
            write_table(self.out, self.siblings)
        say(f"{self.task.name}: done")

    def stopped(self, record: Record, outcome: Outcome) -> None:
        """Preempted, at its time limit, or cancelled. Returns to start again; mostly the job ends here."""
        asked, self.signals[:] = self.asked_to_stop(), []
        record.state = "stopped"
        if self.kind == "local" and signal.SIGTERM not in asked:  # USR2: like a cluster's warning
            record.restarts += 1
            return
        if self.kind != "slurm":
            write_record(self.out, self.task, record)
            self.leave(f"stopped; `lvssl launch` {'resumes it' if outcome.saved else 'starts it again'}")
        ended_by = scheduler.ended_by(self.log) if self.being_ended() else "a signal"
        if ended_by == "":
            record.state = "cancelled"
            write_record(self.out, self.task, record)
            self.leave("cancelled")
        limit = 60 * self.cluster.minutes
        if not outcome.saved and time.time() - record.started > limit - self.cluster.warning - 60:
            self.fail(
                record, f"not finished within {self.cluster.time}, and it can't be resumed: raise `time`"
            )
        record.restarts += 1
        write_record(self.out, self.task, record)
        say(f"{self.task.name}: stopped by {ended_by}; queued again ({record.restarts} so far)")
        scheduler.requeue(self.id)
        self.leave("requeued")

    def crashed(self, record: Record, status: int) -> None:
        """Start again in the same allocation, for a limited number of times; bad input isn't retried."""
        record.crashes += 1
        error = last_error(self.log) or f"exit status {status}"
        if status == BAD_INPUT or record.crashes > self.cluster.crashes or self.kind == "debug":
            self.fail(record, error)
        record.error = error
        write_record(self.out, self.task, record)
        allowed = f"crash {record.crashes} of {self.cluster.crashes} allowed"
        say(f"{self.task.name}: ended with status {status}; starting again ({allowed})")
        again = time.monotonic() + min(30, 2**record.crashes)
        while time.monotonic() < again and not self.asked_to_stop():
            time.sleep(0.1)

    def fail(self, record: Record | None, error: str) -> NoReturn:
        if record is not None:
            record.state, record.error = "failed", error
            write_record(self.out, self.task, record)
        self.leave(f"failed: {error}")

    def leave(self, why: str) -> NoReturn:
        """Exit with a status other than 0, so that no job that depends on this one starts."""
        say(f"{self.task.name}: {why}")
        raise SystemExit(1)


def say(text: str) -> None:
    print(f"pipeline: {text}", flush=True)
