"""One process of a stage under srun: `python -m slurm.rank MARK HOST PORT COMMAND`.

It distinguishes a requested stop from a crash. srun returns one status for all ranks to the supervisor, and
kills the others as soon as one fails (--kill-on-bad-exit). If "stopped, state saved" (143) counted as a
failure, the first rank to end would have rank 0 killed while it is still saving. So a stop leaves a mark and
exits with 0, and any other exit status is a crash. Slurm signals every process of a step, both this one and
its child.
"""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

STOPPED = 143  # exit status of a command stopped by a signal, with its state saved
# Killed by a signal before the command listened for it: nothing had started, so nothing is lost.
STOPPED_EARLY = (-signal.SIGTERM, -signal.SIGUSR2)


def main(arguments: list[str]) -> int:
    mark, host, port, *command = arguments
    rank = int(os.environ.get("SLURM_PROCID", "0"))
    environment = dict(os.environ)
    if int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        environment |= {
            "RANK": str(rank),
            "WORLD_SIZE": os.environ["SLURM_NTASKS"],
            "LOCAL_RANK": os.environ["SLURM_LOCALID"],
            "MASTER_ADDR": host,
            "MASTER_PORT": port,
        }
    for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGCONT):
        signal.signal(number, lambda *_: None)  # a handler, because the child would inherit SIG_IGN
    status = subprocess.Popen(command, env=environment).wait()
    if status == STOPPED or status in STOPPED_EARLY:
        Path(f"{mark}-{rank}").write_text("saved" if status == STOPPED else "not saved")
        return 0
    if status:
        said = f"rank {rank} on {socket.gethostname()} ended with status {status}"
        print(f"pipeline: {said}", file=sys.stderr, flush=True)
    return 128 - status if status < 0 else status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
