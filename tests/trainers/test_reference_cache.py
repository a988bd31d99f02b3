"""The reference cache: exact numbers, nothing lost to a kill, nothing stale used, one fingerprint a reference."""

from __future__ import annotations

import copy
import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from processes import end_of, start
from training_cases import preference_records, tiny

from mmdpo_kernels import patch_model
from mmdpo_trainers.data.corruption import Corruption
from mmdpo_trainers.data.pair_records import BRANCHES
from mmdpo_trainers.errors import DataError, RunFolderError, StaleCacheError
from mmdpo_trainers.processes.progress import Progress
from mmdpo_trainers.training import head
from mmdpo_trainers.training.batches.collator import PreferenceCollator
from mmdpo_trainers.training.reference.cache import ReferenceCache, remove_cache
from mmdpo_trainers.training.reference.model_hash import model_fingerprint, reference_header
from mmdpo_trainers.training.reference.precompute import Precomputed, precompute

HEADER = {"weights": "a" * 32, "dtype": "float32", "autocast": False}
ENTRIES = {
    f"key{number}": {"chosen": -math.pi * 10**number, "rejected": math.nextafter(-1.0, 0.0), "corrupted": -5e-324}
    for number in range(4)
}


def filled(path: Path) -> ReferenceCache:
    cache = ReferenceCache(path, HEADER)
    cache.add(dict(list(ENTRIES.items())[:1]))
    cache.add(dict(list(ENTRIES.items())[1:]))
    return cache


def contents(path: Path) -> dict[str, Any]:
    cache = ReferenceCache(path, HEADER)
    return {key: cache.get(key) for key in ENTRIES if key in cache}


def test_numbers_come_back_exactly(tmp_path: Path) -> None:
    path = tmp_path / "made/on/demand.jsonl"
    empty = ReferenceCache(path, HEADER)
    assert not path.exists() and len(empty) == 0
    filled(path)
    again = ReferenceCache(path, HEADER)
    assert {key: again.get(key) for key in ENTRIES} == ENTRIES and len(again) == 4
    assert again.missing(["key9", "key1", "key8", "key9"]) == ["key9", "key8"]
    with pytest.raises(KeyError, match="no record with key key9"):
        again.get("key9")
    assert json.loads(path.read_text().splitlines()[0]) == {"reference_cache": HEADER}


def test_a_kill_at_any_byte_loses_only_what_was_being_written(tmp_path: Path) -> None:
    whole = tmp_path / "whole.jsonl"
    filled(whole)
    data = whole.read_bytes()
    ends = [index + 1 for index, byte in enumerate(data) if byte == ord("\n")]
    path = tmp_path / "cut.jsonl"
    for size in range(len(data) + 1):
        path.write_bytes(data[:size])
        cache = ReferenceCache(path, HEADER)
        assert len(cache) == max(sum(end <= size for end in ends) - 1, 0)
        cache.add(ENTRIES)
        assert path.read_bytes() == data


def test_what_a_power_cut_leaves_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "cache.jsonl"
    filled(path)
    data = path.read_bytes()
    path.write_bytes(data + b"\0" * 40 + b"\n")
    ReferenceCache(path, HEADER).add(ENTRIES)
    assert path.read_bytes() == data


def test_another_reference_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "cache.jsonl"
    filled(path)
    before = path.read_bytes()
    with pytest.raises(StaleCacheError) as error:
        ReferenceCache(path, {**HEADER, "weights": "b" * 32, "dtype": "bfloat16"})
    message = str(error.value)
    assert 'dtype: was "float32", is "bfloat16"' in message and "weights: was" in message and str(path) in message
    assert "mmdpo reference --refresh" in message and "delete the file" in message
    assert path.read_bytes() == before
    remove_cache(path)
    refreshed = ReferenceCache(path, {**HEADER, "dtype": "bfloat16"})
    assert len(refreshed) == 0
    refreshed.add({"key0": {"chosen": -1.0}})
    assert ReferenceCache(path, {**HEADER, "dtype": "bfloat16"}).get("key0") == {"chosen": -1.0}


def test_a_damaged_or_foreign_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cache.jsonl"
    filled(path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], lines[2][:9] + b"\n", *lines[3:]]))
    with pytest.raises(RunFolderError, match="byte .*expected a line of cached reference log-probabilities"):
        ReferenceCache(path, HEADER)
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"id": "a"}\n{"id": "b"}\n')
    with pytest.raises(RunFolderError, match="pairs.jsonl, byte 0"):
        ReferenceCache(pairs, HEADER)
    with pytest.raises(RunFolderError, match="is no cache of reference log-probabilities and stays"):
        remove_cache(pairs)
    assert pairs.read_text() == '{"id": "a"}\n{"id": "b"}\n'
    path.write_bytes(lines[0][:7])
    remove_cache(path)
    remove_cache(path)
    assert not path.exists()


def test_values_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    cache = ReferenceCache(tmp_path / "cache.jsonl", HEADER)
    with pytest.raises(ValueError, match="expected finite numbers, got nan for rejected of key k"):
        cache.add({"j": {"chosen": -1.0}, "k": {"chosen": -1.0, "rejected": math.nan}})
    assert len(cache) == 0


