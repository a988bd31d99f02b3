"""Stands in for `huggingface_hub.HfApi`, and keeps what it is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


class RepoUrl(str):
    """An address that knows its repository."""

    repo_id = ""


class Hub:
    asked: list[tuple[str, Any]] = []
    refused: Exception | None = None

    @classmethod
    def put_in(cls, monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
        """Put it in the real one's place for a test, with a token in the environment that nothing is to show."""
        monkeypatch.setattr("huggingface_hub.HfApi", cls)
        monkeypatch.setattr(cls, "asked", [])
        monkeypatch.setattr(cls, "refused", None)
        monkeypatch.setenv("HF_TOKEN", "hf_notforanyone")
        return cls

    def whoami(self) -> dict[str, str]:
        self.asked.append(("whoami", None))
        if self.refused is not None:
            raise self.refused
        return {"name": "me"}

    def create_repo(self, repo_id: str, *, token: None = None, **options: Any) -> RepoUrl:
        self.asked.append(("create_repo", (repo_id, options)))
        url = RepoUrl(f"https://example.org/{repo_id}")
        url.repo_id = repo_id
        return url

    def create_branch(self, repo_id: str, *, branch: str, exist_ok: bool) -> None:
        assert exist_ok
        self.asked.append(("create_branch", (repo_id, branch)))

    def upload_folder(self, **options: Any) -> None:
        files = sorted(path.name for path in Path(options["folder_path"]).iterdir())
        self.asked.append(("upload_folder", (options["repo_id"], files)))
