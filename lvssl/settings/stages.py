"""Settings of the stages after pretraining (linear, knn and finetune), and presets of published recipes."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from tyro import MISSING
from tyro.conf import Positional

from lvssl.settings.fields import PER_CALL, POSITIONAL, RUNTIME, ReadsImages, require_finite, without_effect
from lvssl.settings.pretrain import PRECISIONS, above_zero, at_least, choice, require
from pipelines.decode import SOURCES
from pipelines.errors import ON_ERROR, InputError

REPRESENTATIONS = ("features", "latent", "code")
PROBES = ("auto", "sgd", "logistic", "streamed", "ridge")


@dataclass(frozen=True)
class StageSettings(ReadsImages):
    run: Positional[Path] = field(metadata=POSITIONAL)
    """Folder of the run. `knn` and `linear` also accept embeddings: a folder with train and test as .npy
    (plus -labels.npy), .safetensors or .parquet."""
    train: Path | None = None
    """Labelled training images, in one file or several ('train-*.beton'). If omitted, those of the
    pretraining."""
    test: Path | None = None
    """Test images. If omitted, test.beton (or val) next to the training images."""
    source: str = field(default="auto", metadata=RUNTIME)
    """How both sets are read: auto (beton for a .beton, otherwise folder), beton, folder (files, tars or a
    table, without conversion), dali (NVIDIA DALI decodes and crops), or nvjpeg (torchvision's nvJPEG decodes
    and a custom kernel crops, on a GPU)."""
    on_error: str | None = None
    """What to do with an image that can't be decoded: raise (stop and name it), skip, or keep (as skip, but
    use what Pillow decodes from a damaged JPEG, such as one with extraneous bytes). If omitted, as in the
    pretraining. In training, the next good image is used instead; in evaluation, the image is left out, and
    the reported count is that of the rest."""
    target: str = ""
    """Predict this float target of the set by regression (`all`: every target) instead of classifying."""
    out: Path | None = field(default=None, metadata=RUNTIME)
    """Where to write the result: FILE.json or a folder. If omitted, the run's folder."""
    overwrite: bool = field(default=False, metadata=PER_CALL)
    """Replace a result of other settings or of an older checkpoint."""
    workers: int = field(default=0, metadata=RUNTIME)
    """Threads that decode and augment images; 0 means each rank's share of the cores minus two, but 2 to
    12."""
    threads: int = field(default=0, metadata=RUNTIME)
    """CPU threads used by torch; 0 means all cores."""
    device: str = field(default="auto", metadata=RUNTIME)
    """auto (a GPU if there is one), cpu, cuda, cuda:1 ..."""

    def validate(self) -> None:
        """Raise InputError naming the first impossible value. Touches no file."""
        require_finite(self)
        choice("source", self.source, SOURCES)
        choice("on_error", self.on_error or "raise", ON_ERROR)
        at_least(self, workers=0, threads=0)


@dataclass(frozen=True)
class TrainingSettings(StageSettings):
    """What `linear` and `finetune` share: SGD with Nesterov momentum 0.9, cosine to 0, crop and flip."""

    representation: str = "features"
    """Input of the linear layer: features (h), latent (the posterior: samples in training, its mean in
    testing), or code (its bits)."""
    batch_size: int = 256
    """Images per step, over all ranks; at most the number of labelled images."""
    seed: int = 0
    """Random seed of the subset, the held-out split, the initial weights, the image order and the crops."""
    precision: str = "auto"
    """auto (as in the pretraining), fp32, bf16, or fp16 (with loss scaling)."""
    checkpoint_minutes: float = field(default=10.0, metadata=RUNTIME)
    """Maximum number of minutes between checkpoints; one is also written at the end."""
    log_every: int = field(default=10, metadata=RUNTIME)
    """Number of steps between two lines of metrics.jsonl."""

    def validate(self) -> None:
        super().validate()
        choice("representation", self.representation, REPRESENTATIONS)
        choice("precision", self.precision, PRECISIONS)
        at_least(self, batch_size=1, log_every=1)
        require(0 <= self.seed < 2**63, "seed", self.seed, "in [0, 2^63)")
        above_zero(self, "checkpoint_minutes")


