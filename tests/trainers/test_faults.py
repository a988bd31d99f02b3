"""Faults of files: a full disk, damaged files, pictures that go. Each is said in one line with its remedy, and nothing done is lost."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import vllm_double
from launches import launch
from PIL import Image
from prompt_records import make_prompts
from tiny_models import make_tiny_llava, make_tiny_qwen
from training_cases import config, preference_records, tiny
from transformers import TrainerCallback

from mmdpo_trainers.cli import main as cli
from mmdpo_trainers.config.run_config import RunConfig
from mmdpo_trainers.data.images import content_key
from mmdpo_trainers.errors import DataError, MmdpoError, RunFolderError, StageError
from mmdpo_trainers.files.atomic import write_atomic
from mmdpo_trainers.files.json_lines import JsonLines
from mmdpo_trainers.processes import parts as shards
from mmdpo_trainers.processes.parts import part_file, part_files
from mmdpo_trainers.run.pipeline import restart_from, run_stage
from mmdpo_trainers.stages import generate
from mmdpo_trainers.stages.context import StageContext
from mmdpo_trainers.stages.folder import RunFolder
from mmdpo_trainers.training.trainer import PreferenceTrainer

KINDS = [("sequence", 3), ("grid", 4), ("pip", 2), ("sequence", 2), ("single", 1), ("single", 1)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llava(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prompts")
    make_prompts(folder, KINDS)
    return folder / "prompts.jsonl"


def context_of(folder: Path, model: Path, prompts: Path, stage: str = "generate") -> StageContext:
    options = {"input": str(prompts), "batch_size": 2, "max_new_tokens": 4}
    everything = {"sequence": {2: 1.0, 3: 1.0}, "grid": {4: 1.0}, "pip": {2: 1.0}}
    select = {
        "preset": "custom",
        "thresholds": everything,
        "max_length_ratio": None,
        "min_edit_distance": None,
        "min_perplexity": None,
    }
    values = {"model": str(model), "generate": options, "evaluate": options, "select": select}
    moment: Any = "before" if stage == "evaluate" else None
    return StageContext(run=RunFolder(folder), config=RunConfig.from_dict(values), stage=stage, moment=moment)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, model: Path, prompts: Path) -> Path:
    """An undisturbed run up to its pairs, with an evaluation."""
    # As in the tests, before which a fixture of theirs sees to it: more threads add numbers up in another order.
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole")
    for stage in ("generate", "score", "select", "evaluate"):
        run_stage(context_of(folder, model, prompts, stage))
    return folder


@pytest.fixture
def copy(tmp_path: Path, whole: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


RESPONSES = "generate/responses.jsonl"


# A full disk


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """What a test writes to its standard error may be larger."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def generate_below(limit: int, folder: Path, model: Path, prompts: Path, rank: int) -> None:
    with largest_file(limit):
        run_stage(context_of(folder, model, prompts))


def test_a_disk_that_fills_up_in_a_stage(
    tmp_path: Path, model: Path, prompts: Path, whole: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """By the kernel: a limit in the middle of the second batch's lines, so that a part of the write succeeds."""
    lines = (whole / RESPONSES).read_bytes().splitlines(keepends=True)
    limit = len(b"".join(lines[:2])) + len(lines[2]) // 2
    context = context_of(tmp_path, model, prompts)
    path = tmp_path / RESPONSES
    assert launch(1, partial(generate_below, limit, tmp_path, model, prompts)) == [2]
    error = capfd.readouterr().err
    assert f"[0] {path} cannot be written: file too large (" in error and "MiB are free there)" in error
    assert "Its 2 records so far are kept. Make room, or raise the limit, and start the same command again: it continues" in error
    assert path.read_bytes() == b"".join(lines[:2])
    assert run_stage(context)["responses"] == json.loads((whole / "generate/summary.json").read_text())["responses"]
    assert path.read_bytes() == b"".join(lines)


def full(monkeypatch: pytest.MonkeyPatch, function: str, wanted: Callable[[Any], bool]) -> None:
    original = getattr(os, function)

    def no_space(*args: Any) -> Any:
        if wanted(args[-1]):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*args)

    monkeypatch.setattr(os, function, no_space)


