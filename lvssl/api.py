"""The library from Python: load a trained encoder, encode images, search among them, pretrain.

Every function runs the code of the command of the same name, so both give the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn as nn
from PIL import Image, ImageOps
from torch import Tensor
from tqdm.auto import tqdm

from lvssl.codes.file import CodeFileError
from lvssl.codes.search import hamming_search
from lvssl.evaluation.density import density_of, stored_density
from lvssl.evaluation.encoder import (
    Neighbour,
    Queries,
    Searcher,
    centre_crop,
    code_path,
    holds_codes,
    holds_many,
    image_set,
    in_words,
    require_arithmetic,
    say_left_out,
)
from lvssl.evaluation.fitted import TrainingImages
from lvssl.evaluation.quantisers import own_bits
from lvssl.models import inference
from lvssl.models.device import pick_device
from lvssl.models.inference import BATCH, Batches, device_of
from lvssl.models.network import LVNet
from lvssl.runs.hub import PREFIX, local_folder
from lvssl.runs.labels import readable
from lvssl.runs.run import Run, load_encoder
from lvssl.settings.fields import all_settings, from_dict, replaced
from lvssl.settings.pretrain import PretrainSettings, choice
from lvssl.settings.pretrain import preset as named
from lvssl.training.pretrain import pretrain as train
from pipelines.cores import loader_threads
from pipelines.decode.pixels import as_rgb, decode_rgb
from pipelines.errors import ON_ERROR, InputError, first_line
from pipelines.formats import jpeg
from pipelines.normalise import normalise
from pipelines.views import ViewSettings

__all__ = ["Encoding", "Model", "Neighbour", "load", "preset", "pretrain"]

Picture: TypeAlias = "str | Path | Image.Image | np.ndarray"
# A path of an image, or of a set of images (a folder, a .beton, tars, a parquet file); a PIL image; an array
# uint8 [H, W], [H, W, 1], [H, W, 3] or [N, H, W, 1 or 3]; or several images, each a path, PIL image or array.
Images: TypeAlias = "Picture | Iterable[Picture]"


@dataclass(frozen=True, eq=False)
class Encoding:
    """The features, codes and uncertainties of N images.

    >>> encoding = lvssl.load("run").encode("photos")
    >>> encoding.features.shape, encoding.code.shape, encoding.bits
    ((12, 64), (12, 8), 64)
    >>> bits = np.unpackbits(encoding.code, axis=1, count=encoding.bits, bitorder="little")
    >>> bits.shape
    (12, 64)
    """

    names: list[str]
    """Paths relative to the folder, or as given; positions for arrays and PIL images."""
    features: np.ndarray
    """float32 [N, F]."""
    code: np.ndarray
    """uint8 [N, ceil(bits / 8)], packed: bit d is bit d % 8 of byte d // 8."""
    uncertainty: np.ndarray
    """float32 [N], higher is less certain: the negative log-density in nats per dimension, if `lvssl encode`
    or `Model.fit_density` has fitted a density to the training images; otherwise the posterior's own score,
    for most families its entropy in nats, or the negative norm of the features if there is no latent."""
    bits: int
    """Length of a code in bits."""
    checkpoint: str
    """Digest of the checkpoint that was loaded. Only codes of the same checkpoint can be compared. Later
    changes to the network's weights don't show in it: compare only codes that were made since, and don't rely
    on a density that was fitted before."""

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True, eq=False)
class Model:
    """A trained encoder, as returned by `lvssl.load`.

    >>> model = lvssl.load("run")
    >>> model.bits, model.resolution
    (64, 8)
    """

    run: Run

    @classmethod
    def from_pretrained(cls, name: str | Path, device: str | torch.device | None = None) -> Model:
        """Same as `lvssl.load`, under the name usual in Hugging Face libraries: a folder, or user/name.

        >>> lvssl.Model.from_pretrained("export").bits
        64
        """
        return load(name if Path(name).exists() else f"{PREFIX}{name}", device)

    @property
    def network(self) -> LVNet:
        """Backbone and posterior head, in eval mode. `network.encode(images)` returns features and posterior.
        Changes to its weights aren't seen by `Encoding.checkpoint`.

        >>> model = lvssl.load("run")
        >>> features, posterior = model.network.encode(model.preprocess("photos"))
        >>> posterior.entropy().shape
        torch.Size([12])
        """
        return self.run.network

    @property
    def torch_module(self) -> nn.Module:
        """The backbone alone, in eval mode: maps images [N, 3, R, R] from `preprocess` to features [N, F].

        >>> model = lvssl.load("run")
        >>> classifier = torch.nn.Sequential(model.torch_module, torch.nn.Linear(64, 10))
        >>> classifier(model.preprocess("photos")).shape
        torch.Size([12, 10])
        """
        return self.network.backbone

    @property
    def view(self) -> ViewSettings:
        """How images are cropped, resized and normalised: `evaluation_crop`, `resolution`, `mean`, `std`.

        >>> lvssl.load("run").view.evaluation_crop
        1.0
        """
        return self.run.settings.view

    @property
    def resolution(self) -> int:
        """Side of the network's input images, in pixels.

        >>> lvssl.load("run").resolution
        8
        """
        return self.view.resolution

    @property
    def bits(self) -> int:
        """Length of a code in bits.

        >>> lvssl.load("run").bits
        64
        """
        return own_bits(self.run)

    def encode(
        self, images: Images, batch_size: int = BATCH, workers: int = 0, on_error: str = "raise"
    ) -> Encoding:
        """Compute features, packed codes and uncertainties of images, without augmentation.

        Shows a progress bar in terminals and notebooks. With the default batch size of 256, features and
        codes are bit-identical to those of `lvssl encode`; with other batch sizes, sums may be rounded
        differently.

        Args:
            images: the path of an image or of a set (a folder, searched recursively; a .beton, tars, a
                parquet file), a PIL image, an array uint8 [H, W, 3] or [N, H, W, 3], or an iterable of paths,
                PIL images and arrays, such as a list or a generator.
            batch_size: number of images that the network processes at once, at least 1.
            workers: threads that decode images; 0 means the number of cores minus two, but 2 to 12.
            on_error: what to do with an image that can't be decoded: raise, skip (leave it out, with a
                warning), or keep (as skip, but use what Pillow decodes from a damaged JPEG).

        Raises:
            InputError: there are no images, one is damaged (it is named), or an array has a wrong shape or
                type.

        >>> model = lvssl.load("run")
        >>> model.encode("photos").names[:2]
        ['a/0.png', 'a/1.png']
        >>> len(model.encode([PIL.Image.open("photos/a/0.png"), np.zeros((9, 7, 3), np.uint8)]))
        2
        """
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {batch_size}")
        choice("on_error", on_error, ON_ERROR)
        given, density = opened(self.run, images, batch_size, workers, on_error), stored_density(self.run)
        features, codes, uncertainty, rows = [], [], [], []
        with tqdm(total=given.total, desc="encode", unit="img", disable=None, leave=False) as bar:
            for part in inference.encode(self.network, given.batches, self.view):
                features.append(part.features.float().cpu().numpy())
                codes.append(part.codes())
                if density is None:
                    uncertainty.append(part.posterior.uncertainty().float().cpu().numpy())
                else:
                    uncertainty.append(density(part.stages.cpu().numpy()))
                rows += part.rows.tolist()
                bar.update(len(part.rows))
        if not rows:
            raise InputError("there are no images to encode")
        return Encoding(
            [given.names[row] for row in rows],
            np.concatenate(features),
            np.concatenate(codes),
            np.concatenate(uncertainty),
            self.bits,
            self.run.digest,
        )

    def fit_density(self, train: str | Path | None = None) -> None:
        """Fit the density that `encode` uses as uncertainty, as `lvssl encode` does, and save it.

        Args:
            train: training images, of which at most 50,000 are used. If omitted, those of the pretraining.

        Raises:
            InputError: the training images can't be read.

        >>> model = lvssl.load("run")
        >>> model.fit_density("photos")
        >>> model.encode("photos").uncertainty.shape
        (12,)
        """
        density_of(TrainingImages(self.run, None if train is None else Path(train)))

    def search(
        self,
        queries: Images | Encoding,
        codes: Encoding | str | Path | None = None,
        k: int = 10,
        symmetric: bool = False,
    ) -> list[list[Neighbour]]:
        """Find the k images whose codes are nearest to each query, nearest first, as `lvssl search` does.

        Args:
            queries: images, in any form that `encode` accepts, or the result of `encode`.
            codes: what to search: the result of `encode`, or a code file of `lvssl encode`. If omitted,
                codes.lvcodes in the run's folder.
            k: number of neighbours per query; all images if there are fewer.
            symmetric: compare codes with codes, by Hamming distance. Otherwise, if the code file allows it,
                queries that are images stay real-valued, and distances are squared Euclidean distances.

        Raises:
            InputError: there are no such images, k is below 1, or the codes are of another model.
            CodeFileError: there is no code file, or it is damaged or of another model or device; or the
                queries are the result of `encode`, and the file holds other codes than the model's own.

        >>> model = lvssl.load("run")
        >>> photos = model.encode("photos")
        >>> nearest = model.search("photos/a/0.png", photos, k=3)[0]
        >>> nearest[0].name, nearest[0].distance
        ('a/0.png', 0)
        """
        if k < 1:
            raise InputError(f"k must be at least 1, got {k}")
        if isinstance(queries, Encoding):
            self._require_own(queries)
        if isinstance(codes, Encoding):
            self._require_own(codes)
            asked = queries if isinstance(queries, Encoding) else self.encode(queries)
            rows, distances = hamming_search(asked.code, codes.code, min(k, len(codes)))
            pairs = (zip(*pair) for pair in zip(rows.tolist(), distances.tolist()))
            return [[Neighbour(codes.names[row], distance) for row, distance in pair] for pair in pairs]
        path = code_path(self.run.folder, None if codes is None else Path(codes))
        searcher = Searcher(self.run, path, symmetric)
        if isinstance(queries, Encoding):
            if (searcher.encoder.code, searcher.codes.bits) != ("bits", queries.bits):
                raise CodeFileError(
                    f"{path} has {in_words(searcher.codes)}, the queries {queries.bits} bits of the model's "
                    "own code: pass the images as queries"
                )
            return searcher.nearest(as_queries(queries), k)
        require_arithmetic(searcher.codes, self.run)
        given = opened(self.run, queries)
        parts = searcher.queries(given.names, given.batches)
        return [found for part in parts for found in searcher.nearest(part, k)]

    def crops(self, images: Images) -> np.ndarray:
        """Crop the centre square of each image and resize it to R pixels, without normalisation.

        Returns uint8 [N, R, R, 3], the input of the `encoder.onnx` that `lvssl export` writes.

        >>> lvssl.load("run").crops("photos").shape
        (12, 8, 8, 3)
        """
        parts = [crops.numpy() for crops, _ in opened(self.run, images).batches]
        if not parts:
            raise InputError("there are no images to crop")
        return np.concatenate(parts)

    def preprocess(self, images: Images) -> Tensor:
        """Crop and normalise images for `torch_module`: float32 [N, 3, R, R], on the model's device.

        >>> lvssl.load("run").preprocess(PIL.Image.open("photos/a/0.png")).shape
        torch.Size([1, 3, 8, 8])
        """
        crops = torch.from_numpy(self.crops(images)).to(device_of(self.network))
        return normalise(crops, self.view)

    def _require_own(self, encoding: Encoding) -> None:
        if encoding.checkpoint != self.run.digest:
            raise InputError(
                f"these codes are of checkpoint {encoding.checkpoint[:12]}, not of {self.run.digest[:12]}: "
                "encode the images with this model"
            )


