"""The run folder: atomic files, JSON-lines that survive a kill, and which stages are done.

A stage owns one sub-folder. `state.json` is written before its first record and holds what the stage's result depends on (its
fingerprint); `summary.json` is written last. A stage is done iff `summary.json` exists and its fingerprint matches.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from mmdpo_trainers.disk import writing
from mmdpo_trainers.errors import MmdpoError, RunFolderError
from mmdpo_trainers.fingerprint import Fingerprint
from mmdpo_trainers.locks import take


def write_atomic(
    path: str | os.PathLike[str], content: str | bytes | Mapping[str, Any] | list[Any], *, durable: bool = True
) -> Path:
    """Write a file so that after a kill either the old or the whole new content is there.

    content: text, bytes, or a JSON-able mapping or list (written indented). durable=False does not wait for the disk: as safe
    against a killed process, not against a power cut. Returns the path.
    """
    path = Path(path)
    if not isinstance(content, str | bytes):
        content = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    data = content.encode() if isinstance(content, str) else content
    kept = "What was in it before is kept" if path.exists() else "What other files hold is kept"
    with writing(path, kept):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise
    return path


_GROWING = (".reference.jsonl",)
"""Kept beside a stage's files, and added to after it is done."""


def is_stage_file(path: str | os.PathLike[str]) -> bool:
    """Whether a stage of a run wrote the file: beside its files it keeps its state. Any other file is the user's own."""
    return (Path(path).parent / "state.json").is_file()


def is_own(name: str) -> bool:
    """Whether a stage's name is that of an evaluation beside the run's, on a file of the user's own; no later stage depends on it."""
    return "/own/" in name


def _mend(path: Path) -> str:
    if is_stage_file(path):
        return "put the file back as it was, or write it anew: --restart with the stage that wrote it"
    return "mend this line of your file, or take it out"


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read one JSON file; the error of a broken one names it."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RunFolderError(f"{path} is not valid JSON ({error}); restore it, or restart the stage that wrote it") from error


def read_jsonl(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON-lines file; blank lines are passed over.

    Raises RunFolderError naming file and line where a line is not a JSON object, or where the file is missing.
    """
    path = Path(path)
    if not path.is_file():
        raise RunFolderError(f"{path} does not exist: run the stage that writes it first, or give your own file with --input")
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise RunFolderError(f"{path}, line {number}: not valid JSON ({error}); {_mend(path)}") from error
            if not isinstance(record, dict):
                raise RunFolderError(f"{path}, line {number}: expected a JSON object, got {type(record).__name__}; {_mend(path)}")
            yield record


def line_places(path: Path) -> Iterator[tuple[str, int, int]]:
    """(id, first byte, bytes) of each whole line of a file that `JsonLines` wrote."""
    start = 0
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                return
            yield str(json.loads(line)["id"]), start, len(line)
            start += len(line)


class JsonLines:
    """A JSON-lines file that is appended to and continued after a kill.

    Opening truncates a torn last line (one that was not wholly written). Each `append` writes whole lines, then flushes to disk.

    >>> with JsonLines(folder / "responses.jsonl") as out:
    ...     done = out.done_ids()
    ...     for batch in batches_without(done):
    ...         out.append(answers(batch))
    """

    def __init__(self, path: str | os.PathLike[str], *, key: str = "id") -> None:
        self.path = Path(path)
        self.key = key
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._done = self._repair()
        # Without a buffer, which would be written again, and fail again, when the file is closed.
        self._file = self.path.open("ab", buffering=0)

    def _repair(self) -> set[str]:
        done: set[str] = set()
        if not self.path.exists():
            return done
        whole = 0
        with self.path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            for number, line in enumerate(file, start=1):
                try:
                    record = json.loads(line)
                    if not isinstance(record, dict) or self.key not in record or not line.endswith(b"\n"):
                        raise ValueError(f"expected an object with {self.key!r}, got {line[:40]!r}")
                except ValueError as error:
                    if whole + len(line) < size:
                        raise RunFolderError(
                            f"{self.path}, line {number}: not a line that was written here ({error}). Take this line out of the file: "
                            "what is missing is then made again"
                        ) from error
                    break
                whole += len(line)
                done.add(str(record.get(self.key)))
        if whole < size:
            os.truncate(self.path, whole)
        return done

    def done_ids(self) -> set[str]:
        """The keys of all records in the file, those of this process included."""
        return set(self._done)

    def __contains__(self, key: str) -> bool:
        return key in self._done

    def __len__(self) -> int:
        return len(self._done)

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Append records as whole lines, in one write, and wait until they are on disk."""
        records = list(records)
        if not records:
            return
        data = memoryview("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode())
        end = os.fstat(self._file.fileno()).st_size
        with writing(self.path, f"Its {len(self)} records so far are kept"):
            try:
                while data:
                    data = data[self._file.write(data) :]
                os.fsync(self._file.fileno())
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._file.fileno(), end)
                raise
        self._done.update(str(record.get(self.key)) for record in records)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


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
        if recorded["fingerprint"] != fingerprint.digest and not self.holds_output(name):
            self.remove(name)
            return False
        if recorded["fingerprint"] != fingerprint.digest:
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
                    "or pass --restart to do this evaluation anew"
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