def append(path: Path, writer: int) -> None:
    cache = ReferenceCache(path, HEADER)
    for number in range(40):
        cache.add({f"{writer}/{number}": {"chosen": float(writer)}, f"both/{number}": {"chosen": float(writer)}})


def test_processes_that_share_a_file_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "cache.jsonl"
    assert end_of([start(append, path, writer) for writer in range(3)]) == [0, 0, 0]
    assert len(ReferenceCache(path, HEADER)) == 160
    assert len(path.read_text().splitlines()) == 161


def test_a_process_whose_file_was_replaced_notices(tmp_path: Path) -> None:
    path = tmp_path / "cache.jsonl"
    cache = filled(path)
    remove_cache(path)
    other = ReferenceCache(path, HEADER)
    other.add({"key0": {"chosen": -7.0}})
    cache.add({"new": {"chosen": -1.0}})
    assert len(cache) == 2 and cache.get("key0") == {"chosen": -7.0}
    remove_cache(path)
    ReferenceCache(path, {**HEADER, "dtype": "float64"}).add({"key0": {"chosen": -8.0}})
    with pytest.raises(StaleCacheError, match="dtype"):
        cache.add({"newer": {"chosen": -1.0}})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model")


ADAPTERS = {
    "lora": LoraConfig(r=2, target_modules=["q_proj", "o_proj"]),
    "modules to save": LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["multi_modal_projector"]),
    "tokens": LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [1, 2]}),
}


@pytest.mark.parametrize("adapter", list(ADAPTERS))
def test_fingerprint_is_of_the_reference_alone(folder: Path, adapter: str) -> None:
    plain = reference_header(tiny(folder, torch.float32).model)
    model = tiny(folder, torch.float32).model
    patch_model(model)
    assert reference_header(model) == plain
    wrapped: Any = get_peft_model(model, copy.deepcopy(ADAPTERS[adapter]))
    assert reference_header(wrapped) == plain
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter += 1.0
    assert reference_header(wrapped) == plain


def test_fingerprint_changes_with_any_weight_name_and_dtype(folder: Path) -> None:
    model = tiny(folder, torch.float32).model
    found = {model_fingerprint(model)}
    for name, parameter in model.named_parameters():
        if name.endswith(("q_proj.weight", "lm_head.weight", "linear_1.bias")):
            with torch.no_grad():
                before = parameter.flatten()[-1].clone()
                parameter.view(-1)[-1] = torch.nextafter(before, before + 1)
                found.add(model_fingerprint(model))
                parameter.view(-1)[-1] = before
    assert len(found) > 4
    assert model_fingerprint(model) in found and model_fingerprint(tiny(folder, torch.bfloat16).model) not in found

    class Two(torch.nn.Module):
        def __init__(self, names: tuple[str, str]) -> None:
            super().__init__()
            weight = torch.nn.Parameter(torch.arange(6.0).view(2, 3))
            for name in names:
                # Tied: one content, two names.
                self.register_parameter(name, weight)

    assert model_fingerprint(Two(("a", "b"))) == model_fingerprint(Two(("b", "a"))) != model_fingerprint(Two(("a", "c")))


def test_header_changes_with_what_else_changes_the_numbers(folder: Path) -> None:
    loaded = tiny(folder, torch.float32)
    header = reference_header(loaded.model, processor=loaded.processor)
    other = copy.deepcopy(loaded.processor)
    other.image_processor.image_mean = [0.1, 0.2, 0.3]
    assert reference_header(loaded.model, processor=other)["pictures"] != header["pictures"]
    assert reference_header(loaded.model, autocast="bfloat16")["autocast"] != header["autocast"]
    changed = copy.deepcopy(loaded.model)
    changed.config.text_config.rms_norm_eps *= 2
    assert reference_header(changed)["config"] != header["config"]
    changed = copy.deepcopy(loaded.model)
    changed.config._name_or_path = "/moved"
    assert reference_header(changed, processor=loaded.processor) == header


RECORDS = 12


def collator_of(loaded: Any, **options: Any) -> PreferenceCollator:
    corruption = Corruption(kind="crop", keep=(0.01, 0.2), seed=3)
    options = {"branches": BRANCHES, "corruption": corruption, **options}
    return PreferenceCollator(loaded.processor, image_token_id=loaded.image_token_id, end_id=2, pad_id=3, **options)


def run_reference(path: Path, loaded: Any, records: Any, **options: Any) -> tuple[ReferenceCache, Precomputed]:
    patch_model(loaded.model)
    cache = ReferenceCache(path, HEADER)
    return cache, precompute(cache, loaded.model, collator_of(loaded), records, progress=Progress(every=1e9), **options)


