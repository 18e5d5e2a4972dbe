"""Settings of the stages after pretraining, linear, knn and finetune, and the presets of their recipes."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from tyro import MISSING
from tyro.conf import Positional

from lvssl.settings.fields import PER_CALL, POSITIONAL, RUNTIME, ReadsImages
from lvssl.settings.pretrain import PRECISIONS, above_zero, at_least, choice, require
from pipelines.decode import SOURCES
from pipelines.errors import ON_ERROR

REPRESENTATIONS = ("features", "latent", "code")
PROBES = ("auto", "sgd", "logistic", "streamed", "ridge")


@dataclass(frozen=True)
class StageSettings(ReadsImages):
    run: Positional[Path] = field(metadata=POSITIONAL)
    """The run's folder. `knn` and `linear` take embeddings, too: a folder with train and test as .npy (and
    -labels.npy), .safetensors or .parquet."""
    train: Path | None = None
    """Labelled training images, in one file or many ('train-*.beton'); left out: those of the pretraining."""
    test: Path | None = None
    """The test images; left out: test.beton (or val) beside the training images."""
    source: str = field(default="auto", metadata=RUNTIME)
    """What reads both: auto (beton for a .beton, else folder), beton, folder (files, tars or a table, never
    converted), dali (decoded and cropped by NVIDIA DALI), nvjpeg (on a GPU by torchvision's nvJPEG and a
    kernel of ours)."""
    on_error: str | None = None
    """An image that can't be decoded: raise (stop and name it), skip, or keep (skip, but use what Pillow
    makes of a damaged JPEG, such as one with extraneous bytes); left out: as in the pretraining.
    In a training step the next good one takes its place; in an evaluation it is left out, and the figures'
    count says so."""
    target: str = ""
    """Regress this float target of the set (`all`: every one) instead of telling classes apart."""
    out: Path | None = field(default=None, metadata=RUNTIME)
    """Where the result goes, FILE.json or a folder; left out: into the run's folder."""
    overwrite: bool = field(default=False, metadata=PER_CALL)
    """Replace a result of other settings, or of an older checkpoint."""
    workers: int = field(default=0, metadata=RUNTIME)
    """Threads that decode and augment; 0: each rank's share of the cores less two, 2 to 12."""
    threads: int = field(default=0, metadata=RUNTIME)
    """Threads of torch on a CPU; 0: all cores."""
    device: str = field(default="auto", metadata=RUNTIME)
    """auto (a GPU where there is one), cpu, cuda, cuda:1 ..."""

    def validate(self) -> None:
        """Raise InputError naming the first impossible value. Touches no file."""
        choice("source", self.source, SOURCES)
        choice("on_error", self.on_error or "raise", ON_ERROR)
        at_least(self, workers=0, threads=0)


@dataclass(frozen=True)
class MeasuringSettings(ReadsImages):
    """What `evaluate`, `analyse` and `compression` share, which measure a run beside a control."""

    run: Positional[Path] = field(metadata=POSITIONAL)
    """The run's folder; what is measured is written there, unless --out is given."""
    test: Path | None = None
    """The test images, made by `convert-beton`; left out: test.beton (or val) beside train.beton."""
    control: Path | None = None
    """The run of family `none` or `sign` to compare with; left out: the run `control` beside this one."""
    train: Path | None = None
    """Labelled training images, which probes are fitted on; left out: those of the pretraining."""
    on_error: str | None = None
    """An image that can't be decoded: raise (stop and name it), or skip (leave it out, and say how many;
    among augmented views the next good one takes its place); left out: as in the pretraining."""
    out: Path | None = field(default=None, metadata=RUNTIME)
    """The folder that the result goes into; left out: the run's."""
    overwrite: bool = field(default=False, metadata=PER_CALL)
    """Replace a result of other settings, or of an older checkpoint."""


@dataclass(frozen=True)
class TrainingSettings(StageSettings):
    """What `linear` and `finetune` share: SGD with Nesterov momentum 0.9, cosine to 0, crop and flip."""

    representation: str = "features"
    """features (h), latent (the posterior: samples in training, its mean in the test), code (its bits)."""
    batch_size: int = 256
    """Images a step, over all ranks; at most as many as there are labels."""
    seed: int = 0
    """Of subset, held-out split, first weights, order and crops."""
    precision: str = "auto"
    """auto (as the run was trained), fp32, bf16, fp16 (with a loss scale)."""
    checkpoint_minutes: float = field(default=10.0, metadata=RUNTIME)
    """A checkpoint is written at least this often, and at the end."""
    log_every: int = field(default=10, metadata=RUNTIME)
    """Steps between two lines of metrics.jsonl."""

    def validate(self) -> None:
        super().validate()
        choice("representation", self.representation, REPRESENTATIONS)
        choice("precision", self.precision, PRECISIONS)
        at_least(self, batch_size=1, log_every=1)
        require(0 <= self.seed < 2**63, "seed", self.seed, "in [0, 2^63)")
        above_zero(self, "checkpoint_minutes")


