"""A run's quantisers, RUN/quantisers/CODE-BITS.safetensors, fitted on its training images when first used."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import asdict
from pathlib import Path

from lvssl.codes.controls import WORDS
from lvssl.codes.file import CodeFile, CodeFileError, found_beside, path_beside
from lvssl.codes.quantiser import FITS, Quantiser
from lvssl.evaluation.fitted import FittedOn, Origin, keep, kept
from lvssl.runs.run import Run, image_count
from lvssl.settings.pretrain import choice, require
from pipelines.errors import InputError

CODES = ("auto", *FITS)
QUANTISER = "quantiser"  # ending of the file beside the codes if the run's folder isn't writable


def own_bits(run: Run) -> int:
    """Return the length of the run's own code."""
    return run.network.family.code_bits(run.network.dim)


def chosen_code(run: Run, bits: int, code: str, images: int | None = None) -> str:
    """Resolve `--bits` and `--code` to one of FITS, to be fitted on this many images. If their number isn't
    given, `auto` prefers a quantiser that the run's folder already has, as an export's does. Raises
    InputError, before any work, if the run can't have such a code."""
    choice("code", code, CODES)
    if not bits:
        if code not in ("auto", "bits"):
            raise InputError(f"--code {code} needs --bits, the length of its codes")
        return "bits"
    if images is None and code == "auto":
        paths = {each: quantiser_path(run, each, bits) for each in ("opq", "itq")}
        fitted = [each for each, path in paths.items() if kept(path, run, {"bits": bits})]
        if fitted:
            return fitted[0]
    images = image_count(run.folder) if images is None else images
    return code_of_length(bits, code, run.network.feature_dim, own_bits(run), images)


def code_of_length(bits: int, code: str, features: int, own: int, images: int | None = None) -> str:
    """Resolve as `chosen_code` does, for this many features, bits of the own code, and images to fit on."""
    choice("code", code, CODES)
    require(bits >= 0, "bits", bits, "at least 0")
    most = {"bits": own, "opq": 8 * features, "itq": features, "pca": features}
    if code == "auto":
        code = best_code(bits, most, images)
    if code == "bits" and not own:
        raise InputError("--code bits: embeddings have no code of their own; choose opq, itq or pca")
    if bits > most[code]:
        raise InputError(f"--code {code}: at most {most[code]:,} bits are possible, not {bits:,}")
    if code == "opq":
        if bits % 8:
            raise InputError(f"--code opq needs whole bytes: --bits {bits + -bits % 8} instead of {bits}")
        require_faiss("--code opq")
    return code


def best_code(bits: int, most: dict[str, int], images: int | None) -> str:
    """Return the code that docs/codes.md recommends. If faiss or images are missing for it, take another and
    print a note, or raise InputError if no other is possible."""
    few = images is not None and images < WORDS
    suits_opq = bits % 8 == 0 and bits <= most["opq"]
    if suits_opq and has_faiss() and not few:
        return "opq"
    needed = f"{WORDS} training images or more, not {images}" if few else "faiss: pip install 'lvssl[faiss]'"
    if bits <= most["itq"]:
        if suits_opq:
            print(f"note: using itq instead of opq, which needs {needed}", file=sys.stderr, flush=True)
        return "itq"
    if suits_opq and bits > most["bits"]:
        raise InputError(f"--bits {bits}: codes of this length need opq, which needs {needed}")
    if bits > most["bits"]:
        largest = max(most["bits"], most["itq"])
        raise InputError(
            f"--bits {bits}: codes have at most {largest:,} bits or, in whole bytes by opq, {most['opq']:,}"
        )
    return "bits"


def has_faiss() -> bool:
    return importlib.util.find_spec("faiss") is not None


def require_faiss(option: str) -> None:
    if not has_faiss():
        raise InputError(f"{option} needs faiss: pip install 'lvssl[faiss]'")


def quantiser_of(images: FittedOn, code: str, bits: int) -> Quantiser | None:
    """Return the run's quantiser from its folder. It is fitted and saved first if the file is missing or
    belongs to another checkpoint or to other images. Returns None for an own code that isn't signs.

    Raises InputError: training images that can't be read, or too few of them.
    """
    run = images.run
    if code == "bits" and isinstance(run, Run):
        family = run.network.family
        signs = family.signs or not family.stochastic
        if not signs or own_bits(run) != family.location_count(run.network.dim):
            return None
    path = quantiser_path(run, code, bits)
    about = {"code": code, "bits": bits}
    if arrays := kept(path, run, about, images):
        return Quantiser(**arrays)
    sample = images.sample("locations" if code == "bits" else "features")
    try:
        quantiser = FITS[code](sample, bits)
    except ValueError as error:
        raise InputError(f"--code {code} --bits {bits}: {error}") from error
    keep(path, asdict(quantiser), run, about | images.about)
    return quantiser


def fitted_quantiser(run: Run, code: str, bits: int) -> Quantiser | None:
    """Return the quantiser that `lvssl encode` has fitted, on whichever images; None for the run's own code.
    Raises InputError if it isn't in the run's folder."""
    if code == "bits":
        return None
    if arrays := kept(quantiser_path(run, code, bits), run, {"bits": bits}):
        return Quantiser(**arrays)
    wanted = f"`lvssl encode {run.folder} --images IMAGES --bits {bits} --code {code}`"
    raise InputError(f"{quantiser_path(run, code, bits)} doesn't exist yet: {wanted} fits it")


def stored_quantiser(run: Origin, codes: CodeFile) -> Quantiser | None:
    """Return the quantiser that made the codes; None if they have none. Raises CodeFileError if it is no
    longer in the run's folder, nor beside the codes."""
    if codes.quantiser is None:
        return None
    path = quantiser_path(run, codes.quantiser["code"], codes.bits)
    places = path, found_beside(codes.path, QUANTISER)
    for place in places:
        arrays = kept(place, run, {"bits": codes.bits}, advice="remove it and encode the images again")
        quantiser = Quantiser(**arrays) if arrays else None
        if quantiser is not None and quantiser.digest == codes.quantiser["sha256"]:
            return quantiser
    raise CodeFileError(
        f"{codes.path}: its quantiser is neither {places[0]} nor {places[1]}; encode the images again, or "
        "restore one of these files"
    )


def keep_quantiser(run: Origin, codes: CodeFile, quantiser: Quantiser | None) -> None:
    """Write the quantiser that made the codes beside them if the run's folder couldn't keep it; otherwise
    remove the one that earlier codes have left there."""
    path = path_beside(codes.path, QUANTISER)
    path.unlink(missing_ok=True)
    try:
        stored_quantiser(run, codes)
    except CodeFileError:
        assert codes.quantiser is not None and quantiser is not None
        keep(path, asdict(quantiser), run, {"code": codes.quantiser["code"], "bits": codes.bits})


def stored_quantisers(run: Run) -> list[Path]:
    """Return the files of all quantisers of this checkpoint in the run's folder."""
    paths = sorted((run.folder / "quantisers").glob("*.safetensors"))
    return [path for path in paths if kept(path, run, {}) is not None]


def quantiser_path(run: Origin, code: str, bits: int) -> Path:
    return run.folder / "quantisers" / f"{code}-{bits}.safetensors"
