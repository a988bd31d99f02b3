"""An exported folder on the Hugging Face Hub, by huggingface_hub. The token is its own: `hf auth login`, or HF_TOKEN."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmdpo_trainers.errors import ConfigError, StageError


def check(id: str, what: str = "--push-to-hub") -> None:
    """Raise ConfigError, before any work, for an id that there cannot be, and where the Hub cannot be reached or knows nobody."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(id)
    except HFValidationError as error:
        raise ConfigError(f"{what} {id}: expected a name such as me/my-model ({_line(error)})") from error
    _asked(f"{what} {id}", lambda api: api.whoami())


def upload(folder: Path, id: str, *, private: bool | None = None, revision: str | None = None) -> str:
    """Upload a folder to the repository `id`, made where there is none, on a branch of it; returns its address."""
    again = f"hf upload {id} {folder}"

    def work(api: Any) -> str:
        repository = api.create_repo(id, private=private, exist_ok=True)
        message = "Export of a training with mmdpo-kernels"
        if revision is not None:
            api.create_branch(repository.repo_id, branch=revision, exist_ok=True)
        api.upload_folder(repo_id=repository.repo_id, folder_path=str(folder), commit_message=message, revision=revision)
        return str(repository)

    return _asked(f"{folder} is whole, but could not be uploaded to {id}", work, f"; try again with `{again}`", StageError)


def _asked(what: str, work: Any, remedy: str = "", kind: type[Exception] = ConfigError) -> Any:
    """What the Hub answers. Its errors are said in one line; none of them holds the token."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    offline = "export without it, and upload the folder later with `hf upload`"
    try:
        return work(HfApi())
    except LocalTokenNotFoundError as error:
        raise kind(f"{what}: nobody is logged in; run `hf auth login`, or set HF_TOKEN{remedy}") from error
    except OfflineModeIsEnabled as error:
        raise kind(
            f"{what}: HF_HUB_OFFLINE is set, so nothing can be uploaded; {remedy.removeprefix('; ') or offline}"
        ) from error
    except HfHubHTTPError as error:
        raise kind(
            f"{what}: the Hub refused it ({_line(error)}){remedy or '; log in with `hf auth login`, or check the id'}"
        ) from error
    except Exception as error:
        # Whatever the HTTP client of this version of huggingface_hub raises where there is no network.
        raise kind(f"{what}: the Hub cannot be reached ({_line(error)}){remedy or f'; {offline}'}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
