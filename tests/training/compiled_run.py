"""A compiled pretraining in its own process, stopped after a step, or resumed and finished.

    python tests/training/compiled_run.py DATA RUN

Prints as JSON what the compiler found in its cache, and what it didn't. Run by test_kill_and_resume.py.
"""

import dataclasses
import json
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from torch._dynamo.utils import counters

from lvssl.settings.pretrain import PRESETS, EngineSettings
from lvssl.training.pretrain import pretrain
from lvssl.training.stopping import Interrupted


def main(data: Path, out: Path) -> None:
    base, resume = PRESETS["digits"], out.exists()
    model = dataclasses.replace(base.model, backbone="tiny")
    settings = dataclasses.replace(
        base, data=data, out=out, epochs=1, device="cpu", threads=1, log_every=1, workers=1, model=model,
        engine=EngineSettings(compile="on"),
    )  # fmt: skip

    def stop_after_a_step() -> None:
        while not (out / "metrics.jsonl").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    if not resume:
        threading.Thread(target=stop_after_a_step, daemon=True).start()
    with suppress(Interrupted):
        pretrain(settings, resume)
    found = {kind: counters["inductor"][f"fxgraph_cache_{kind}"] for kind in ("hit", "miss")}
    print(json.dumps(found))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
