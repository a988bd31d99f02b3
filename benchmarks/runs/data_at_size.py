"""Prompts out of data of real size: time, disk and memory of `augment` and `select`, and drawing pictures where they are read.

    python -m benchmarks.runs.data_at_size              # 100,000 prompts from 5,000 photos; results/data_at_size_cpu.json and docs/results.md
    python -m benchmarks.runs.data_at_size --million    # one million source records through augment and select too
    python -m benchmarks.runs.data_at_size --small      # a few of everything, into build/benchmarks

The photos, 640 x 480 as JPEG, and the scores are made here; nothing is answered by a model. Every stage runs in a process of its own.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.measure import ROOT, add_place, markdown, place_of

FULL = {"photos": 5000, "prompts": 100_000, "loaded": 600, "steps": 40, "kills": 5, "killed_prompts": 30_000}
SMALL = {"photos": 30, "prompts": 300, "loaded": 8, "steps": 2, "kills": 1, "killed_prompts": 300}
MILLION = 1_000_000
STEP_SECONDS = 0.15
"""Of a stub training step: a sleep, as a GPU would be at work."""
LONG_STEP_SECONDS = 0.5
"""Of one for which a loader has time enough: what it still waits is the handing over."""
WORKERS = (0, 1, 2)
SIDE = 336
"""Of LLaVA's pictures."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_place(parser)
    parser.add_argument("--million", action="store_true", help="one million source records as well, for half an hour or so")
    parser.add_argument("--folder", type=Path, help="where photos and runs are made; None: a temporary folder")
    parser.add_argument("--stage", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.stage:
        print(json.dumps(stage_alone(arguments.stage)))
        return 0
    place, sizes = place_of(arguments), SMALL if arguments.small else FULL
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        found = measure(folder, sizes, million=(MILLION // 1000 if arguments.small else MILLION) if arguments.million else 0)
    known = ROOT / "benchmarks" / "results" / "data_at_size_cpu.json"
    if place.committed and "million" not in found and known.is_file():
        found |= {"million": json.loads(known.read_text()).get("million")}
    place.result("data_at_size_cpu", found)
    place.section("docs/results.md", "data_at_size", table(found))
    print(table(found))
    return 0


def measure(folder: Path, sizes: Mapping[str, int], *, million: int) -> dict[str, Any]:
    """All figures. million: source records of the last part; 0: it is left out."""
    photos = make_photos(folder / "photos", sizes["photos"])
    found: dict[str, Any] = {"sizes": dict(sizes)}
    found["augment"] = augmented(folder, "run", photos, sizes["prompts"])
    scores = folder / "scores.jsonl"
    write_scores(folder / "run" / "augment" / "prompts.jsonl", scores)
    found["select"] = selected(folder, "run", scores)
    found["loading"] = loading(folder / "run" / "select" / "pairs.jsonl", sizes)
    found["kills"] = killed(folder, photos, sizes)
    if million:
        found["million"] = {"augment": augmented(folder, "million", photos, million)}
        write_scores(folder / "million" / "augment" / "prompts.jsonl", scores)
        found["million"]["select"] = selected(folder, "million", scores)
    return found


def make_photos(folder: Path, count: int) -> list[str]:
    """JPEG files of 640 x 480 with as much detail as photos have, about 60 KB each."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{number:06}.jpg" for number in range(count)]
    for number, name in enumerate(names):
        if not (folder / name).exists():
            draw = np.random.default_rng(number)
            coarse = Image.fromarray(draw.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(
                (640, 480), Image.Resampling.BICUBIC
            )
            grain = np.asarray(coarse, np.int16) + draw.integers(-9, 10, (480, 640, 1), dtype=np.int16)
            Image.fromarray(grain.clip(0, 255).astype(np.uint8)).save(folder / name, quality=85)
    return names


def write_source(path: Path, photos: list[str], count: int) -> None:
    """`count` questions, as many about each photo."""
    with path.open("w") as file:
        for number in range(count):
            turns = [
                {"from": "human", "value": f"<image>\nWhat is number {number % 97} of the things that can be seen in it?"},
                {"from": "gpt", "value": f"It is a thing of kind {number % 31}, to the left of the others."},
            ]
            record = {"id": f"{number:09}", "image": photos[number % len(photos)], "conversations": turns}
            file.write(json.dumps(record) + "\n")


def augmented(folder: Path, run: str, photos: list[str], count: int) -> dict[str, Any]:
    """Figures of `augment`, a prompt a source record."""
    write_source(folder / f"{run}.jsonl", photos, count)
    found = stage(augment_options(folder, run, count))
    written = folder / run / "augment"
    used = sum(file.stat().st_size for file in written.rglob("*") if file.is_file())
    found |= {
        "prompts": count,
        "photo_bytes": round(sum((folder / "photos" / name).stat().st_size for name in photos) / len(photos)),
        "bytes_a_prompt": round(used / count),
        "cpu_ms_a_prompt": round(1000 * found["cpu_seconds"] / count, 3),
    }
    return found


def augment_options(folder: Path, run: str, count: int) -> list[str]:
    paths = ["--run", str(folder / run), "--data", str(folder / f"{run}.jsonl"), "--image-folder", str(folder / "photos")]
    return ["augment", *paths, "--num-prompts", str(count), "--holdout", "0", "--patch-grid", "[24, 24]"]


def write_scores(prompts: Path, scores: Path) -> None:
    """Prompts as if they were answered and scored: a quarter of the answers right, ratios and perplexities drawn."""
    draw = random.Random(0)
    with prompts.open() as given, scores.open("w") as file:
        for line in given:
            record = json.loads(line)
            right = draw.random() < 0.25
            answer = record["answer"] if right else f"It is a thing of kind {draw.randrange(31)}, behind all of the others."
            record |= {"response": answer, "response_ids": [draw.randrange(32000) for _ in range(16)], "num_tokens": 16}
            record |= {"perplexity": 1 + draw.random(), "ended": True, "ratio": round(draw.random(), 6)}
            file.write(json.dumps(record) + "\n")


def selected(folder: Path, run: str, scores: Path) -> dict[str, Any]:
    """Figures of `select`."""
    found = stage(["select", "--run", str(folder / run), "--input", str(scores)])
    found |= {"score_bytes": scores.stat().st_size, "pairs": _lines(folder / run / "select" / "pairs.jsonl")}
    return found


def stage(options: list[str]) -> dict[str, Any]:
    """A stage in a process of its own: seconds, and memory at the peak."""
    command = [sys.executable, "-m", "benchmarks.runs.data_at_size", "--stage", *options]
    return dict(json.loads(subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1]))


def stage_alone(options: list[str]) -> dict[str, Any]:
    """The same in this process. memory_mib: while prompts are made, when each tenth of them was there."""
    from benchmarks.measure import run_mmdpo

    ended, memory = threading.Event(), list[tuple[int, float]]()
    watched = Path(options[options.index("--run") + 1]) / "augment" / "prompts.jsonl"

    def watch() -> None:
        while not ended.wait(0.2):
            size = watched.stat().st_size if watched.exists() else 0
            memory.append((size, _memory("VmRSS")))

    watcher = threading.Thread(target=watch, daemon=True)
    if options[0] == "augment":
        watcher.start()
    start = time.perf_counter()
    run_mmdpo(*options)
    seconds = time.perf_counter() - start
    ended.set()
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = sum(each.ru_utime + each.ru_stime for each in (own, children))
    # What getrusage says of this process counts the one that started it.
    found = {"seconds": round(seconds, 1), "cpu_seconds": round(cpu, 1), "peak_mib": round(_memory("VmHWM"))}
    if children.ru_maxrss:
        found["peak_mib_of_a_child"] = round(children.ru_maxrss / 2**10)
    if memory:
        last = memory[-1][0]
        found["memory_mib"] = [round(next((use for size, use in memory if size >= last * part / 10), 0)) for part in (1, 5, 10)]
    return found


def loading(pairs: Path, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Pairs a second that a loader makes LLaVA's inputs of, by workers, and what a stub training step waits for them."""
    from torch.utils.data import DataLoader

    from benchmarks.runs.training_step.setting import Setting, processor_of
    from mmdpo_trainers.data.images import open_image
    from mmdpo_trainers.data.pairs import read_pairs
    from mmdpo_trainers.training.batches.collator import PreferenceCollator

    with tempfile.NamedTemporaryFile("w", suffix=".jsonl", dir=pairs.parent) as some:
        lines = pairs.read_text().splitlines(keepends=True)
        some.writelines(random.Random(0).sample(lines, min(sizes["loaded"], len(lines))))
        some.flush()
        records = read_pairs(Path(some.name))
    processor = processor_of(Setting(side=SIDE))
    collator = PreferenceCollator(processor, image_token_id=processor.image_token_id, end_id=processor.tokenizer.eos_token_id)
    found: dict[str, Any] = {"pairs": len(records), "pictures": sum(len(record["images"]) for record in records), "workers": {}}
    found["cpu_ms_a_pair"] = {
        "opened and drawn": _cpu_ms(lambda record: [open_image(image) for image in record["images"]], records),
        "model inputs": _cpu_ms(lambda record: collator([record]), records),
    }
    for workers in WORKERS:
        start = time.perf_counter()
        for _ in DataLoader(records, batch_size=1, collate_fn=collator, num_workers=workers):
            pass
        found["workers"][workers] = {"pairs_a_second": round(len(records) / (time.perf_counter() - start), 1)}
    steps = min(sizes["steps"], len(records) - 1)
    for workers in WORKERS:
        for name, seconds in (("wait_ms_a_step", STEP_SECONDS), ("wait_ms_a_long_step", LONG_STEP_SECONDS)):
            batches = DataLoader(records, batch_size=1, collate_fn=collator, num_workers=workers)
            found["workers"][workers][name] = round(_wait_ms(iter(batches), steps, seconds), 2)
    return found


def _wait_ms(batches: Iterator[Any], steps: int, seconds: float) -> float:
    """Milliseconds that a stub step waits for its batch, on the mean."""
    next(batches)
    waited = 0.0
    for _ in range(steps):
        time.sleep(seconds)
        start = time.perf_counter()
        next(batches)
        waited += time.perf_counter() - start
    return 1000 * waited / steps


def _cpu_ms(work: Callable[[Any], Any], records: Sequence[Any]) -> float:
    """Milliseconds of one core a record, on the mean."""
    work(records[0])
    start = time.process_time()
    for record in records:
        work(record)
    return round(1000 * (time.process_time() - start) / len(records), 1)


def killed(folder: Path, photos: list[str], sizes: Mapping[str, int]) -> dict[str, Any]:
    """`augment` and `select` killed at random moments with SIGKILL and started again: whether the files are those of an undisturbed run."""
    draw, found, count = random.Random(0), {}, sizes["killed_prompts"]
    write_source(folder / "whole.jsonl", photos, count)
    shutil.copy(folder / "whole.jsonl", folder / "killed.jsonl")
    scores = folder / "killed_scores.jsonl"
    for name in ("augment", "select"):
        options = {run: augment_options(folder, run, count) for run in ("whole", "killed")}
        if name == "select":
            write_scores(folder / "whole" / "augment" / "prompts.jsonl", scores)
            options = {run: ["select", "--run", str(folder / run), "--input", str(scores)] for run in options}
        seconds = stage(options["whole"])["seconds"]
        moments = [
            _killed_at(options["killed"], folder / "killed" / name, draw.random() * seconds) for _ in range(sizes["kills"])
        ]
        stage(options["killed"])
        same = _contents(folder / "whole" / name) == _contents(folder / "killed" / name)
        found[name] = {"seconds": seconds, "kills_at": moments, "same": same}
    return found


def _killed_at(options: list[str], folder: Path, moment: float) -> float:
    """Start a stage and kill it with all its processes so many seconds after its folder is there. Returns the moment."""
    command = [sys.executable, "-m", "mmdpo_trainers.cli.main", *options]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (folder / "state.json").exists() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(moment)
    os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
    process.wait()
    return round(moment, 2)


def _contents(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.glob("*.jsonl"))}


def _lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for _ in file)


def _memory(field: str) -> float:
    """MiB of this process, now (`VmRSS`) or at the peak (`VmHWM`)."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return next(int(line[1]) / 2**10 for line in lines if line[0] == f"{field}:")


def table(found: Mapping[str, Any]) -> str:
    """The figures as Markdown."""
    rows = [_stage_row(f"{found['augment']['prompts']:,}", found)]
    if found.get("million"):
        rows.append(_stage_row(f"{found['million']['augment']['prompts']:,}", found["million"]))
    header = [
        "source records",
        "augment, ms of one core a prompt",
        "bytes a prompt",
        "memory, MiB, at 10, 50 and 100 %",
        "peak, MiB",
    ]
    header += ["select, s", "its processors, s", "peak, MiB, and of a further process"]
    loaded = [
        [str(workers), f"{each['pairs_a_second']:.0f}", f"{each['wait_ms_a_step']:.1f}", f"{each['wait_ms_a_long_step']:.1f}"]
        for workers, each in found["loading"]["workers"].items()
    ]
    waits = [f"wait a step of {1000 * seconds:.0f} ms, ms" for seconds in (STEP_SECONDS, LONG_STEP_SECONDS)]
    cpu = found["loading"]["cpu_ms_a_pair"]
    kills = found["kills"]
    same = all(each["same"] for each in kills.values())
    count = sum(len(each["kills_at"]) for each in kills.values())
    return "\n\n".join(
        [
            markdown(header, rows),
            markdown(["loader workers", "pairs a second", *waits], loaded),
            f"A pair's pictures, opened and drawn, take {cpu['opened and drawn']:.0f} ms of one core, and all of its model inputs "
            f"{cpu['model inputs']:.0f} ms.",
            f"After {count} kills of augment and select at random moments all files are {'the same' if same else 'NOT the same'} as "
            "those of undisturbed runs.",
        ]
    )


def _stage_row(name: str, found: Mapping[str, Any]) -> list[str]:
    augment, select = found["augment"], found["select"]
    memory = ", ".join(map(str, augment.get("memory_mib", [])))
    peaks = f"{select['peak_mib']}, {select.get('peak_mib_of_a_child', '-')}"
    return [
        *(name, f"{augment['cpu_ms_a_prompt']:.2f}", f"{augment['bytes_a_prompt']:,}", memory, str(augment["peak_mib"])),
        *(f"{select['seconds']:.0f}", f"{select['cpu_seconds']:.0f}", peaks),
    ]


if __name__ == "__main__":
    sys.exit(main())
