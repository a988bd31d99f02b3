"""Each stage of MIA-DPO's data on its own: records, tokens and pairs a second, against the plain way with transformers where there is one.

    python -m benchmarks.runs.pipeline            # table, results/pipeline_cpu.json, and its section of docs/results.md
    python -m benchmarks.runs.pipeline --small    # the same on few prompts, into build/benchmarks

The built-in world and its model, as `mmdpo run shapes_mia_dpo` has them, one thread. In turn in one process, processor time:

- `augment`, `generate`, `score`, `select`: the stages themselves, from the beginning; `generate` records the attention, so `score` divides.
- `score, by a pass`: the same stage where nothing was recorded, as after answers of a server.
- `render`: every collage and pasted picture drawn from its recipe, as in each epoch of training.
- `generate, plain`: transformers' own `generate`, a prompt at a time. `score, plain`: a forward with eager attention and
  `output_attentions`, an answer at a time, the ratio from the maps. `render, plain`: the same pictures read from PNG files.

The plain ways take every so-many-th prompt. Their answers and ratios are held to ours first.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers.utils import logging

from benchmarks.measure import add_place, alternate, machine, markdown, place_of
from mmdpo_kernels import unpatch_model
from mmdpo_trainers.answers.attention_ratios import resolve_layer
from mmdpo_trainers.config.run_config import RunConfig
from mmdpo_trainers.config.shipped import config_file
from mmdpo_trainers.data.image_paths import placed
from mmdpo_trainers.data.images import open_image, recipe_in
from mmdpo_trainers.files.json_lines import read_jsonl
from mmdpo_trainers.models.encode import encode_prompts
from mmdpo_trainers.models.loaded import LoadedModel
from mmdpo_trainers.models.loading import load_model
from mmdpo_trainers.processes.progress import Progress
from mmdpo_trainers.stages import augment, generate, score, select
from mmdpo_trainers.stages.context import StageContext
from mmdpo_trainers.stages.folder import RunFolder

STAGES = {"augment": augment, "generate": generate, "score": score, "select": select}
PASS, RENDER, PLAIN = "score, by a pass", "render", ", plain"
LEAST_ALIKE = 0.99
"""Share of the answers that have to be the same: a batch's rounding decides where two tokens are as likely as each other."""
RATIO_ERROR = 1e-4


@dataclass(frozen=True, kw_only=True)
class Setting:
    prompts: int = 1500
    every: int = 10
    """The plain ways take one prompt of so many."""


SMALL = Setting(prompts=48, every=12)
Record = dict[str, Any]