@dataclass(frozen=True)
class LinearSettings(TrainingSettings):
    """Train a linear classifier (or regression) on the frozen encoder. Writes RUN/linear.json."""

    probe: str = "auto"
    """sgd (the published protocol, with crops and flips), logistic (L2-regularised, on features of the centre
    crops: exact, and fast on small sets), streamed (logistic by stochastic gradients, in memory that doesn't
    depend on the number of images), ridge (for --target), or auto (sgd from 200,000 training images on,
    otherwise logistic or ridge)."""
    epochs: int = 90
    """Number of epochs of sgd."""
    lr: float = 0.1
    """Learning rate of sgd for a batch of 256; the peak is lr * B / 256."""
    probe_epochs: int = 0
    """Number of epochs of streamed; 0 means 10, or more if these are fewer than 5,000 steps."""
    preset: str = field(default="", metadata=RUNTIME)
    """Preset to start from: imagenet-linear."""

    def validate(self) -> None:
        super().validate()
        choice("probe", self.probe, PROBES)
        at_least(self, epochs=1, probe_epochs=0)
        above_zero(self, "lr")
        if self.probe != "auto" and (said := self.without_effect(self.probe)):
            raise InputError(said)

    def without_effect(self, probe: str) -> str:
        """Return what to say of an option that has no effect on that probe; "" if there is none."""
        of = {"epochs": "sgd", "lr": "sgd", "probe_epochs": "streamed"}
        needed = {name: f"--probe {its}" for name, its in of.items() if its != probe}
        return without_effect(self, needed, f" on the probe {probe}")


@dataclass(frozen=True)
class KnnSettings(StageSettings):
    """Classify by weighted nearest neighbours: cosine similarity of features, Hamming distance of codes.
    Writes RUN/knn.json."""

    k: int = 0
    """Number of neighbours that vote. 0 means 20, or 200 from 200,000 training images on (as is customary for
    ImageNet)."""
    temperature: float = 0.0
    """Temperature T of the votes' weights exp(similarity / T). 0 means 0.07, or 0.1 if k is 200 by
    default."""

    def validate(self) -> None:
        super().validate()
        at_least(self, k=0, temperature=0)


@dataclass(frozen=True)
class FinetuneSettings(TrainingSettings):
    """Train the encoder and a linear layer with all or some labels. Writes RUN/finetune-LABELS/result.json.

    Each pair of --lr and --weight-decay is tried on a held-out part of the labelled training images; the best
    is retrained on all labels and evaluated once on the test set.
    """

    label_fraction: float = 1.0
    """Fraction of the training images whose labels are used: class-balanced, drawn with --seed."""
    subset_list: Path | None = None
    """Use these images instead: a file with one file name per line, such as SimCLR's public 1 % and 10 %
    lists."""
    epochs: int = 30
    """Number of epochs of each training."""
    min_steps: int = 500
    """Minimum number of steps of each training: with few labels, an epoch has few steps."""
    lr: tuple[float, ...] = (0.01, 0.05, 0.25)
    """Learning rates to choose from, for a batch of 256; the peak is lr * B / 256."""
    weight_decay: tuple[float, ...] = (0.0, 1e-4)
    """Weight decays to choose from; never applied to biases and normalisation."""
    validation_fraction: float = 0.1
    """Fraction of the labelled images that is held out to make this choice."""
    preset: str = field(default="", metadata=RUNTIME)
    """Preset to start from: imagenet-finetune."""

    def validate(self) -> None:
        super().validate()
        wanted = "features or latent: a code has no gradient"
        require(self.representation != "code", "representation", self.representation, wanted)
        require(0 < self.label_fraction <= 1, "label_fraction", self.label_fraction, "in (0, 1]")
        at_least(self, min_steps=0, epochs=1)
        for name, smallest in (("lr", 1e-12), ("weight_decay", 0.0)):
            values = getattr(self, name)
            wanted = f"one or more numbers, {'none negative' if smallest == 0 else 'all above 0'}"
            require(min(values, default=-1.0) >= smallest, name, values, wanted)
            require(len(set(values)) == len(values), name, values, "different numbers")
        require(
            0 < self.validation_fraction < 1, "validation_fraction", self.validation_fraction, "in (0, 1)"
        )


# SimCLR's recipes (Chen et al. 2020, B.6 and B.5): large batches and fixed values.
STAGE_PRESETS: dict[str, StageSettings] = {
    "imagenet-linear": LinearSettings(MISSING, probe="sgd", batch_size=4096, preset="imagenet-linear"),
    "imagenet-finetune": FinetuneSettings(  # with 1 % of the labels: --epochs 60
        MISSING, batch_size=4096, min_steps=0, lr=(0.05,), weight_decay=(0.0,), preset="imagenet-finetune"
    ),
}

Kind = TypeVar("Kind", bound=StageSettings)


def start_from(kind: type[Kind], name: str | None) -> Kind:
    """Return the preset of that name, or the defaults. Raises InputError listing the known names."""
    if not name:
        return kind(MISSING)
    known = {key: value for key, value in STAGE_PRESETS.items() if isinstance(value, kind)}
    choice("preset", name, tuple(known))
    return known[name]
