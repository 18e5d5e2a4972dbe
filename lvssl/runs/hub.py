"""Exported encoders on the Hugging Face Hub, named hf://user/name: download (once) and upload."""

import shlex
from pathlib import Path
from typing import Any

from pipelines.errors import InputError, first_line

PREFIX = "hf://"


def local_folder(name: str | Path) -> Path:
    """Return the folder of a run or an export: `name` itself or, for hf://user/name[@revision], the copy in
    huggingface_hub's cache, which is downloaded if it isn't there (HF_HUB_OFFLINE=1: never).

    Raises:
        InputError: huggingface_hub isn't installed, or the repository is neither cached nor reachable.
    """
    if not str(name).startswith(PREFIX):
        return Path(name)
    repository, _, revision = str(name).removeprefix(PREFIX).partition("@")
    hub = library(str(name))
    try:
        return Path(hub.snapshot_download(repository, revision=revision or None))
    except hub.errors.LocalEntryNotFoundError as error:
        raise InputError(
            f"{name}: the Hub can't be reached ({first_line(error.__cause__ or error)}), and the local cache "
            "doesn't contain it: check the network and the name, or pass a local folder"
        ) from error
    except (hub.errors.HFValidationError, hub.errors.HfHubHTTPError, OSError) as error:
        raise InputError(
            f"{name}: {first_line(error)}; check the name (USER/NAME) and the network, or pass a folder"
        ) from error


def library(wanted_by: str) -> Any:
    """Import huggingface_hub. Raises InputError if it isn't installed."""
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError as error:
        raise InputError(f"{wanted_by}: needs huggingface_hub: pip install huggingface_hub") from error
    return huggingface_hub


class Upload:
    """A model repository user/name to which a folder is uploaded; checked before the folder is made.

    Raises InputError if the name is invalid, huggingface_hub isn't installed, or the Hub accepts no token.
    """

    def __init__(self, repository: str, public: bool) -> None:
        self.what = f"--push {repository}"
        self.repository, self.private, hub = repository, not public, library(self.what)
        if repository.count("/") != 1:
            raise InputError(f"{self.what}: must be USER/NAME")
        self.api = hub.HfApi()
        try:
            hub.utils.validate_repo_id(repository)
            self.api.whoami()
        except Exception as error:  # of huggingface_hub, its HTTP client or the network, each its own kind
            raise InputError(f"{self.what}: {first_line(error)}; `hf auth login` stores a token") from error

    def send(self, folder: Path) -> None:
        """Upload every file as one commit, into a new repository or as the next version.

        Raises InputError if the Hub doesn't accept it; the folder stays.
        """
        try:
            self.api.create_repo(self.repository, private=self.private, exist_ok=True)
            self.api.upload_folder(repo_id=self.repository, folder_path=folder, commit_message="lvssl export")
        except Exception as error:
            again = f"hf upload {self.repository} {shlex.quote(str(folder))}"
            raise InputError(
                f"{self.what}: {first_line(error)}; {folder} is complete, `{again}` retries the upload"
            ) from error
