"""What a view is: the ranges from which each augmentation parameter is drawn."""

from dataclasses import dataclass
from math import isfinite

from pipelines.errors import InputError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ViewSettings:
    """The SimCLR augmentation (Chen et al. 2020), with torchvision's semantics for every range."""

    resolution: int = 224
    """Side of a view in pixels; crops are resized to it (anti-aliased bilinear)."""
    scale: tuple[float, float] = (0.08, 1.0)
    """Range of the crop's area, as a fraction of the image's area."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Range of the crop's aspect ratio (width / height), drawn log-uniformly."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    jitter: float = 0.8
    """Probability that the four colour operations below are applied, in random order."""
    brightness: float = 0.8
    """Strength x of the brightness jitter: the factor is drawn from [max(0, 1 - x), 1 + x]."""
    contrast: float = 0.8
    """Strength of the contrast jitter, as for --brightness."""
    saturation: float = 0.8
    """Strength of the saturation jitter, as for --brightness."""
    hue: float = 0.2
    """Strength x of the hue jitter: the shift is drawn from [-x, x], as a fraction of a full turn; at most
    0.5."""
    grey: float = 0.2
    """Probability of conversion to greyscale."""
    blur: float = 0.5
    """Probability of a Gaussian blur with a kernel of 10 % of the side."""
    sigma: tuple[float, float] = (0.1, 2.0)
    """Range of the blur's standard deviation, in pixels."""
    solarise: float = 0.0
    """Probability of solarisation, which inverts all values of at least 128/255."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Mean of each channel (values in [0, 1]), which is subtracted from the view."""
    std: tuple[float, float, float] = IMAGENET_STD
    """Standard deviation of each channel, by which the view is then divided."""
    evaluation_crop: float = 0.875
    """Side of the centre crop used in evaluation, as a fraction of the image's shorter side (224/256 on
    ImageNet)."""

    @property
    def kernel_size(self) -> int:
        """Taps of the blur: SimCLR's 10 % of the side, made odd (23 at 224 px, 3 at 32 px)."""
        return 2 * (self.resolution // 10 // 2) + 1

    def validate(self) -> None:
        """Raise InputError naming the first impossible value."""
        if not 8 <= self.resolution <= 4096:
            raise InputError(f"view.resolution must be in [8, 4096], got {self.resolution}")
        for name in ("flip", "jitter", "grey", "blur", "solarise"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"view.{name} is a probability in [0, 1], got {getattr(self, name)}")
        for name in ("brightness", "contrast", "saturation"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InputError(f"view.{name} must be at least 0, got {getattr(self, name)}")
        if not 0 <= self.hue <= 0.5:
            raise InputError(f"view.hue must be in [0, 0.5], got {self.hue}")
        for name, limit in (("scale", 1.0), ("ratio", float("inf")), ("sigma", float("inf"))):
            pair = getattr(self, name)
            if not (hasattr(pair, "__len__") and len(pair) == 2 and 0 < pair[0] <= pair[1] <= limit):
                raise InputError(f"view.{name} must be an increasing pair in (0, {limit}], got {pair}")
        if not 0 < self.evaluation_crop <= 1:
            raise InputError(f"view.evaluation_crop must be in (0, 1], got {self.evaluation_crop}")
        for name in ("mean", "std"):
            numbers = getattr(self, name)
            if len(numbers) != 3 or not all(map(isfinite, numbers)):
                raise InputError(f"view.{name} must be three finite numbers, got {numbers}")
        if min(self.std) <= 0:
            raise InputError(f"view.std must be positive, got {self.std}")
