"""User-fixable errors: printed as one line, without a traceback, exit status 2."""

# What a command does with an image that can't be decoded. keep: skip it, unless it is a JPEG of which Pillow
# makes an image where libjpeg-turbo warns of damage (extraneous bytes, for one); that image is used.
ON_ERROR = ("raise", "skip", "keep")


class InputError(ValueError):
    """Bad input or settings. The message names the file, field or index, and says what to do."""


def first_line(error: BaseException) -> str:
    """What an error says, in one line that is never empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
