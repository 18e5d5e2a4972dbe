"""User-fixable errors: printed as one line, without a traceback, exit status 2."""

import os
import warnings

# What a command does with an image that can't be decoded. keep: skip it, unless it is a JPEG that Pillow can
# decode although libjpeg-turbo warns of damage (such as extraneous bytes); then Pillow's pixels are used.
ON_ERROR = ("raise", "skip", "keep")

# Said of an argument, which the shell leaves empty if a variable in it is unset.
IS_EMPTY = "is empty: give a value, or leave it out (is a variable of the shell unset?)"


class InputError(ValueError):
    """Bad input or settings. The message names the file, field or index, and says what to do."""


def first_line(error: BaseException) -> str:
    """The error's message in one line, which is never empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def in_words(error: OSError) -> str:
    """The error without its number: names of files, if there are any, then the system's message."""
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    return ": ".join(filter(None, [" -> ".join(names), error.strerror or str(error)]))


def hide_decoders_warnings() -> None:
    """Silence decoders' warnings in a command, which reports each damaged image once, with its name."""
    warnings.filterwarnings("ignore", module=r"PIL\.")
    warnings.filterwarnings("ignore", "The image decoding and encoding capabilities of TorchVision")
