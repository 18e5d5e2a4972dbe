"""All settings of a run: their names and defaults, the checks of their values, and the presets."""

import dataclasses
import difflib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lvssl.settings.fields import RUNTIME, ReadsImages, flag, require_finite, without_effect
from pipelines.decode import SOURCES
from pipelines.errors import ON_ERROR, InputError
from pipelines.views import ViewSettings

if TYPE_CHECKING:
    from lvssl.latents import Family

BACKBONES = ("tiny", "small", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152")  # and timm's
OF_VECTORS = ("ntxent", "ntxent-vc", "dcl", "vicreg")  # objectives with one vector per view
EACH_SAMPLE = ("mcinfonce", "ceb", "hib")  # objectives on samples instead of their mean
OBJECTIVES = (*OF_VECTORS, *EACH_SAMPLE)
SPREAD = {"ntxent-vc": (5.0, 1.0), "vicreg": (25.0, 1.0)}  # weights of variance and covariance
AUGMENTATIONS = ("auto", "reference", "numba", "triton")
OPTIMISERS = ("adamw", "sgd", "lars")
LR_RULES = ("given", "linear", "sqrt")
SINKS = ("tensorboard", "wandb", "mlflow")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
ORDERS = ("random", "quasi-random", "sequential")  # as in pipelines.order, whose import would load numba


@dataclass(frozen=True)
class ModelSettings:
    backbone: str = "resnet50"
    """Architecture: tiny (77 k parameters), small (1.2 M, for two CPU cores), resnet18, resnet34, resnet50,
    resnet101, resnet152, or the name of any timm model, such as convnext_tiny or vit_small_patch16_224."""
    hidden: int = 1024
    """Width of the projector's hidden layer."""
    projection: int = 128
    """Dimension of the projections that NT-Xent compares."""
    projector_norm: bool = False
    """Also apply batch normalisation to the projector's output, with a scale but no shift, as in SimCLR's own
    code."""
    init: str = ""
    """Initial weights of the backbone: a .safetensors or .pth file, the folder of a run or an export,
    hf://USER/NAME, or pretrained (timm's weights for that backbone, downloaded once). Random if omitted."""


@dataclass(frozen=True)
class LatentSettings:
    family: str = "bernoulli"
    """Distribution of the latent: none (no latent: the control), sign (no latent, but decorrelated sign
    bits), gaussian, bernoulli, categorical, beta, mixture, power_spherical, vmf or laplace; or two side by
    side, such as gaussian+bernoulli."""
    site: str = "repr"
    """Position of the latent: repr (between backbone and projector) or proj (at the projector's output)."""
    dim: int = 0
    """Number of latent dimensions; for `bernoulli`, the number of bits of the code. 0 means the dimension of
    the vector at --site."""
    categories: int = 16
    """Number of categories in each group of `categorical`; must be a power of two."""
    components: int = 4
    """Number of Gaussian components of `mixture`; must be a power of two."""
    depth: int = 1
    """Bits per dimension in the code of gaussian, beta, mixture and laplace, whose posterior means are
    quantised."""
    init_scale: float = 4.0
    """How far the posterior starts from the prior: the standard deviation of the logits, 1 / s of a Gaussian,
    or kappa / D."""
    init_scale_start: float | None = None
    """Anneal the scale of the logits (bernoulli, categorical) from this value to --init-scale. Constant if
    omitted."""
    estimator: str = "straight-through"
    """Gradient estimator of discrete samples: straight-through, or relaxed (binary concrete,
    Gumbel-softmax)."""
    relaxation: float = 0.5
    """Temperature of relaxed samples."""
    relaxation_start: float | None = None
    """Anneal the temperature of relaxed samples from this value to --relaxation. Constant if omitted."""
    anneal: float = 0.5
    """Fraction of the steps over which the logit scale and the relaxation temperature are annealed
    (geometrically) to their final values."""
    posterior_scale: str = "learnt"
    """Scale of the posterior (s, kappa, a + b), in families that have one: learnt (predicted for each image)
    or fixed (at its initial value)."""
    samples: int = 4
    """Number of latent samples drawn for each view (K)."""
    sample_reduction: str = "auto"
    """How the K samples are reduced: samples (averaged before the projector), projections (averaged after
    it), or losses (each sample enters the loss by itself). auto means losses for mcinfonce, ceb and hib, and
    samples otherwise."""
    objective: str = "ntxent"
    """Objective, to which the rate is added: ntxent (SimCLR's); ntxent-vc (with VICReg's variance and
    covariance terms added); dcl (without the positive in the denominator); vicreg (invariance, variance,
    covariance); mcinfonce (the mean over K is taken inside the logarithm); ceb (conditional entropy
    bottleneck, C-SimCLR); hib (match probabilities)."""
    invariance: float = 25.0
    """Weight of the invariance term of `vicreg`, the mean squared difference between the views."""
    variance: float | None = None
    """Weight of VICReg's variance term, a hinge that keeps the standard deviation of each projection
    dimension at 1 or above. If omitted: 25 with vicreg, 5 with ntxent-vc, otherwise 0. Can also be added to
    ntxent and dcl."""
    covariance: float | None = None
    """Weight of VICReg's covariance term, the squared covariances between projection dimensions. If omitted:
    1 with vicreg and ntxent-vc, otherwise 0. Can also be added to ntxent and dcl."""
    ceb_kappa: float = 10.0
    """Concentration of the backward encoder of `ceb`, a von Mises-Fisher distribution centred on the other
    view."""
    ceb_weight: float = 1.0
    """Weight of the residual information in `ceb`."""
    beta: float | None = None
    """Weight of the rate (KL divergence in nats). If omitted: 0.001 for the families whose noise would vanish
    without it (gaussian, beta, mixture, power_spherical, vmf, laplace; but not with mcinfonce and ceb),
    otherwise 0."""
    beta_schedule: str = "warmup"
    """Schedule of beta: constant, warmup (linear from 0), or cyclical (linear from 0 in the first half of
    each cycle)."""
    beta_warmup: float = 0.1
    """Fraction of the steps over which beta rises linearly from 0."""
    beta_cycles: int = 4
    """Number of cycles of the cyclical schedule."""
    free_nats: float = 0.0
    """An image's KL divergence is penalised only above this value."""
    decorrelation: float = 0.02
    """Weight of the penalty on squared covariances of the hard bits (sign, bernoulli). If the code is longer
    than h, its bits can't all be uncorrelated; the penalty then applies to the sign bits of h."""
    clean_path_weight: float = 0.7
    """Fraction of the NT-Xent loss that is computed on h itself, through a separate projector, rather than on
    samples."""

    @property
    def final_beta(self) -> float:
        """The weight of the rate at the end of its warm-up."""
        if self.beta is not None:
            return self.beta
        return 0.0 if self.objective in ("mcinfonce", "ceb") else self.distribution.default_beta

    @property
    def spread(self) -> tuple[float, float]:
        """The weights of variance and covariance of the projections."""
        variance, covariance = (
            usual if given is None else given
            for given, usual in zip((self.variance, self.covariance), SPREAD.get(self.objective, (0.0, 0.0)))
        )
        return variance, covariance

    @property
    def in_force(self) -> dict[str, Any]:
        """The settings that were left out or are `auto`, with the values in force."""
        usual: dict[str, Any] = dict(zip(("variance", "covariance"), self.spread))
        usual |= {"beta": self.final_beta, "sample_reduction": self.reduction}
        return {name: value for name, value in usual.items() if getattr(self, name) in (None, "auto")}

    @property
    def reduction(self) -> str:
        """How the samples are reduced, once `auto` is resolved."""
        if self.sample_reduction != "auto":
            return self.sample_reduction
        return "losses" if self.objective in EACH_SAMPLE else "samples"

    @cached_property
    def distribution(self) -> "Family":
        """The family with its options, taken from the settings of the same names, and the estimator.

        Raises:
            InputError: an unknown family; the message lists the known ones.
        """
        from lvssl.latents import family  # imported here because it loads torch

        try:
            return family(self.family, relaxed=self.estimator == "relaxed", **vars(self))
        except ValueError as error:
            raise InputError(f"--family: {error}") from None

    def validate(self) -> None:
        """Raise InputError naming the first impossible value."""
        family = self.distribution
        choice("site", self.site, ("repr", "proj"))
        choice("estimator", self.estimator, ("straight-through", "relaxed"))
        choice("posterior_scale", self.posterior_scale, ("learnt", "fixed"))
        choice("sample_reduction", self.sample_reduction, ("auto", "samples", "projections", "losses"))
        choice("objective", self.objective, OBJECTIVES)
        choice("beta_schedule", self.beta_schedule, ("constant", "warmup", "cyclical"))
        at_least(self, dim=0)
        if not family.stochastic:
            require(self.dim == 0, "dim", self.dim, f"0 for family {self.family}, which has no latent")
            require(self.site == "repr", "site", self.site, f"repr for family {self.family}")
        for name in ("categories", "components"):
            value = getattr(self, name)
            require(2 <= value <= 256 and value & (value - 1) == 0, name, value, "a power of two in [2, 256]")
        if self.dim and (wanted := family.validation_error(self.dim)):
            require(False, "dim", self.dim, wanted)
        require(1 <= self.depth <= 8, "depth", self.depth, "in [1, 8]")
        self._validate_schedules()
        self._validate_objective()

    def _validate_schedules(self) -> None:
        for name in ("init_scale", "init_scale_start", "relaxation", "relaxation_start"):
            value = getattr(self, name)
            require(value is None or value > 0, name, value, "above 0")
        discrete = self.distribution.discrete
        if self.init_scale_start is not None:
            wanted = f"left out for {self.family}, which has no logits"
            require(discrete, "init_scale_start", self.init_scale_start, wanted)
        if self.estimator == "relaxed":
            require(discrete, "estimator", self.estimator, f"straight-through for {self.family}")
        require(0 < self.anneal <= 1, "anneal", self.anneal, "in (0, 1]")
        require(self.final_beta >= 0, "beta", self.beta, "at least 0")
        require(0 <= self.beta_warmup <= 1, "beta_warmup", self.beta_warmup, "in [0, 1]")
        at_least(self, beta_cycles=1, free_nats=0, decorrelation=0)

    def _validate_objective(self) -> None:
        at_least(self, samples=1)
        require(0 <= self.clean_path_weight < 1, "clean_path_weight", self.clean_path_weight, "in [0, 1)")
        above_zero(self, "invariance")
        for name, weight in zip(("variance", "covariance"), self.spread):
            require(weight >= 0, name, weight, "at least 0")
            wanted = f"0 with --objective {self.objective}, which doesn't support it"
            require(self.objective in OF_VECTORS or weight == 0, name, weight, wanted)
        above_zero(self, "ceb_kappa")
        at_least(self, ceb_weight=0)
        if self.objective in EACH_SAMPLE:
            wanted = f"losses with --objective {self.objective}, which needs each sample"
            require(self.reduction == "losses", "sample_reduction", self.sample_reduction, wanted)
        if self.objective == "ceb":
            spherical = self.distribution.on_sphere and self.site == "proj"
            where = f"{self.family} at {self.site}"
            require(
                spherical, "objective", where, "combined with a family on the sphere at --site proj for ceb"
            )


@dataclass(frozen=True)
class OptimiserSettings:
    optimiser: str = "adamw"
    """adamw, sgd, or lars (You et al. 2017), which suits batches of thousands."""
    lr: float = 2e-3
    """Learning rate, from which --lr-rule derives the peak. A linear warm-up is followed by cosine decay to
    0."""
    lr_rule: str = "given"
    """Peak learning rate: given (--lr itself); linear (--lr * batch / 256; SimCLR with LARS: --lr 0.3); sqrt
    (--lr * sqrt(batch); --lr 0.075, better for batches below 1,024)."""
    weight_decay: float = 1e-4
    """Weight decay of linear and convolutional layers; never applied to biases and normalisation."""
    warmup_epochs: float = 1.0
    """Epochs of linear warm-up of the learning rate."""
    momentum: float = 0.9
    """Momentum of sgd and lars."""
    nesterov: bool = False
    """Use Nesterov momentum in sgd and lars."""
    trust: float = 1e-3
    """LARS's trust coefficient: the step of a layer is this fraction of its weights' norm, times the learning
    rate."""
    clip: float = 0.0
    """Maximum norm of the gradient over all parameters; 0 disables clipping."""

    def validate(self) -> None:
        """Raise InputError naming the first impossible value."""
        choice("optimiser", self.optimiser, OPTIMISERS)
        choice("lr_rule", self.lr_rule, LR_RULES)
        above_zero(self, "lr", "trust")
        at_least(self, weight_decay=0, warmup_epochs=0, clip=0)
        require(0 <= self.momentum < 1, "momentum", self.momentum, "in [0, 1)")
        if self.nesterov:
            require(self.momentum > 0, "momentum", self.momentum, "above 0 with --nesterov")


@dataclass(frozen=True)
class EngineSettings:
    """How a step is computed, not what it computes: speed, memory, multiple ranks, and handling of
    failures."""

    precision: str = "auto"
    """auto (bf16 on a GPU, fp32 on a CPU), fp32, bf16, or fp16 (with loss scaling). Posteriors and losses are
    always computed in fp32."""
    channels_last: bool = field(default=True, metadata=RUNTIME)
    """Store images and convolutions in channels-last layout, which is faster on GPUs and on CPUs."""
    compile: str = field(default="auto", metadata=RUNTIME | {"was": {True: "on", False: "off"}})
    """Compile the backbone with torch.compile. This takes a minute at the start; a resumed run reuses the
    result (RUN/compiled). on; off; auto: compile on a single GPU, for images of at least 128 px, if the run
    is long enough to make up for that minute (some 555,000 images of ResNet-50 at 224 px, over all epochs),
    but not with --graph on, --chunk, --recompute, --deterministic or fp16."""
    graph: str = field(default="auto", metadata=RUNTIME)
    """Record the kernel launches of a step once and replay them with one call (a CUDA graph). This is faster
    if network and images are so small that the GPU waits for the host. on; off; auto: on a single GPU, unless
    the backbone is compiled or --chunk, --recompute or fp16 is used. Starts once the weight of the rate is
    constant, see --beta-warmup."""
    recompute: bool = field(default=False, metadata=RUNTIME)
    """Activation checkpointing: keep only each block's input and compute the block again in the backward
    pass. Takes a third more time and a fraction of the memory, and gives the same result."""
    chunk: int = 0
    """Number of views that the backbone processes at once on each rank; 0 means all. Smaller values fit
    any batch on one GPU, for a third more time; the loss still sees the whole batch (GradCache, Gao et al.
    2021). Batch normalisation inside the backbone then uses the statistics of a chunk instead of the
    batch, so the result differs from that of --chunk 0 as that of a smaller batch would: use chunks of 256
    views or more."""
    deterministic: bool = field(default=False, metadata=RUNTIME)
    """Make runs on the same GPU bit-identical. Slower, because convolutions are not autotuned. Runs on a CPU
    with --threads 1 are bit-identical in any case."""
    sync_batch_norm: bool = True
    """With multiple ranks, compute batch statistics over all of them, so that the result doesn't depend on
    their number."""
    ema: float = 0.0
    """Decay of an exponential moving average of the weights, such as 0.999; the average is then what is
    evaluated. 0 disables it."""
    keep: int = field(default=2, metadata=RUNTIME)
    """Number of checkpoints to keep; at least 2, so that there is one to fall back to."""
    non_finite_steps: int = field(default=3, metadata=RUNTIME)
    """Abort the run after this many consecutive steps whose gradient isn't finite. Such a step leaves the
    weights unchanged."""
    timeout_minutes: float = field(default=10.0, metadata=RUNTIME)
    """With multiple ranks, how long to wait for a rank that is alive but late. A rank that has died is
    noticed sooner."""

    def validate(self) -> None:
        """Raise InputError naming the first impossible value."""
        choice("precision", self.precision, PRECISIONS)
        at_least(self, chunk=0)
        require(self.chunk != 1, "chunk", self.chunk, "at least 2: one view has no batch statistics")
        choice("compile", self.compile, ("auto", "on", "off"))
        if self.compile == "on" and self.recompute:  # a recomputed pass that differs can't be compiled
            raise InputError("--compile on and --recompute can't be combined: leave one out, or use --chunk")
        choice("graph", self.graph, ("auto", "on", "off"))
        if self.graph == "on" and (self.recompute or self.chunk or self.precision == "fp16"):
            raise InputError(
                "--graph on can't be combined with --recompute, --chunk or --precision fp16: leave it out"
            )
        require(0 <= self.ema < 1, "ema", self.ema, "in [0, 1)")
        at_least(self, keep=2, non_finite_steps=1)
        above_zero(self, "timeout_minutes")


@dataclass(frozen=True)
class PretrainSettings(ReadsImages):
    """Pretrain an encoder on unlabelled images."""

    data: Path = Path("train.beton")
    """Training images: a .beton or tars written by `convert-beton`, several of these as one set
    ('train-*.beton' in quotes, or a .txt with one path per line), or a folder of images as it is. Labels are
    used only by the online probes."""
    source: str = field(default="auto", metadata=RUNTIME)
    """How the images are read: auto (beton for a .beton, otherwise folder), beton, folder (files or tars,
    without conversion), dali (NVIDIA DALI decodes and crops on the run's device), or nvjpeg (torchvision's
    nvJPEG decodes and a custom kernel crops, on the run's GPU)."""
    order: str = "random"
    """Order of the images in an epoch: random, quasi-random (by storage blocks, for sets larger than memory),
    or sequential."""
    on_error: str = "raise"
    """What to do with an image that can't be decoded: raise (stop and name it), skip (count it and use the
    next good image instead), or keep (as skip, but use what Pillow decodes from a damaged JPEG, such as one
    with extraneous bytes)."""
    out: Path = field(default=Path("runs/pretrain"), metadata=RUNTIME)
    """Folder of the run. It must not exist yet, except with --resume."""
    epochs: int = 100
    """Number of passes over the training images."""
    batch_size: int = 256
    """Images per step, over all ranks; NT-Xent compares twice as many vectors."""
    temperature: float = 0.1
    """Temperature of NT-Xent."""
    seed: int = 0
    """Random seed of weights, image order, augmentation and latent noise."""
    model: ModelSettings = field(default_factory=ModelSettings)
    latent: LatentSettings = field(default_factory=LatentSettings)
    optimiser: OptimiserSettings = field(default_factory=OptimiserSettings)
    engine: EngineSettings = field(default_factory=EngineSettings)
    view: ViewSettings = field(default_factory=ViewSettings)
    workers: int = field(default=0, metadata=RUNTIME)
    """Threads that decode and augment images; 0 means each rank's share of the cores minus two, but 2 to
    12."""
    threads: int = field(default=0, metadata=RUNTIME)
    """CPU threads used by torch; 0 means all cores."""
    device: str = field(default="auto", metadata=RUNTIME)
    """auto (a GPU if there is one), cpu, cuda, cuda:1 ..."""
    augmentation: str = field(default="auto", metadata=RUNTIME)
    """Implementation of the augmentation: auto (triton on a GPU, otherwise numba), reference (plain torch,
    slow), numba or triton."""
    checkpoint_minutes: float = field(default=10.0, metadata=RUNTIME)
    """Minutes between checkpoints, which are written while training continues; one is also written at the end
    of the first epoch and of the run."""
    log_every: int = field(default=10, metadata=RUNTIME)
    """Number of steps between two lines of metrics.jsonl."""
    log: tuple[str, ...] = field(default=("tensorboard",), metadata=RUNTIME)
    """Where to log the figures of metrics.jsonl as well: any of tensorboard, wandb and mlflow, or none of
    them (--log without a value)."""
    preset: str = field(default="", metadata=RUNTIME)
    """Preset to start from; other options override its values."""

    def validate(self) -> None:
        """Raise InputError naming the first impossible value. Touches no file."""
        require_finite(self)
        require_backbone(self.model.backbone)
        choice("augmentation", self.augmentation, AUGMENTATIONS)
        choice("source", self.source, SOURCES)
        choice("order", self.order, ORDERS)
        choice("on_error", self.on_error, ON_ERROR)
        for name in self.log:
            choice("log", name, SINKS)
        at_least(self, workers=0, epochs=1, batch_size=1, log_every=1)
        require(self.batch_size >= 2, "batch_size", self.batch_size, "at least 2, for there to be negatives")
        above_zero(self, "temperature")
        require(0 <= self.seed < 2**63, "seed", self.seed, "in [0, 2^63)")
        at_least(self, threads=0)
        above_zero(self, "checkpoint_minutes")
        at_least(self.model, hidden=1, projection=2)
        self.latent.validate()
        self.optimiser.validate()
        self.engine.validate()
        self.view.validate()
        if self.engine.recompute:
            require_blocks(self.model.backbone)

    def require_used(self) -> None:
        """Raise InputError for an option without effect. Runs that were begun with one can still be read, and
        what only concerns the latent may be repeated for a control, which has none."""
        from lvssl.latents import families_with

        latent, optimiser = self.latent, self.optimiser.optimiser
        annealed = (latent.init_scale_start, latent.relaxation_start) != (None, None)
        in_effect = {
            "--estimator relaxed": (latent.estimator == "relaxed", ("relaxation", "relaxation_start")),
            "--init-scale-start or --relaxation-start": (annealed, ("anneal",)),
            "--beta-schedule cyclical": (latent.beta_schedule == "cyclical", ("beta_cycles",)),
            "--objective vicreg": (latent.objective == "vicreg", ("invariance",)),
            "--objective ceb": (latent.objective == "ceb", ("ceb_kappa", "ceb_weight")),
            "--optimiser sgd or lars": (optimiser in ("sgd", "lars"), ("momentum", "nesterov")),
            "--optimiser lars": (optimiser == "lars", ("trust",)),
        }
        without = {name: needed for needed, (has, names) in in_effect.items() if not has for name in names}
        for option in ("categories", "components", "depth"):
            having = families_with(option)
            if set(having).isdisjoint(latent.family.split("+")):
                without[option] = f"--family {' or '.join(having)}"
        of = self if latent.distribution.stochastic else self.optimiser
        if said := without_effect(of, without):
            raise InputError(said)


def require(ok: bool, name: str, value: object, wanted: str) -> None:
    """Raise InputError unless `ok` is true; comparisons with NaN never are."""
    if not ok:
        raise InputError(f"{flag(name)} must be {wanted}, got {value}")


def at_least(settings: object, **lowest: float) -> None:
    """Raise InputError for the first named setting that is below its minimum."""
    for name, low in lowest.items():
        value = getattr(settings, name)
        require(value >= low, name, value, f"at least {low}")


def above_zero(settings: object, *names: str) -> None:
    """Raise InputError for the first named setting that isn't above 0."""
    for name in names:
        value = getattr(settings, name)
        require(value > 0, name, value, "above 0")


def require_blocks(backbone: str) -> None:
    """Raise InputError unless the backbone has the blocks that --recompute computes again."""
    if backbone not in BACKBONES:
        raise InputError(f"--recompute only supports ResNets, not {backbone}: use --chunk")


def require_backbone(name: str) -> None:
    """Raise InputError unless the backbone is one of BACKBONES or of timm."""
    if name in BACKBONES:
        return
    import timm  # takes seconds, and is rarely needed

    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), 3)
        hint = f" (such as {', '.join(near)})" if near else ""
        raise InputError(f"unknown backbone {name!r}; known: {', '.join(BACKBONES)}, and timm's models{hint}")


def choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(f"unknown {name} {value!r}; known: {', '.join(allowed)}")


SMALL_VIEW = ViewSettings(resolution=32, scale=(0.2, 1.0), blur=0.0, evaluation_crop=1.0)

DEFAULTS = "folder-r50"  # the preset that has the default settings
PRESETS: dict[str, PretrainSettings] = {
    # 8x8 greyscale: no colour to jitter beyond brightness and contrast, and a mirrored digit is not a digit.
    "digits": PretrainSettings(
        epochs=40,
        batch_size=128,
        temperature=0.2,
        model=ModelSettings(backbone="tiny", hidden=64, projection=64),
        view=ViewSettings(
            resolution=8, scale=(0.4, 1.0), flip=0.0, brightness=0.4, contrast=0.4, saturation=0.0, hue=0.0,
            grey=0.0, blur=0.0, mean=(0.3, 0.3, 0.3), std=(0.37, 0.37, 0.37), evaluation_crop=1.0,
        ),
    ),
    "fashion-mnist": PretrainSettings(
        epochs=8,
        temperature=0.2,
        model=ModelSettings(backbone="small", hidden=256),
        latent=LatentSettings(objective="ntxent-vc"),
        view=dataclasses.replace(
            SMALL_VIEW, resolution=28, brightness=0.4, contrast=0.4, saturation=0.0, hue=0.0, grey=0.0,
            mean=(0.286, 0.286, 0.286), std=(0.353, 0.353, 0.353),
        ),
    ),
    "cifar10-small": PretrainSettings(
        epochs=8,
        temperature=0.2,
        model=ModelSettings(backbone="small", hidden=256),
        latent=LatentSettings(objective="ntxent-vc"),
        view=dataclasses.replace(
            SMALL_VIEW, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1,
            mean=(0.491, 0.482, 0.447), std=(0.247, 0.243, 0.262),
        ),
    ),
}  # fmt: skip
PRESETS["cifar10-r18"] = dataclasses.replace(
    PRESETS["cifar10-small"],
    epochs=200,
    model=ModelSettings(backbone="resnet18", hidden=512),
    latent=LatentSettings(),  # the effect of ntxent-vc in long trainings is unknown
)
PRESETS[DEFAULTS] = PretrainSettings()  # 224 px, the published augmentation