@dataclass(frozen=True)
class LinearSettings(TrainingSettings):
    """A linear classifier (or regression) on the frozen encoder; writes RUN/linear.json."""

    probe: str = "auto"
    """sgd (the published protocol, with crops and flips), logistic (L2, on the centre crops' features: exact
    and fast on small sets), streamed (the same by stochastic gradients, in memory that the images' count
    doesn't change), ridge (for --target), auto (sgd from 200,000 training images on)."""
    epochs: int = 90
    """Of sgd."""
    lr: float = 0.1
    """Of sgd, for a batch of 256: the peak is lr * B / 256."""
    probe_epochs: int = 0
    """Of streamed; 0: 10, or as many as 5,000 steps take."""
    preset: str = field(default="", metadata=RUNTIME)
    """imagenet-linear"""

    def validate(self) -> None:
        super().validate()
        choice("probe", self.probe, PROBES)
        at_least(self, epochs=1, probe_epochs=0)
        above_zero(self, "lr")


@dataclass(frozen=True)
class KnnSettings(StageSettings):
    """Weighted nearest neighbours, by cosine on features, by Hamming on codes; writes RUN/knn.json."""

    k: int = 0
    """Neighbours that vote; 0: 20, or 200 from 200,000 training images on (ImageNet's custom)."""
    temperature: float = 0.0
    """Of the votes exp(similarity / T); 0: 0.07, or 0.1 where k is 200 by default."""

    def validate(self) -> None:
        super().validate()
        at_least(self, k=0, temperature=0)


@dataclass(frozen=True)
class FinetuneSettings(TrainingSettings):
    """Train encoder and a linear layer with all or some labels; writes RUN/finetune-LABELS/result.json.

    Each pair of --lr and --weight-decay is tried on a held-out part of the labelled training images; the best
    is retrained on all labels and evaluated once on the test set.
    """

    label_fraction: float = 1.0
    """Share of the training images whose labels are used: class-balanced, drawn by --seed."""
    subset_list: Path | None = None
    """Use these images instead: one file name a line, as SimCLR's public 1 % and 10 % lists."""
    epochs: int = 30
    """Of each training."""
    min_steps: int = 500
    """Steps of each training at least, for few labels make few steps an epoch."""
    lr: tuple[float, ...] = (0.01, 0.05, 0.25)
    """Learning rates to choose from, for a batch of 256: the peak is lr * B / 256."""
    weight_decay: tuple[float, ...] = (0.0, 1e-4)
    """Weight decays to choose from; never on biases and normalisation."""
    validation_fraction: float = 0.1
    """Share of the labelled images on which the choice is made."""
    preset: str = field(default="", metadata=RUNTIME)
    """imagenet-finetune"""

    def validate(self) -> None:
        super().validate()
        require(
            self.representation != "code",
            "representation",
            self.representation,
            "features or latent: a code has no gradient",
        )
        require(0 < self.label_fraction <= 1, "label_fraction", self.label_fraction, "in (0, 1]")
        at_least(self, min_steps=0, epochs=1)
        for name, smallest in (("lr", 1e-12), ("weight_decay", 0.0)):
            values = getattr(self, name)
            require(
                len(values) > 0 and all(value >= smallest for value in values),
                name,
                values,
                "one or more numbers, none negative",
            )
            require(len(set(values)) == len(values), name, values, "different numbers")
        require(
            0 < self.validation_fraction < 1, "validation_fraction", self.validation_fraction, "in (0, 1)"
        )


# SimCLR's recipes (Chen et al. 2020, B.6 and B.5): large batches, nothing to choose.
STAGE_PRESETS: dict[str, StageSettings] = {
    "imagenet-linear": LinearSettings(MISSING, probe="sgd", batch_size=4096, preset="imagenet-linear"),
    "imagenet-finetune": FinetuneSettings(  # with 1 % of the labels: --epochs 60
        MISSING, batch_size=4096, min_steps=0, lr=(0.05,), weight_decay=(0.0,), preset="imagenet-finetune"
    ),
}

Kind = TypeVar("Kind", bound=StageSettings)


def start_from(kind: type[Kind], name: str | None) -> Kind:
    """Settings to start from: the preset of that name, or the defaults. InputError lists the known names."""
    if not name:
        return kind(MISSING)
    known = {key: value for key, value in STAGE_PRESETS.items() if isinstance(value, kind)}
    choice("preset", name, tuple(known))
    return known[name]
