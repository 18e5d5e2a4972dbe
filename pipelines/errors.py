"""User-fixable errors: printed as one line, without a traceback, exit status 2."""

ON_ERROR = ("raise", "skip")  # what a command does with an image that can't be decoded


class InputError(ValueError):
    """Bad input or settings. The message names the file, field or index, and says what to do."""


def first_line(error: BaseException) -> str:
    """What an error says, in one line that is never empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
