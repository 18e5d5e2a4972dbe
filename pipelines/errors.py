"""The one kind of error that a person can mend: printed as one line, without a traceback, exit status 2."""


class InputError(ValueError):
    """Bad input or settings. The message names the file, field or index, and says what to do."""