# By number of records; by tokens, few and all of them in a batch; prepared by another process.
@pytest.mark.parametrize("options", [{"batch_size": 5}, {"max_tokens": 200}, {"max_tokens": 10**6}, {"num_workers": 1}])
def test_precomputed_is_what_each_record_has_by_itself(folder: Path, tmp_path: Path, options: dict[str, int]) -> None:
    loaded = tiny(folder)
    records = preference_records(RECORDS)
    cache, done = run_reference(tmp_path / "cache.jsonl", loaded, records, **options)
    assert (done.records, done.computed, done.cached) == (RECORDS, RECORDS, 0) and len(cache) == RECORDS
    separate = collator_of(loaded, tree_packing=False)
    for record in records:
        batch = separate([record])["batch"]
        expected = head.batch_logps(loaded.model, batch)[0].tolist()
        assert cache.get(batch.keys[0]) == pytest.approx(dict(zip(BRANCHES, expected, strict=True)), rel=1e-9)


def test_a_killed_pass_continues_and_keeps_what_it_had(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, records, path = tiny(folder), preference_records(RECORDS), tmp_path / "cache.jsonl"
    calls: list[int] = []
    response_logps = head.response_logps

    def counted(model: Any, hidden: Any, batch: Any) -> Any:
        calls.append(len(batch.ids))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return response_logps(model, hidden, batch)

    monkeypatch.setattr(head, "response_logps", counted)
    with pytest.raises(KeyboardInterrupt):
        run_reference(path, loaded, records, batch_size=3)
    before = path.read_bytes()
    calls[:] = [0, 0, 0]
    _, done = run_reference(path, loaded, records, batch_size=3)
    assert (done.computed, done.cached) == (6, 6) and sum(calls) == 6
    assert path.read_bytes().startswith(before)
    calls.clear()
    _, done = run_reference(path, loaded, records, batch_size=3)
    assert (done.computed, done.cached, calls) == (0, RECORDS, []) and str(done) == f"{RECORDS} records: {RECORDS} cached"


def test_only_what_changed_is_computed_again(folder: Path, tmp_path: Path) -> None:
    loaded, records, path = tiny(folder), preference_records(RECORDS), tmp_path / "cache.jsonl"
    run_reference(path, loaded, records)
    records[2]["chosen"][0]["content"] = "another shape"
    records[3]["images"] = [picture.rotate(90) for picture in records[3]["images"]]
    cache, done = run_reference(path, loaded, [*records, records[2]])
    assert (done.records, done.computed, done.cached) == (RECORDS + 1, 2, RECORDS - 1)
    assert len(cache) == RECORDS + 2


def test_a_record_without_a_number_is_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, records = tiny(folder), preference_records(3)
    response_logps = head.response_logps

    def broken(model: Any, hidden: Any, batch: Any) -> Any:
        logps = response_logps(model, hidden, batch)
        logps[batch.ids.index("record-1"), 1] = math.nan
        return logps

    monkeypatch.setattr(head, "response_logps", broken)
    with pytest.raises(DataError, match="record record-1: the reference's log-probability of rejected is nan"):
        run_reference(tmp_path / "cache.jsonl", loaded, records)


def merge_until(path: Path, begun: Path, done: Path) -> None:
    cache = ReferenceCache(path, HEADER)
    while not done.exists():
        cache.merge()
        begun.touch()


def test_merging_loses_nothing_of_a_process_that_still_writes(tmp_path: Path) -> None:
    """Another launch on the same pairs brings in what this one has so far, while it goes on."""
    path, keys = tmp_path / "cache.jsonl", [f"key {index}" for index in range(150)]
    begun, done = tmp_path / "begun", tmp_path / "done"
    other = start(merge_until, path, begun, done)
    while not begun.exists():
        assert other.process.is_alive()
        time.sleep(0.005)
    try:
        part = ReferenceCache(path, HEADER).part(0)
        for key in keys:
            part.add({key: {"chosen": 1.0}})
    finally:
        done.touch()
        assert end_of([other]) == [0]
    cache = ReferenceCache(path, HEADER)
    cache.merge()
    assert not cache.missing(keys) and len(cache) == len(keys)
    assert len(path.read_text().splitlines()) == 1 + len(keys)


def test_parts_of_a_killed_pass_are_merged_once(tmp_path: Path) -> None:
    """Whatever number of processes left them, a record that two of them ran and a half line included."""
    path = tmp_path / "cache.jsonl"
    cache = ReferenceCache(path, HEADER)
    cache.add({"a": {"chosen": 1.0}})
    cache.part(0).add({"b": {"chosen": 2.0}})
    cache.part(3).add({"b": {"chosen": 2.5}, "c": {"chosen": 3.0}})
    with (tmp_path / "cache.jsonl.part-3").open("a") as file:
        file.write('{"key": "d", "lo')
    ReferenceCache(tmp_path / "cache.jsonl.part-5", {"weights": "of another"}).add({"e": {"chosen": 4.0}})
    other = ReferenceCache(path, HEADER)

    cache.merge()
    other.follow()

    assert not list(tmp_path.glob("*.part-*"))
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()[1:]] == ["a", "b", "c"]
    assert [other.get(key)["chosen"] for key in "abc"] == [1.0, 2.0, 3.0] and len(other) == 3
