"""The run folder: which stages are done, and what they were done with.

A stage owns one sub-folder. `state.json` is written before its first record and holds what the stage's result depends on (its
fingerprint); `summary.json` is written last. A stage is done iff `summary.json` exists and its fingerprint matches.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmdpo_trainers.errors import MmdpoError, RunFolderError
from mmdpo_trainers.files.atomic import read_json, write_atomic, writing
from mmdpo_trainers.files.fingerprint import Fingerprint
from mmdpo_trainers.files.locks import take

_GROWING = (".reference.jsonl",)
"""Kept beside a stage's files, and added to after it is done."""

_SHARED_RECORDS = "evaluate/benchmarks/"
"""Records of published benchmarks, which every evaluation of the run reads."""


def is_own(name: str) -> bool:
    """Whether a stage's name is that of an evaluation beside the run's, on a file of the user's own; no later stage depends on it."""
    return "/own/" in name


class RunFolder:
    """One run: a folder with a sub-folder per stage. Stage names are paths in it: `score`, `arms/sft/evaluate/after`."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        # Resolved, as the paths of pictures are: only then can it be told which of them lie in the run.
        self.path = Path(path).resolve()
        if self.path.exists() and not self.path.is_dir():
            raise RunFolderError(f"run folder {self.path} is a file; choose another --run-dir")

    def date(self) -> str:
        """The moment that stands for today in all of the run: kept in `date.json` by the first who asks, who should hold the run."""
        path = self.path / "date.json"
        if not path.exists():
            write_atomic(path, {"date": datetime.datetime.now().isoformat(timespec="seconds")})
        return str(read_json(path)["date"])

    def commit(self, model: str, revision: str) -> str | None:
        """The commit that a revision of a model on the hub was when the run began with it; None: this run has not, yet."""
        found = read_json(self.path / "models.json", missing={})
        return found.get(model, {}).get(revision)

    def keep_commit(self, model: str, revision: str, commit: str) -> None:
        """Keep that commit in `models.json`: {id: {revision: commit}}. The caller should hold the run."""
        found = read_json(self.path / "models.json", missing={})
        if revision not in found.get(model, {}):
            write_atomic(self.path / "models.json", {**found, model: {**found.get(model, {}), revision: commit}})

    def folder(self, name: str) -> Path:
        """The folder of a stage, created if need be."""
        folder = self.path / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run for this process. The kernel drops the lock of a killed process, so a stale one needs no remedy."""
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("a+b", buffering=0) as file:

            def held() -> str:
                file.seek(0)
                holder = file.read().decode(errors="replace").strip() or "unknown"
                return f"{self.path} is being written by another process (pid {holder}); wait for it, or choose another --run-dir"

            take(file, held)
            with writing(self.path / ".lock", "All that was done before is kept"):
                file.truncate(0)
                file.write(f"{os.getpid()} on {socket.gethostname()}".encode())
            yield

    def stage_is_done(self, name: str, fingerprint: Fingerprint) -> bool:
        """Whether the stage finished with this fingerprint.

        Raises RunFolderError, naming what changed, where the stage's files come from another configuration, input or model:
        nothing is thrown away without being asked for.
        """
        recorded = self._recorded(name)
        if recorded is None:
            return False
        same = fingerprint.matches(recorded["fingerprint"], recorded["parts"])
        if not same and not self.holds_output(name):
            self.remove(name)
            return False
        if not same:
            raise RunFolderError(self._other_settings(name, fingerprint.differences(recorded["parts"])))
        if not (self.path / name / "summary.json").exists():
            return False
        self._check_sizes(name, recorded.get("files", {}))
        return True

    def _other_settings(self, name: str, changes: Sequence[str]) -> str:
        """Message for a stage whose files are of other settings or input; a file of the user's own need not be put back as it was."""
        # Files of the run are named by their paths in it.
        own = [change.split(":")[0].removeprefix("input ") for change in changes if change.startswith("input ")]
        own = [file for file in own if "/" not in file]
        if own and len(own) == len(changes):
            made, back = f"another content of your own {', '.join(own)}", "To go on with the file as it is, pass"
        else:
            made, back = f"other settings ({'; '.join(changes) or 'its fingerprint'})", "Put the settings back, or pass"
        again = "to do this evaluation anew (no other changes), or give the file another name"
        if not is_own(name):
            again = f"{name} to remove this stage and the later ones, or choose another --run-dir"
        return f"{self.path / name} was made with {made}. {back} --restart {again}"

    def _check_sizes(self, name: str, sizes: Mapping[str, int]) -> None:
        """Raise RunFolderError where a file of a finished stage is not as long as it was: lines that are gone leave no other trace."""
        for file, size in sizes.items():
            path = self.path / name / file
            found = path.stat().st_size if path.exists() else None
            if found != size:
                now = "is gone" if found is None else f"has {found} bytes"
                remedy = (
                    f"or remove {path.parent}: it is made again"
                    if name.startswith(_SHARED_RECORDS)
                    else "or pass --restart to do this evaluation anew"
                    if is_own(name)
                    else f"pass --restart {name} to make it and what follows anew, or give a file of your own to the next stage with --input"
                )
                raise RunFolderError(
                    f"{path} {now}, and had {size} when the stage was done: it was damaged, or edited. Put it back, {remedy}"
                )

    def holds_output(self, name: str) -> bool:
        """Whether there is anything to lose in a stage's folder; an attempt that failed on its input leaves none."""
        own = self.path / name / "state.json"
        files = (file for file in own.parent.rglob("*") if file.is_file() and file != own)
        return any(not file.name.startswith(".") and file.stat().st_size for file in files)

    def fingerprint_of(self, name: str) -> str | None:
        """Digest that a stage was begun with, or None."""
        recorded = self._recorded(name)
        return None if recorded is None else str(recorded["fingerprint"])

    def _recorded(self, name: str) -> dict[str, Any] | None:
        state = self.path / name / "state.json"
        if state.exists():
            return dict(read_json(state))
        folder = self.path / name
        found = sorted(folder.iterdir()) if folder.is_dir() else []
        foreign = [p.name for p in found if not p.name.startswith(".") and not any(p.rglob("state.json"))]
        if foreign:
            raise RunFolderError(
                f"{folder} holds files this run did not write ({', '.join(foreign[:3])}): give your own file to a stage with "
                f"--input, or pass --restart {name} to remove them"
            )
        return None

    def begin_stage(self, name: str, fingerprint: Fingerprint) -> Path:
        """Record what the stage depends on before it writes anything; returns its folder. Continues an interrupted attempt."""
        if self._recorded(name) is None:
            state = {"fingerprint": fingerprint.digest, "parts": dict(fingerprint.parts), "seconds": 0.0}
            write_atomic(self.path / name / "state.json", state)
        return self.folder(name)

    def finish_stage(self, name: str, fingerprint: Fingerprint, summary: Mapping[str, Any]) -> dict[str, Any]:
        """Write the stage's `summary.json`, which makes it done; returns what was written."""
        state = self.path / name / "state.json"
        lines = [path for path in sorted(state.parent.glob("*.jsonl")) if not path.name.endswith(_GROWING)]
        write_atomic(state, {**read_json(state), "files": {path.name: path.stat().st_size for path in lines}})
        content = {**summary, "seconds": round(self.seconds(name), 3), "fingerprint": fingerprint.digest}
        write_atomic(self.path / name / "summary.json", content)
        return content

    def summary(self, name: str) -> dict[str, Any]:
        """The summary of a finished stage."""
        path = self.path / name / "summary.json"
        if not path.exists():
            raise RunFolderError(f"stage {name} of {self.path} is not done: {path} does not exist")
        return dict(read_json(path))

    def seconds(self, name: str) -> float:
        """Wall seconds spent in the stage so far, over all attempts."""
        state = self.path / name / "state.json"
        return float(read_json(state)["seconds"]) if state.exists() else 0.0

    @contextlib.contextmanager
    def clock(self, name: str, every: float = 2.0) -> Iterator[None]:
        """Add the time of this block to the stage's seconds; persisted every few seconds, so a kill loses at most that much."""
        state = self.path / name / "state.json"
        record = read_json(state)
        start, before = time.monotonic(), float(record["seconds"])
        stop = threading.Event()

        def save() -> None:
            write_atomic(state, {**record, "seconds": before + time.monotonic() - start})

        def beat() -> None:
            while not stop.wait(every):
                # A disk that is full for a moment must not end the clock; a full one ends the work itself.
                with contextlib.suppress(OSError, MmdpoError):
                    save()

        thread = threading.Thread(target=beat, daemon=True, name=f"clock of {name}")
        thread.start()
        try:
            yield
        except BaseException:
            stop.set()
            thread.join()
            with contextlib.suppress(OSError, MmdpoError):
                save()
            raise
        stop.set()
        thread.join()
        save()

    def remove(self, name: str) -> None:
        """Remove a stage with everything in its folder. It is renamed first, so a kill midway leaves no half of it."""
        folder = self.path / name
        if folder.exists():
            doomed = self.path / f".removed-{name.replace('/', '-')}-{time.time_ns()}"
            os.replace(folder, doomed)
        for leftover in self.path.glob(".removed-*"):
            shutil.rmtree(leftover, ignore_errors=True)