class Pipeline:
    """The stages in one folder, and the plain ways on what they wrote."""

    def __init__(self, folder: Path, setting: Setting) -> None:
        self.folder, self.setting = folder, setting
        values = RunConfig.from_yaml(config_file("shapes_mia_dpo")).to_dict()
        values["augment"]["num_prompts"] = setting.prompts
        values["data"]["pictures"] = setting.prompts // 2
        self.config = RunConfig.from_dict(values)
        self.progress = Progress(Console(quiet=True))
        self.run = RunFolder(folder / "run")
        self.by_pass = RunFolder(folder / "by_pass")
        self.plain = _plain_model(self.context("generate").model)
        self.kept: dict[str, Any] = {}

    def context(self, stage: str, run: RunFolder | None = None) -> StageContext:
        return StageContext(run=run or self.run, config=self.config, stage=stage, progress=self.progress)

    def stage(self, name: str) -> None:
        """The stage, begun anew."""
        context = self.context(name)
        shutil.rmtree(context.folder)
        STAGES[name].run(context)

    def score_by_pass(self) -> None:
        """`score` on answers without what was recorded."""
        shutil.rmtree(self.by_pass.folder("score"))
        score.run(self.context("score", self.by_pass))

    def forget_recorded(self) -> None:
        """The responses without what was recorded, in a run of their own."""
        with (self.by_pass.folder("generate") / "responses.jsonl").open("w") as file:
            for record in self._written("generate/responses.jsonl"):
                record["images"] = self._images(record, "generate")
                file.write(json.dumps({key: value for key, value in record.items() if key != "recorded"}) + "\n")

    def _written(self, name: str) -> list[Record]:
        return list(read_jsonl(self.run.path / name))

    def _images(self, record: Record, stage: str) -> list[Any]:
        return [placed(image, str(self.run.path / stage)) for image in record["images"]]

    def prepare(self) -> None:
        """What the plain ways take: prompts with our answers and ratios, and the drawn pictures as PNG files."""
        scored = self._written("score/scores.jsonl")[:: self.setting.every]
        self.answered = [{**record, "images": self._images(record, "score")} for record in scored]
        made = [image for record in self._written("augment/prompts.jsonl") for image in self._images(record, "augment")]
        self.recipes = [image for image in made if recipe_in(image) is not None]
        drawn = self.folder / "drawn"
        drawn.mkdir(exist_ok=True)
        self.files = [drawn / f"{number}.png" for number in range(len(self.recipes))]
        for recipe, file in zip(self.recipes, self.files, strict=True):
            open_image(recipe).save(file)

    def render(self) -> None:
        for recipe in self.recipes:
            open_image(recipe)

    def render_plain(self) -> None:
        for file in self.files:
            open_image(file)

    @torch.no_grad()
    def generate_plain(self) -> None:
        """Greedy answers, one after the other."""
        loaded, found = self.plain, []
        loaded.model.set_attn_implementation({"text_config": "sdpa"})
        for record in self.answered:
            encoded = encode_prompts(loaded, [_opened(record)], padding_side="left")
            ids = loaded.model.generate(
                **encoded.inputs,
                max_new_tokens=self.config.generate.max_new_tokens,
                do_sample=False,
                suppress_tokens=[loaded.image_token_id],
                pad_token_id=loaded.pad_id,
                eos_token_id=sorted(loaded.end_ids),
            )
            new = ids[0, encoded.inputs["input_ids"].shape[1] :].tolist()
            found.append([token for token in new if token not in loaded.end_ids])
        self.kept["answers"] = found

    @torch.no_grad()
    def score_plain(self) -> None:
        """The ratio of each answer from whole attention maps."""
        loaded, found = self.plain, []
        loaded.model.set_attn_implementation({"text_config": "eager"})
        layer = resolve_layer(loaded.image_layers, self.config.score.layer)
        for record in self.answered:
            encoded = encode_prompts(loaded, [_opened(record)], padding_side="right", answers=[record["response_ids"]])
            maps = loaded.model(**encoded.inputs, output_attentions=True, use_cache=False).attentions[layer]
            start, stop = encoded.response_spans[0]
            attention = maps[0].mean(0)[start - 1 : stop - 1 + record["ended"]].mean(0)
            on_images = attention[encoded.inputs["input_ids"][0] == loaded.image_token_id]
            found.append(float(on_images[_target(record, len(on_images))].sum() / on_images.sum()))
        self.kept["ratios"] = found

    def check(self) -> dict[str, float]:
        """How far the plain ways and the pass are from the stages. Raises SystemExit where they are not the same."""
        alike = [plain == record["response_ids"] for plain, record in zip(self.kept["answers"], self.answered, strict=True)]
        apart = [abs(plain - record["ratio"]) for plain, record in zip(self.kept["ratios"], self.answered, strict=True)]
        by_pass = {record["id"]: record["ratio"] for record in read_jsonl(self.by_pass.path / "score" / "scores.jsonl")}
        passed = [abs(by_pass[record["id"]] - record["ratio"]) for record in self.answered]
        found = {"answers_alike": sum(alike) / len(alike), "ratios_apart": max(apart), "pass_apart": max(passed)}
        if found["answers_alike"] < LEAST_ALIKE or max(found["ratios_apart"], found["pass_apart"]) > RATIO_ERROR:
            raise SystemExit(f"the ways do not compute the same: {found}")
        return found

    def ways(self) -> dict[str, Callable[[], None]]:
        """All that is timed, in an order in which each finds what it reads."""
        stages = {name: lambda name=name: self.stage(name) for name in STAGES}
        return {
            **stages,
            PASS: self.score_by_pass,
            RENDER: self.render,
            f"generate{PLAIN}": self.generate_plain,
            f"score{PLAIN}": self.score_plain,
            f"{RENDER}{PLAIN}": self.render_plain,
        }

    def counts(self) -> dict[str, dict[str, int]]:
        """Of each way what it went through: records, and tokens that were generated or pairs that came out."""
        tokens = lambda records: sum(record["num_tokens"] + record["ended"] for record in records)  # noqa: E731
        prompts, answers = self.setting.prompts, self._written("generate/responses.jsonl")
        pairs = len(self._written("select/pairs.jsonl"))
        pictures, some = {"pictures": len(self.recipes)}, {"records": len(self.answered)}
        return {
            "augment": {"records": prompts},
            "generate": {"records": prompts, "tokens": tokens(answers)},
            "score": {"records": prompts},
            "select": {"records": prompts, "pairs": pairs},
            PASS: {"records": prompts},
            RENDER: pictures,
            f"generate{PLAIN}": {**some, "tokens": tokens(self.answered)},
            f"score{PLAIN}": some,
            f"{RENDER}{PLAIN}": pictures,
        }


