"""The command line: see `lvssl --help`."""

import sys
from collections.abc import Callable, Sequence

from lvssl.commands import apply, chain, measure, start
from lvssl.commands.pretrain import pretrain
from pipelines.output import run

HELP = """lvssl: latent-variable contrastive learning of image encoders

    convert-beton IMAGES train.beton                   a folder of class folders, a parquet, torchvision:NAME
    lvssl pretrain --preset cifar10-small --data train.beton --out runs/lv
    lvssl pretrain --preset cifar10-small --data train.beton --out runs/control --family none
    lvssl evaluate runs/lv --test test.beton --control runs/control
    lvssl linear runs/lv --test test.beton             also knn, finetune --label-fraction 0.1
    lvssl report runs/lv                               one HTML page
    lvssl encode runs/lv --images DIR                  a packed code for every image
    lvssl search runs/lv --query IMAGE                 the nearest images by their codes
    lvssl launch pipeline.toml                         all stages as jobs on a Slurm cluster

commands:
"""

COMMANDS: dict[str, tuple[str, Callable[[list[str]], int | None]]] = {
    "pretrain": ("train an encoder without labels", pretrain),
    "linear": ("linear classifier (or regression) on the frozen encoder", measure.linear),
    "knn": ("nearest-neighbour classifier on features and codes", measure.knn),
    "finetune": ("train the encoder with all or some labels", measure.finetune),
    "evaluate": (
        "linear probe and kNN on features and codes, with a control run and baselines",
        measure.evaluate,
    ),
    "analyse": (
        "uncertainty, interpretability of single bits and regression, next to a control",
        measure.analyse,
    ),
    "study": ("train several configurations over several seeds and compare them in pairs", measure.study),
    "compression": ("accuracy against bits per image, next to controls of equal size", measure.compression),
    "encode": ("packed codes and uncertainties of all images of a set", apply.encode),
    "search": ("find the images whose codes are nearest to a query", apply.search),
    "curate": ("find near-duplicates, outliers, doubtful labels and a diverse subset", apply.curate),
    "report": ("write the results of a run as one HTML page", measure.report),
    "runs": ("list the runs in a folder, best first, or compare two", measure.runs),
    "export": ("export the encoder for torchvision, timm, torch.hub and ONNX", apply.export),
    "presets": ("list the presets, print one, or compare two", start.presets),
    "plan": ("memory per GPU, the largest batch that fits, and training time", start.plan),
    "launch": ("submit a pipeline to Slurm, or run it on this machine", chain.launch),
    "status": ("show the status of a pipeline and its jobs", chain.status),
    "cancel": ("cancel the jobs of a pipeline", chain.cancel),
    "retry": ("resubmit a failed stage of a pipeline", chain.retry),
    "doctor": ("check the installation; doctor RUN: check for posterior collapse", start.doctor),
    "demo": ("run everything on Fashion-MNIST in a few minutes", start.demo),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 for a failure, 2 for bad input or a lack of permissions,
    130 for Ctrl-C, 141 if the reader of the output has closed it, 143 if a training was asked to stop and has
    saved its state."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments and arguments[0] in COMMANDS:
            return guarded(COMMANDS[arguments[0]][1], arguments[1:])
        return run(overview, arguments)
    except KeyboardInterrupt:
        return fail("interrupted", 130)


def overview(arguments: list[str]) -> int:
    """Print the list of commands or the version, whichever is asked for; anything else is a mistake."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP + "\n".join(f"    {name:11} {about}" for name, (about, _) in COMMANDS.items()))
        print("\n`lvssl COMMAND --help` lists the options of a command.")
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from lvssl import __version__

        print(__version__)
        return 0
    return fail(f"unknown command {arguments[0]!r}; known: {', '.join(COMMANDS)}")


def guarded(command: Callable[[list[str]], int | None], arguments: list[str]) -> int:
    """A user's mistake is one line without a traceback; everything unexpected keeps its traceback."""
    from lvssl.codes.file import CodeFileError
    from lvssl.training.stopping import Interrupted
    from pipelines.decode.reader import DamagedSample
    from pipelines.errors import InputError, hide_decoders_warnings

    hide_decoders_warnings()
    try:
        return run(command, arguments)
    except DamagedSample as error:
        return fail(f"{error}; use --on-error skip to leave out such images")
    except (InputError, CodeFileError) as error:
        return fail(str(error))
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        return 143
    except (FloatingPointError, MemoryError) as error:  # a run that diverged, or is too large
        return fail(str(error), 1)


def fail(message: str, status: int = 2) -> int:
    print(f"error: {message}", file=sys.stderr)
    return status
