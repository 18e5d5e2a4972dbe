"""User-fixable errors: printed as one line, without a traceback, exit status 2."""

import os
import warnings

# What a command does with an image that can't be decoded. keep: skip it, unless it is a JPEG of which Pillow
# makes an image where libjpeg-turbo warns of damage (extraneous bytes, for one); that image is used.
ON_ERROR = ("raise", "skip", "keep")


class InputError(ValueError):
    """Bad input or settings. The message names the file, field or index, and says what to do."""


def first_line(error: BaseException) -> str:
    """What an error says, in one line that is never empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def in_words(error: OSError) -> str:
    """Without the system's number: the files' names, where there are any, then what it says."""
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    return ": ".join(filter(None, [" -> ".join(names), error.strerror or str(error)]))


def hide_decoders_warnings() -> None:
    """For a command: what an image is like that can't be decoded is said once, with the image's name."""
    warnings.filterwarnings("ignore", module=r"PIL\.")
    warnings.filterwarnings("ignore", "The image decoding and encoding capabilities of TorchVision")
