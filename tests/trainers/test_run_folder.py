"""The run folder: nothing torn, nothing lost, nothing overwritten that other settings made."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from mmdpo_trainers.data.records import relative_images
from mmdpo_trainers.errors import RunFolderError
from mmdpo_trainers.files.atomic import read_json, write_atomic
from mmdpo_trainers.files.fingerprint import Fingerprint, content_hash
from mmdpo_trainers.files.json_lines import JsonLines, read_jsonl
from mmdpo_trainers.stages.folder import RunFolder


def test_write_atomic_keeps_the_old_file_when_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_atomic(tmp_path / "deep" / "a.json", {"a": 1})
    assert read_json(path) == {"a": 1}

    def no_space(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="no space"):
        write_atomic(path, "half")
    assert read_json(path) == {"a": 1}
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


def test_json_lines_continues_after_the_last_whole_line(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    with JsonLines(path) as out:
        out.append([{"id": "a"}, {"id": "é"}])
    whole = path.read_bytes()
    for torn in (b'{"id": "c", "te', b"\x00\x00\x00", b'{"id": "c"}', b'{"id": \n'):
        path.write_bytes(whole + torn)
        with JsonLines(path) as out:
            assert out.done_ids() == {"a", "é"}
            assert path.read_bytes() == whole
    with JsonLines(path) as out:
        out.append([{"id": "c"}])
        assert "c" in out and len(out) == 3
    assert [record["id"] for record in read_jsonl(path)] == ["a", "é", "c"]


def test_json_lines_refuses_damage_before_the_end(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"id": "a"}\nbroken\n{"id": "b"}\n')
    with pytest.raises(RunFolderError, match=r"x\.jsonl, line 2"):
        JsonLines(path)
    assert path.read_text().count("\n") == 3


def test_read_jsonl_names_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"id": "a"}\n\n[1]\n')
    with pytest.raises(RunFolderError, match=r"x\.jsonl, line 3: expected a JSON object, got list"):
        list(read_jsonl(path))
    with pytest.raises(RunFolderError, match="does not exist.*--input"):
        list(read_jsonl(tmp_path / "none.jsonl"))


def test_stage_is_done_only_with_its_fingerprint(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    first = Fingerprint({"score.layer": 2, "input s/a": "x"})
    assert not run.stage_is_done("score", first)
    run.begin_stage("score", first)
    assert not run.stage_is_done("score", Fingerprint({"score.layer": 9})), "nothing is written yet, so nothing is lost"
    run.begin_stage("score", first)
    write_atomic(run.folder("score") / "scores.jsonl", "{}\n")
    assert not run.stage_is_done("score", first)
    with pytest.raises(RunFolderError, match=r"score\.layer: was 2, is 3.*--restart score"):
        run.stage_is_done("score", Fingerprint({"score.layer": 3, "input s/a": "x"}))
    run.finish_stage("score", first, {"records": 5})
    assert run.stage_is_done("score", first)
    assert run.summary("score")["records"] == 5
    with pytest.raises(RunFolderError, match="input s/a: was"):
        run.stage_is_done("score", Fingerprint({"score.layer": 2, "input s/a": "y"}))
    run.remove("score")
    assert not run.stage_is_done("score", Fingerprint({"score.layer": 3}))
    assert [p.name for p in tmp_path.iterdir()] == []


def test_files_of_unknown_origin_are_not_continued(tmp_path: Path) -> None:
    (tmp_path / "augment").mkdir()
    (tmp_path / "augment" / "prompts.jsonl").write_text("{}\n")
    with pytest.raises(RunFolderError, match=r"did not write \(prompts\.jsonl\).*--input"):
        RunFolder(tmp_path).begin_stage("augment", Fingerprint({}))


def test_a_stage_within_a_stage_is_not_foreign(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.begin_stage("evaluate/before", Fingerprint({"a": 1}))
    run.begin_stage("evaluate", Fingerprint({"b": 1}))
    assert not run.stage_is_done("evaluate", Fingerprint({"b": 1}))
    with pytest.raises(RunFolderError, match="b: was 1, is 2"):
        run.stage_is_done("evaluate", Fingerprint({"b": 2}))
    assert not run.stage_is_done("evaluate/before", Fingerprint({"a": 1}))


def test_seconds_add_up_over_attempts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder(tmp_path)
    fingerprint = Fingerprint({})
    run.begin_stage("train", fingerprint)
    state = tmp_path / "train" / "state.json"
    write_atomic(state, {**read_json(state), "seconds": 100.0})
    run.begin_stage("train", fingerprint)
    now = 5.0
    monkeypatch.setattr("mmdpo_trainers.stages.folder.time.monotonic", lambda: now)
    with pytest.raises(RuntimeError), run.clock("train"):
        now = 5.5
        raise RuntimeError
    assert run.seconds("train") == 100.5
    assert run.finish_stage("train", fingerprint, {})["seconds"] == 100.5


def test_two_processes_cannot_write_one_run_but_a_killed_one_leaves_no_lock(tmp_path: Path) -> None:
    program = textwrap.dedent(f"""
        import sys
        from mmdpo_trainers.stages.folder import RunFolder
        with RunFolder({str(tmp_path)!r}).lock():
            print("locked", flush=True)
            sys.stdin.read()
    """)
    holder = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline().strip() == "locked"
        with pytest.raises(RunFolderError, match=f"pid {holder.pid}"), RunFolder(tmp_path).lock():
            pass
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with RunFolder(tmp_path).lock():
        assert (tmp_path / ".lock").read_text() == f"{os.getpid()} on {socket.gethostname()}"


def test_a_file_system_without_locks_is_not_a_held_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*args: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    message = r"\.lock cannot be locked \(no locks available\): expected a file system with locks.*put the run folder on another"
    with pytest.raises(RunFolderError, match=message), RunFolder(tmp_path).lock():
        pass


def test_content_hash_sees_contents_names_and_big_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    first = content_hash(folder)
    (folder / ".cache").write_text("x")
    assert content_hash(folder) == first
    (folder / "config.json").write_text("[]")
    assert content_hash(folder) != first
    (folder / "config.json").rename(folder / "other.json")
    renamed = content_hash(folder)
    assert renamed != first
    monkeypatch.setattr("mmdpo_trainers.files.fingerprint._WHOLE_HASH_LIMIT", 10)
    monkeypatch.setattr("mmdpo_trainers.files.fingerprint._EDGE", 4)
    big = tmp_path / "big"
    hashes = set()
    for data in (b"0" * 20, b"1" + b"0" * 19, b"0" * 19 + b"1", b"0" * 21):
        big.write_bytes(data)
        hashes.add(content_hash(big))
    assert len(hashes) == 4
    with pytest.raises(RunFolderError, match="does not exist"):
        content_hash(tmp_path / "none")


def test_differences_are_json_safe() -> None:
    fingerprint = Fingerprint({"grid": {2: 0.5}, "size": (1, 2)})
    assert fingerprint.differences(json.loads(json.dumps(dict(fingerprint.parts)))) == []


def test_a_run_behind_a_link_keeps_its_pictures_relative(tmp_path: Path) -> None:
    (tmp_path / "real" / "run").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    picture = (tmp_path / "real/run/augment/images/a.png").resolve()
    for path in (tmp_path / "link" / "run", tmp_path / "real" / ".." / "link" / "run"):
        run = RunFolder(path)
        assert relative_images([str(picture)], run.folder("generate"), run.path) == ["../augment/images/a.png"]


def test_settings_newer_than_the_folder_count_unless_at_their_default() -> None:
    old = Fingerprint({"seed": 0, "score.layer": 2})
    same = Fingerprint({"seed": 0, "score.layer": 2, "score.best_by": "all"}, frozenset({"score.best_by", "score.layer"}))
    assert same.matches(old.digest, old.parts) and same.differences(old.parts) == []
    set_now = Fingerprint({"seed": 0, "score.layer": 2, "score.best_by": "format"}, frozenset({"score.layer"}))
    assert not set_now.matches(old.digest, old.parts) and len(set_now.differences(old.parts)) == 1
    other = Fingerprint({"seed": 0, "score.layer": 3, "score.best_by": "all"}, frozenset({"score.best_by"}))
    assert not other.matches(old.digest, old.parts) and other.differences(old.parts) == ["score.layer: was 2, is 3"]