def load(folder: str | Path, device: str | torch.device | None = None) -> Model:
    """Load the encoder of a run's newest checkpoint, or of a folder written by `lvssl export`.

    Args:
        folder: path of the folder; or hf://user/name (or hf://user/name@revision), an export on the Hugging
            Face Hub, which huggingface_hub downloads once.
        device: cpu, cuda, cuda:1 ... If omitted, a GPU if there is one.

    Raises:
        InputError: there is no such folder or no checkpoint in it, the export is damaged, there is no such
            device, or the Hub can't be reached.

    >>> lvssl.load("run", device="cpu").bits
    64
    >>> lvssl.load("export").bits
    64
    """
    current = torch.cuda.current_device() if torch.cuda.is_available() else 0
    run = load_encoder(local_folder(folder), None if device is None else pick_device(str(device), current))
    jpeg.read_up_to(run.settings.max_pixels)
    return Model(run)


def preset(name: str = "", **options: Any) -> PretrainSettings:
    """Settings for `pretrain`: those of a preset (`lvssl presets` lists them), with any option of
    `lvssl pretrain` as a keyword argument.

    Raises:
        InputError: unknown preset or option, or a value of a wrong type.

    >>> settings = lvssl.preset("digits", data="train.beton", out="new", epochs=1, backbone="tiny")
    >>> settings.model.backbone, settings.epochs, settings.batch_size
    ('tiny', 1, 128)
    """
    settings = named(name) if name else PretrainSettings()
    groups = {setting.option: setting.name.rpartition(".")[0] for setting in all_settings(settings)}
    values = {}
    for option, value in options.items():
        choice("option", option, tuple(groups))
        kind = type(getattr(settings, groups[option]) if groups[option] else settings)
        values[option] = getattr(from_dict(kind, {option: as_json(value)}, "preset"), option)
    return replaced(settings, values)