def lock_without_space(folder: Path, rank: int) -> None:
    with largest_file(0), RunFolder(folder).lock():
        pass


def test_no_space_for_the_lock(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert launch(1, partial(lock_without_space, tmp_path)) == [2]
    assert f"[0] {tmp_path}/.lock cannot be written: file too large" in capfd.readouterr().err


@pytest.mark.parametrize("file", ["state.json", "responses.jsonl", "summary.json"])
def test_no_space_for_any_file_of_a_stage(
    tmp_path: Path, model: Path, prompts: Path, whole: Path, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names the file that could not be written, although the stage's clock cannot be saved either."""
    context = context_of(tmp_path, model, prompts)
    context.run.date()  # made by whoever holds a run, before any stage
    path = tmp_path / RESPONSES
    message = f"generate/{file} cannot be written: no space left on device"
    with monkeypatch.context() as patch, pytest.raises(StageError, match=message):
        if file == "responses.jsonl":
            full(patch, "fsync", lambda descriptor: path.exists() and is_file(descriptor, ("responses.jsonl", ".tmp")))
        else:
            full(patch, "replace", lambda target: str(target).endswith(file))
        run_stage(context)
    assert not list(tmp_path.rglob("*.tmp")) and not list(tmp_path.rglob("summary.json"))
    run_stage(context)
    assert path.read_bytes() == (whole / RESPONSES).read_bytes()


def test_no_space_for_the_merged_file(tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "responses.jsonl"
    path.touch()
    shutil.copy(whole / RESPONSES, part_file(path, 3))
    batches = [[id] for id in ids(part_file(path, 3))]
    with monkeypatch.context() as patch, pytest.raises(StageError, match="All lines are in the part files beside it. Make room"):
        full(patch, "fsync", lambda descriptor: is_file(descriptor, ".tmp"))
        shards.merge_parts(path, batches)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["responses.jsonl", "responses.part-00003.jsonl"]
    assert path.read_bytes() == b""
    shards.merge_parts(path, batches)
    assert path.read_bytes() == (whole / RESPONSES).read_bytes() and part_files(path) == []


def is_file(descriptor: int, ending: str | tuple[str, ...]) -> bool:
    return os.readlink(f"/proc/self/fd/{descriptor}").endswith(ending)


def ids(path: Path) -> list[str]:
    return [json.loads(line)["id"] for line in path.read_bytes().splitlines()]


def test_other_errors_of_the_system_keep_their_kind(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError):
        write_atomic(tmp_path / "file" / "x", "")


# Damaged files


@pytest.mark.parametrize("damage", [b"\x00\x00\xff\n", b'{"id": "r0/sequ\n', b"[1]\n", b"5\n", b'{"other": 1}\n', b"null\n"])
def test_damage_in_the_middle_of_an_unfinished_stage(
    tmp_path: Path, model: Path, prompts: Path, whole: Path, damage: bytes
) -> None:
    """It is refused, by file and line; without that line the stage goes on and ends with the file of an undisturbed one."""
    lines = (whole / RESPONSES).read_bytes().splitlines(keepends=True)
    context = context_of(tmp_path, model, prompts)
    path = context.folder / "responses.jsonl"
    path.write_bytes(lines[0] + damage + lines[2] + lines[3])
    with pytest.raises(RunFolderError, match=r"responses.jsonl, line 2: not a line that was written here .*Take this line out"):
        generate.run(context)
    assert path.read_bytes() == lines[0] + damage + lines[2] + lines[3]
    path.write_bytes(lines[0] + lines[2] + lines[3])
    generate.run(context)
    assert path.read_bytes() == b"".join(lines)


@pytest.mark.parametrize("last", [b"[1]\n", b"5\n", b'{"other": 1}\n', b"null\n"])
def test_a_last_line_that_is_no_record_is_taken_off(tmp_path: Path, last: bytes) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"id": "a"}\n' + last)
    with JsonLines(path) as out:
        assert out.done_ids() == {"a"}
    assert path.read_bytes() == b'{"id": "a"}\n'


def edited(path: Path, change: Callable[[list[bytes]], list[bytes]]) -> None:
    path.write_bytes(b"".join(change(path.read_bytes().splitlines(keepends=True))))


@pytest.mark.parametrize(
    ("stage", "file"),
    [
        ("generate", RESPONSES),
        ("score", "score/scores.jsonl"),
        ("select", "select/pairs.jsonl"),
        ("evaluate", "evaluate/before/answers.jsonl"),
    ],
)
def test_lines_missing_from_a_finished_stage(copy: Path, whole: Path, model: Path, prompts: Path, stage: str, file: str) -> None:
    """Cut at the end of a line, a file still reads; its size says that it is not what the stage wrote."""
    context = context_of(copy, model, prompts, stage)
    edited(copy / file, lambda lines: lines[:-1])
    name = file.rsplit("/", 1)[0]
    with pytest.raises(RunFolderError, match=rf"{file} has \d+ bytes, and had \d+ .*Put it back, pass --restart {name}"):
        run_stage(context)
    (copy / file).unlink()
    with pytest.raises(RunFolderError, match=f"{file} is gone, and had"):
        run_stage(context)
    shutil.copy(whole / file, copy / file)
    assert run_stage(context)["fingerprint"]
    with (copy / file).with_name(f"{Path(file).stem}.reference.jsonl").open("w") as cache:
        cache.write("{}\n")
    assert run_stage(context)["fingerprint"], "a cache beside it may grow"


def test_damage_in_what_a_stage_reads(copy: Path, model: Path, prompts: Path) -> None:
    """Selecting from damaged scores, of which nothing is selected."""
    context = context_of(copy, model, prompts, "select")
    context.run.remove("select")
    for damage, message in (
        (lambda lines: [*lines[:2], b"\x00" * 40 + b"\n", *lines[3:]], r"scores.jsonl, line 3: not valid JSON .*--restart"),
        (lambda lines: [*lines[:-1], lines[-1][: len(lines[-1]) // 2]], r"scores.jsonl, line 6: not valid JSON .*--restart"),
    ):
        original = (copy / "score/scores.jsonl").read_bytes()
        edited(copy / "score/scores.jsonl", damage)
        with pytest.raises(MmdpoError, match=message):
            run_stage(context)
        assert not (copy / "select" / "pairs.jsonl").exists()
        (copy / "score/scores.jsonl").write_bytes(original)


@pytest.mark.parametrize("file", ["state.json", "summary.json"])
def test_a_damaged_state_or_summary(copy: Path, model: Path, prompts: Path, whole: Path, file: str) -> None:
    context = context_of(copy, model, prompts)
    os.truncate(copy / "generate" / file, 20)
    with pytest.raises(
        RunFolderError, match=f"generate/{file} is not valid JSON .*restore it, or restart the stage that wrote it"
    ):
        run_stage(context)
    restart_from(context.run, "generate")
    assert not (copy / "score").exists() and (copy / "evaluate/before/answers.jsonl").exists()
    run_stage(context)
    assert (copy / RESPONSES).read_bytes() == (whole / RESPONSES).read_bytes()


# Pictures that go


@pytest.mark.parametrize("damage", ["gone", "truncated", "another"])
def test_a_picture_of_the_run_that_is_not_what_it_was(tmp_path: Path, model: Path, damage: str) -> None:
    """Between two batches; named by its content as augment does, so that even another valid picture shows."""
    made = tmp_path / "run" / "augment"
    make_prompts(made, KINDS)
    (made / "images").mkdir()
    records = [json.loads(line) for line in (made / "prompts.jsonl").read_text().splitlines()]
    for record in records:
        names = [f"images/{content_key(Path(image).read_bytes())}.png" for image in record["images"]]
        for image, name in zip(record["images"], names, strict=True):
            shutil.move(image, made / name)
        record["images"] = names
    (made / "prompts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    context = context_of(tmp_path / "run", model, made / "prompts.jsonl")
    expected = context_of(tmp_path / "expected", model, made / "prompts.jsonl")
    run_stage(expected)

    # Three pictures: the last batch.
    picture, other = made / records[0]["images"][1], made / records[1]["images"][0]
    kept = picture.read_bytes()
    if damage == "gone":
        picture.unlink()
    elif damage == "truncated":
        os.truncate(picture, len(kept) // 2)
    else:
        shutil.copy(other, picture)
    with pytest.raises(DataError) as error:
        run_stage(context)
    assert f"record {records[0]['id']}: " in str(error.value) and str(picture) in str(error.value)
    assert ("run augment again" if damage == "gone" else "put it back, or make all anew with --restart augment") in str(
        error.value
    )
    assert len(ids(tmp_path / "run" / RESPONSES)) == 4
    picture.write_bytes(kept)
    run_stage(context)
    assert ids(tmp_path / "run" / RESPONSES) == ids(tmp_path / "expected" / RESPONSES)


def test_a_damaged_picture_of_the_users_own(tmp_path: Path, model: Path, prompts: Path, whole: Path) -> None:
    own = Path(shutil.copytree(prompts.parent, tmp_path / "own"))
    records = [json.loads(line) for line in prompts.read_text().splitlines()]
    for record in records:
        record["images"] = [str(own / Path(image).name) for image in record["images"]]
    (own / "prompts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    picture = Path(records[0]["images"][1])
    kept = picture.read_bytes()
    os.truncate(picture, len(kept) // 2)
    context = context_of(tmp_path / "run", model, own / "prompts.jsonl")
    with pytest.raises(
        DataError, match=rf"record {records[0]['id']}: truncated: {picture} is damaged or incomplete .*mend the path"
    ):
        run_stage(context)
    assert len(ids(tmp_path / "run" / RESPONSES)) == 4
    picture.write_bytes(kept)
    run_stage(context)
    assert ids(tmp_path / "run" / RESPONSES) == ids(whole / RESPONSES)


@pytest.mark.parametrize("stage", ["generate", "vllm", "score", "evaluate"])
def test_a_picture_that_the_processor_refuses(
    tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By every command that runs the model: 227 times as wide as high, which Qwen's processor does not take."""
    if stage == "vllm":
        vllm_double.install(monkeypatch)
    records = make_prompts(tmp_path / "data", [("single", 1), ("sequence", 2)])
    Image.new("RGB", (227 * 8, 8)).save(tmp_path / "data" / "wide.png")
    records[1]["images"][1] = str(tmp_path / "data" / "wide.png")
    path = tmp_path / "data" / "prompts.jsonl"
    path.write_text("".join(json.dumps({**record, "response": "red"}) + "\n" for record in records))
    flags = ["--run", tmp_path / "run", "--model", make_tiny_qwen(tmp_path / "model"), "--input", path]
    flags += ["--engine", "vllm"] if stage == "vllm" else ["--moment", "before"] if stage == "evaluate" else []
    assert cli.main([str(each) for each in ["generate" if stage == "vllm" else stage, *flags]]) == 2
    message = "record r1/sequence: the image processor refuses a picture: absolute aspect ratio must be smaller than 200, got 227.0; take"
    assert f"mmdpo: error: {message}" in capsys.readouterr().err


class AtEpoch(TrainerCallback):
    """Does something when the first epoch has ended."""

    def __init__(self, work: Callable[[], object]) -> None:
        self.work = work

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.epoch == 1:
            self.work()


@pytest.mark.parametrize("damage", ["gone", "another"])
def test_a_picture_that_goes_between_epochs(tmp_path: Path, damage: str) -> None:
    """Training ends with the record's name; started again with the picture back, it ends as if nothing had been."""
    torch.set_num_threads(1)
    folder = tmp_path / "pictures"
    folder.mkdir()
    records = preference_records(4)
    for number, record in enumerate(records):
        paths = [folder / f"{number}-{place}.png" for place in range(len(record["images"]))]
        for image, path in zip(record["images"], paths, strict=True):
            image.save(path)
        record["images"] = [str(path) for path in paths]
    picture = folder / "2-1.png"
    kept = picture.read_bytes()

    def train(output: Path, work: Callable[[], object] = lambda: None) -> dict[str, torch.Tensor]:
        loaded = tiny(tmp_path / "model", torch.float32)
        settings = config(
            output,
            num_train_epochs=2,
            max_steps=-1,
            per_device_train_batch_size=2,
            save_strategy="steps",
            save_steps=1,
            seed=3,
            precompute_ref_log_probs=True,
            reference_cache=str(tmp_path / "cache.jsonl"),
        )
        trainer = PreferenceTrainer(
            loaded.model, settings, processing_class=loaded.processor, train_dataset=records, callbacks=[AtEpoch(work)]
        )
        trainer.train(resume_from_checkpoint="auto")
        trainer.save_model(str(output / "final"))
        return safetensors.torch.load_file(output / "final" / "adapter_model.safetensors")

    expected = train(tmp_path / "undisturbed")
    change = picture.unlink if damage == "gone" else lambda: shutil.copy(folder / "0-0.png", picture)
    named = (
        r"record record-2: picture .*2-1.png: .*restore the file, or remove"
        if damage == "gone"
        else "record record-2: text or pictures changed since the reference was run over it; restore the file"
    )
    with pytest.raises(DataError, match=named):
        train(tmp_path / "disturbed", change)
    assert (tmp_path / "disturbed" / "checkpoint-2" / "complete.json").exists()
    picture.write_bytes(kept)
    found = train(tmp_path / "disturbed")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


# Files of the user's own


@pytest.mark.parametrize("stage", ["generate", "score", "evaluate", "select"])
def test_a_file_of_ones_own_that_changed(
    copy: Path, model: Path, whole: Path, stage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """It need not be put back as it was: the remedy is to do the stage anew with it."""
    own = copy.parent / "mine.jsonl"
    shutil.copy(whole / "score" / "scores.jsonl", own)
    records = [json.loads(line) for line in own.read_text().splitlines()]
    for record in records:
        record["images"] = [str((whole / "score" / image).resolve()) for image in record["images"]]
    own.write_text("".join(json.dumps(record) + "\n" for record in records))
    flags = [
        "--run",
        copy,
        "--model",
        model,
        "--input",
        own,
        "--restart",
        *(["--moment", "before"] if stage == "evaluate" else []),
    ]
    assert cli.main([stage, *map(str, flags)]) == 0
    own.write_text("".join(json.dumps({**record, "answer": "grey"}) + "\n" for record in records))
    flags.remove("--restart")
    assert cli.main([stage, *map(str, flags)]) == 2
    error = capsys.readouterr().err
    name = "evaluate/own/mine-before" if stage == "evaluate" else stage
    assert (
        f"{name} was made with another content of your own mine.jsonl. To go on with the file as it is, pass --restart" in error
    )
    assert ("no other changes" in error) == (stage == "evaluate") and "Put" not in error
    own.write_text("{\n")
    assert cli.main([stage, *map(str, flags), "--restart"]) == 2
    assert "mend this line of your file, or take it out" in capsys.readouterr().err
    own.write_text("")
    assert cli.main([stage, *map(str, flags), "--restart"]) == 2
    assert "write some into it" in capsys.readouterr().err
    own.unlink()
    assert cli.main([stage, *map(str, flags), "--restart"]) == 2
    assert f"{own} does not exist, and is none of the run's own files" in capsys.readouterr().err