def _plain_model(folder: Path) -> LoadedModel:
    loaded = load_model(folder, device="cpu")
    unpatch_model(loaded.model)
    return loaded


def _opened(record: Record) -> Record:
    return {**record, "images": [open_image(image) for image in record["images"]]}


def _target(record: Record, tokens: int) -> torch.Tensor:
    """(tokens) bool: the image tokens of the asked-about picture, or of the part of the one picture."""
    found = torch.zeros(tokens, dtype=torch.bool)
    if record["region"] is None:
        found.view(len(record["images"]), -1)[record["target"]] = True
    else:
        row0, column0, row1, column1 = record["region"]
        found.view(record["patch_grid"])[row0:row1, column0:column1] = True
    return found


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measure(setting: Setting, repeats: int, progress: Callable[[str], None]) -> dict[str, Any]:
    """All figures."""
    # Transformers would say of every plain answer what stands in its configuration.
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as temporary, _one_thread():
        pipeline = Pipeline(Path(temporary), setting)
        for name in STAGES:
            pipeline.stage(name)
        pipeline.forget_recorded()
        pipeline.prepare()
        ways = pipeline.ways()
        seconds = alternate(ways, repeats, progress, clock=time.process_time)
        return {
            "machine": machine(),
            "setting": asdict(setting),
            "counts": pipeline.counts(),
            "check": pipeline.check(),
            "processor_seconds": seconds,
        }


COMPARED = {("generate", "score"): ("generate, plain", "score, plain"), (PASS,): ("score, plain",), (RENDER,): ("render, plain",)}
"""What of ours does the work of what of the plain ways. Since `generate` records, the two are one piece of work."""


def rates(result: Mapping[str, Any], way: str) -> dict[str, float]:
    """What the way does a second of a processor, by what is counted."""
    median = statistics.median(result["processor_seconds"][way])
    return {what: count / median for what, count in result["counts"][way].items()}


def times_faster(result: Mapping[str, Any], ours: Sequence[str], plain: Sequence[str]) -> dict[str, float]:
    """Records or pictures a second of ours over those of the plain ways, within each turn."""

    def seconds_each(ways: Sequence[str]) -> list[float]:
        turns = zip(*(result["processor_seconds"][way] for way in ways), strict=True)
        count = next(iter(result["counts"][ways[0]].values()))
        return [sum(turn) / count for turn in turns]

    found = [theirs / own for own, theirs in zip(seconds_each(ours), seconds_each(plain), strict=True)]
    return {"median": statistics.median(found), "min": min(found), "max": max(found)}


def text_of(result: Mapping[str, Any]) -> str:
    """The section of docs/results.md."""
    rows = []
    for way, taken in result["processor_seconds"].items():
        done = ", ".join(f"{rate:,.0f} {what}" for what, rate in rates(result, way).items())
        rows.append([way, f"{statistics.median(taken):.2f}", done])
    compared = []
    for ours, plain in COMPARED.items():
        faster = times_faster(result, ours, plain)
        spread = f"{faster['median']:.2f} ({faster['min']:.2f} to {faster['max']:.2f})"
        compared.append([" + ".join(ours), " + ".join(plain), spread])
    on, check, setting = result["machine"], result["check"], result["setting"]
    packages = ", ".join(f"{name} {on['packages'][name]}" for name in ("torch", "transformers"))
    return (
        f"{markdown(['stage', 'processor seconds (median)', 'a second'], rows)}\n\n"
        f"{markdown(['ours', 'the plain way', 'times faster a record (min to max)'], compared)}\n\n"
        f"{setting['prompts']:,} prompts, the plain ways every {setting['every']}th of them: {100 * check['answers_alike']:.0f} % of the "
        f"answers are the same, ratios differ by {check['ratios_apart']:.0e} at most. {on['cpu']}, {on['threads']} thread, {packages}."
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, help="turns that count, after one warm-up (default 3, small 1)")
    add_place(parser)
    arguments = parser.parse_args(argv)
    console, place = Console(), place_of(arguments)
    result = measure(SMALL if arguments.small else Setting(), arguments.repeats or (1 if arguments.small else 3), console.print)
    path = place.result("pipeline_cpu", result)
    place.section("docs/results.md", "pipeline", text_of(result))
    console.print(text_of(result), markup=False)
    console.print(f"written: {path}")


if __name__ == "__main__":
    main()