def as_json(value: Any) -> Any:
    """Return an option's value as `from_dict` takes it: paths and devices as text, arrays as lists."""
    if isinstance(value, Path | torch.device):
        return str(value)
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    return list(value) if isinstance(value, tuple) else value


def pretrain(settings: PretrainSettings, resume: bool = False) -> Model:
    """Train an encoder without labels, as `lvssl pretrain` does, and load it.

    Args:
        settings: from `preset`.
        resume: continue the run in `settings.out` from its newest checkpoint.

    Raises:
        InputError: invalid settings or data; nothing has been written.
        FloatingPointError: the loss stayed non-finite.
        MemoryError: out of memory; the message names the setting to change.

    >>> settings = lvssl.preset("digits", data="train.beton", out="new", epochs=1, workers=1)
    >>> lvssl.pretrain(settings).bits
    64
    """
    if not isinstance(settings, PretrainSettings):
        raise InputError(f"settings: the result of lvssl.preset(...) is expected, not {settings!r}")
    train(settings, resume)
    return load(settings.out)


def as_queries(encoding: Encoding) -> Queries:
    """Return queries from codes alone, without what requires the images."""
    nothing = np.empty((len(encoding), 0), np.float32)
    return Queries(encoding.names, encoding.code, nothing, nothing, encoding.uncertainty.tolist())


