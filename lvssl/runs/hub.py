"""Exported encoders on the Hugging Face Hub: hf://user/name names one; fetched once, or uploaded."""

import shlex
from pathlib import Path
from typing import Any

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
    hub = library(str(name))
    try:
        return Path(hub.snapshot_download(repository, revision=revision or None))
    except hub.errors.LocalEntryNotFoundError as error:
        raise InputError(
            f"{name}: the Hub can't be reached ({first_line(error.__cause__ or error)}), and its cache here "
            "doesn't hold it: check the network and the name, or name a folder on this machine"
        ) from error
    except (hub.errors.HFValidationError, hub.errors.HfHubHTTPError, OSError) as error:
        raise InputError(
            f"{name}: {first_line(error)}; check the name (USER/NAME) and the network, or give a folder"
        ) from error


def library(wanted_by: str) -> Any:
    """huggingface_hub. Raises InputError: it isn't installed."""
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError as error:
        raise InputError(f"{wanted_by}: needs huggingface_hub: pip install huggingface_hub") from error
    return huggingface_hub


class Upload:
    """A model repository user/name that a folder is uploaded to, checked before there is a folder.

    Raises InputError: no such name, huggingface_hub isn't installed, or the Hub knows no token of this user.
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
            raise InputError(f"{self.what}: {first_line(error)}; `hf auth login` keeps a token") from error

    def send(self, folder: Path) -> None:
        """Upload every file as one commit, into a new repository or as the next version.

        Raises InputError: the Hub doesn't take it. The folder stays.
        """
        try:
            self.api.create_repo(self.repository, private=self.private, exist_ok=True)
            self.api.upload_folder(repo_id=self.repository, folder_path=folder, commit_message="lvssl export")
        except Exception as error:
            again = f"hf upload {self.repository} {shlex.quote(str(folder))}"
            raise InputError(
                f"{self.what}: {first_line(error)}; {folder} is whole, `{again}` tries again"
            ) from error
