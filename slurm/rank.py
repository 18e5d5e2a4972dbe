"""One process of a stage under srun: `python -m slurm.rank MARK HOST PORT COMMAND`.

Tells an end that was asked for from a crash. srun gives the supervisor one status for all ranks, and kills
the others as soon as one ends badly (--kill-on-bad-exit): were "stopped, state saved" (143) such a status,
the rank that ends first would have rank 0 killed while it still saves. So a stop leaves a mark and ends well,
and what ends badly is a crash. Slurm signals every process of a step, this one and its child alike.
"""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

STOPPED = 143  # a command's status: stopped by a signal, state saved
# A signal that comes before the command listens for it: nothing was begun, so nothing is lost.
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
        signal.signal(number, lambda *_: None)  # a handler, not SIG_IGN, which the child would inherit
    status = subprocess.Popen(command, env=environment).wait()
    if status == STOPPED or status in STOPPED_EARLY:
        Path(f"{mark}-{rank}").write_text("saved" if status == STOPPED else "not saved")
        return 0
    if status:
        print(
            f"chain: rank {rank} on {socket.gethostname()} ended with status {status}",
            file=sys.stderr,
            flush=True,
        )
    return 128 - status if status < 0 else status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