# ---------------------------------------------------------------------------------------- images


@dataclass(frozen=True)
class Opened:
    """Images as batches of crops, and their names by position. For images from an iterator, names are
    appended as they are read."""

    batches: Batches
    names: list[str]
    total: int | None  # number of images, if it is known


def opened(
    run: Run, images: Images, batch_size: int = BATCH, workers: int = 0, on_error: str = "raise"
) -> Opened:
    """Open any images that `Model.encode` accepts. Raises InputError, also while the batches are read."""
    if isinstance(images, str | Path) and holds_many(Path(images)):
        if holds_codes(Path(images)):
            raise InputError(f"{images}: holds codes, not images")
        source, names = image_set(Path(images))
        view = run.settings.view
        batches = readable(source, view, workers, on_error, left_out=say_left_out, batch_size=batch_size)
        return Opened(batches, names, len(names))
    if isinstance(images, np.ndarray):
        images = list(images) if images.ndim == 4 else [images]
    elif isinstance(images, str | Path | Image.Image):
        images = [images]
    elif isinstance(images, bytes) or not isinstance(images, Iterable):
        raise InputError(
            f"images: paths, PIL images or arrays are expected, one or several, not {type(images).__name__}"
        )
    names = []
    total = len(images) if isinstance(images, Sequence) else None
    return Opened(in_turn(run, images, names, batch_size, workers, on_error), names, total)


def in_turn(
    run: Run, images: Iterable[Picture], names: list[str], batch_size: int, workers: int, on_error: str
) -> Iterator[tuple[Tensor, np.ndarray]]:
    """Yield centre crops uint8 [B, R, R, 3] and positions int64 [B] of images from an iterator; their names
    are appended to `names`."""

    def crop(position: int, image: Picture) -> np.ndarray | InputError:
        try:
            pixels = pixels_of(image, f"image {position}", keep=on_error == "keep")
            return centre_crop(run.settings.view, pixels)
        except InputError as error:
            if on_error == "raise":
                raise
            return error

    numbered = enumerate(images)
    with ThreadPoolExecutor(loader_threads(workers)) as pool:
        while chunk := list(islice(numbered, batch_size)):
            names += [str(image if isinstance(image, str | Path) else i) for i, image in chunk]
            found = list(pool.map(crop, *zip(*chunk)))
            for error in (one for one in found if isinstance(one, InputError)):
                say_left_out(str(error))
            good = [(one, i) for one, (i, _) in zip(found, chunk) if isinstance(one, np.ndarray)]
            if good:
                crops, rows = zip(*good)
                yield torch.from_numpy(np.stack(crops)), np.array(rows)


def pixels_of(image: Picture, name: str, keep: bool = False) -> np.ndarray:
    """Return the RGB pixels of one image, uint8 [H, W, 3], upright; `keep` as in `decode_rgb`. InputErrors
    name the file or `name`."""
    if isinstance(image, str | Path):
        return decode_rgb(Path(image), keep=keep)
    if isinstance(image, Image.Image):
        if image.mode.startswith(("I", "F")):
            raise InputError(
                f"{name}: PIL mode {image.mode} does not have 8 bits: convert it, or pass its path"
            )
        try:  # an image that was opened from a file is decoded now
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
        except Exception as error:  # whatever a decoder raises is about this image alone
            raise InputError(f"{name}: not an image, or damaged ({first_line(error)})") from error
    if not isinstance(image, np.ndarray):
        raise InputError(f"{name}: a path, a PIL image or an array is expected, not {type(image).__name__}")
    grey = image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 1)
    if image.dtype != np.uint8 or image.size == 0 or not (grey or (image.ndim == 3 and image.shape[2] == 3)):
        raise InputError(
            f"{name}: an array uint8 [H, W], [H, W, 1] or [H, W, 3] is expected (several: [N, H, W, 3]), "
            f"not {image.dtype} {list(image.shape)}"
        )
    return as_rgb(image)
