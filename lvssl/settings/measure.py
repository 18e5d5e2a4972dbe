"""Settings of the commands that measure a run next to a control: evaluate, analyse, compression and study."""

from dataclasses import dataclass, field
from pathlib import Path

from tyro.conf import Positional

from lvssl.settings.fields import PER_CALL, POSITIONAL, RUNTIME, ReadsImages
from lvssl.settings.pretrain import at_least, require
from pipelines.errors import InputError

FEWEST = 40  # with fewer test images, `analyse` measures nothing


@dataclass(frozen=True)
class MeasuringSettings(ReadsImages):
    """Settings shared by `evaluate`, `analyse` and `compression`, which measure a run next to a control."""

    run: Positional[Path] = field(metadata=POSITIONAL)
    """Folder of the run. Results are written there, unless --out is given."""
    test: Path | None = None
    """Test images, converted by `convert-beton`. If omitted, test.beton (or val) next to the training
    images."""
    control: Path | None = None
    """Run of family `none` or `sign` to compare with. If omitted, the run `control` next to this one."""
    train: Path | None = None
    """Labelled training images, on which probes are fitted. If omitted, those of the pretraining."""
    on_error: str | None = None
    """What to do with an image that can't be decoded: raise (stop and name it), or skip (leave it out and
    report how many; where augmented views are needed, the next good image is used instead). If omitted, as in
    the pretraining."""
    out: Path | None = field(default=None, metadata=RUNTIME)
    """Folder for the result. If omitted, the run's folder."""
    overwrite: bool = field(default=False, metadata=PER_CALL)
    """Replace a result of other settings or of an older checkpoint."""


@dataclass(frozen=True)
class EvaluateSettings(MeasuringSettings):
    """Measure a linear probe and kNN on features and codes of a run and its control. Writes
    RUN/evaluation.json."""

    probe_epochs: int = 0
    """Number of epochs of the streamed probe, which is used from 200,000 training images on; 0 means 10, or
    more if these are fewer than 5,000 steps."""
    workers: int = field(default=0, metadata=RUNTIME)
    """Threads that decode images; 0 means the number of cores minus two, but 2 to 12."""

    def validate(self) -> None:
        """Raise InputError naming the first impossible value. Touches no file."""
        at_least(self, probe_epochs=0)


@dataclass(frozen=True)
class AnalyseSettings(MeasuringSettings):
    """Analyse a run next to its control: uncertainty, interpretability of single bits, regression. Writes
    RUN/analysis.json."""

    alone: bool = False
    """Don't compare with a control, even if there is one next to the run."""
    others: tuple[Path, ...] = ()
    """More runs whose uncertainty is compared, such as an MCInfoNCE run."""
    ood: tuple[Path, ...] = ()
    """Out-of-distribution data as .beton files, which an uncertainty should tell apart from the test images.
    Noise, textures and digits are always included."""
    max_images: int = 2000
    """Number of test images to measure (and twice as many training images); 0 means all."""
    samples: int = 8
    """Number of latent samples averaged in a prediction (K)."""
    seed: int = 0
    """Random seed."""

    def validate(self) -> None:
        """Raise InputError naming the first impossible value. Touches no file."""
        wanted = f"0 (all) or at least {FEWEST}: at least {FEWEST} test images are needed to analyse a run"
        require(self.max_images == 0 or self.max_images >= FEWEST, "max_images", self.max_images, wanted)
        at_least(self, samples=1, seed=0)
        if self.alone and self.control:
            raise InputError("--alone and --control contradict each other: leave one out")


@dataclass(frozen=True)
class CompressionSettings(MeasuringSettings):
    """Measure accuracy against the bits stored for each image: the run's code and its prefixes, next to sign,
    PCA + sign, ITQ, LSH, int8 and product codes of the control's features. Writes RUN/compression.json and
    .csv."""

    others: tuple[Path, ...] = ()
    """More runs to show on the same axes, with other families, betas or lengths."""
    bits: tuple[int, ...] = (16, 32, 64, 128, 256, 512, 1024, 2048)
    """Code lengths at which the controls are computed and the run's code is truncated."""
    max_images: int = 0
    """Number of training images to measure, evenly spaced, and a fifth as many test images. 0 means all, or
    20,000 if there are 200,000 or more."""
    top_n: int = 1000
    """The n of mAP@n."""
    seed: int = 0
    """Random seed of the controls that need one: ITQ, LSH, PQ, OPQ."""
    workers: int = field(default=0, metadata=RUNTIME)
    """Threads that decode images; 0 means the number of cores minus two, but 2 to 12."""


@dataclass(frozen=True)
class StudySettings(ReadsImages):
    """Pretrain several configurations (arms) over several seeds, measure them in the same way and compare
    them in pairs. Writes tables and figures."""

    train: Path
    """Training images, converted by `convert-beton`."""
    test: Path
    """Test images."""
    preset: str = "cifar10-small"
    """Preset with the settings that all arms share."""
    out: Path = Path("runs/study")
    """Folder for study.json, study.csv, study.md and figures, and for the run folders unless --runs is
    given."""
    runs: Path | None = None
    """Folder of the run folders, which are named ARM-sSEED. Finished runs are not trained again."""
    prefix: str = ""
    """Prefix of the names of the run folders: `fashion-mnist` makes fashion-mnist-none-s0."""
    arms: tuple[str, ...] = ("none", "sign", "bernoulli", "gaussian")
    """Each arm is a family, or NAME:setting=value,... with settings of latent and model, such as
    low:family=bernoulli,dim=64 or mcinfonce:family=vmf,site=proj,objective=mcinfonce. Every arm is
    compared with those named none, sign and mcinfonce, and every arm with a latent also with the best arm
    without one. mcinfonce has no variance and covariance terms: where the preset's objective is ntxent-vc,
    compare it with arms of objective=ntxent."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Random seeds; each arm is trained once per seed."""
    epochs: int = 0
    """Number of epochs of each run; 0 means that of the preset."""
    on_error: str = "raise"
    """What to do with an image that can't be decoded, in training and in measuring: raise or skip."""
    threads: int = 0
    """CPU threads used by torch; 0 means all cores."""
    max_images: int = 2000
    """Number of test images on which uncertainty and regression are measured. Accuracy and mAP use all images
    or, from 200,000 training images on, 20,000 of these and 4,000 test images."""
    ood: tuple[Path, ...] = ()
    """Out-of-distribution data as .beton files, as for `lvssl analyse`, or images of classes that were left
    out of the training images (`convert-beton --only-classes`). Noise, textures and digits are always
    included."""
    shard: str = ""
    """K/N: train and measure only every N-th run, from the K-th (1 to N), for an array job. Run the command
    once without it afterwards to collect the results."""