# Recipes of papers, with the family in the preset's name: SimCLR itself has no latent; its variant has one.
SIMCLR_MODEL = ModelSettings(backbone="resnet50", hidden=2048, projection=128, projector_norm=True)
PRESETS["simclr-cifar10-r50"] = dataclasses.replace(
    PRESETS["cifar10-r18"],
    epochs=1000,
    batch_size=1024,
    temperature=0.5,  # best of 0.1, 0.5 and 1 at all batch sizes
    model=SIMCLR_MODEL,
    latent=LatentSettings(family="none"),
    optimiser=OptimiserSettings(
        optimiser="lars", lr=1.0, lr_rule="linear", weight_decay=1e-6, warmup_epochs=10
    ),
    view=dataclasses.replace(PRESETS["cifar10-r18"].view, scale=(0.08, 1.0)),
)
for epochs in (100, 200, 800):
    PRESETS[f"simclr-imagenet-r50-{epochs}ep"] = PretrainSettings(
        epochs=epochs,
        batch_size=4096,  # 512 per GPU on eight GPUs; --chunk makes it fit on fewer
        model=SIMCLR_MODEL,
        latent=LatentSettings(family="none"),
        optimiser=OptimiserSettings(  # AdamW and SGD are unstable at batch sizes of thousands
            optimiser="lars", lr=0.3, lr_rule="linear", weight_decay=1e-6, warmup_epochs=10
        ),
    )
for name in [name for name in PRESETS if name.startswith("simclr-")]:
    PRESETS[name.replace("simclr-", "bernoulli-")] = dataclasses.replace(
        PRESETS[name], latent=LatentSettings(family="bernoulli")
    )
PRESETS = {name: dataclasses.replace(settings, preset=name) for name, settings in PRESETS.items()}


def preset(name: str) -> PretrainSettings:
    """Return the preset of that name. Raises InputError listing the known ones."""
    choice("preset", name, tuple(PRESETS))
    return PRESETS[name]
