"""Exported encoders on the Hugging Face Hub: hf://user/name names one, and is fetched once into its cache."""

from pathlib import Path

from pipelines.errors import InputError, first_line

PREFIX = "hf://"


def local_folder(name: str | Path) -> Path:
    """The folder of a run or an export: `name` itself; or of hf://user/name or hf://user/name@revision the
    copy in huggingface_hub's cache, which is fetched where it isn't there (HF_HUB_OFFLINE=1: never).

    Raises:
        InputError: huggingface_hub isn't installed, or there is no such repository, cached or to be reached.
    """
    if not str(name).startswith(PREFIX):
        return Path(name)
    repository, _, revision = str(name).removeprefix(PREFIX).partition("@")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError as error:
        raise InputError(f"{name}: needs huggingface_hub: pip install huggingface_hub") from error
    try:
        return Path(snapshot_download(repository, revision=revision or None))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(f"{name}: {first_line(error)}") from error
