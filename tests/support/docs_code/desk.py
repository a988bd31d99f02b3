"""What a reader of the pages has at hand: a folder with a small model under the names of large ones, data, and a script's objects."""

from __future__ import annotations

import ast
import builtins
import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from tiny_models import make_tiny_llava, sample_pictures

from docs_code.blocks import ROOT, Block, every_block
from mmdpo_kernels import image_segments
from mmdpo_trainers.models.encode import encode_prompts
from mmdpo_trainers.models.loaded import LoadedModel
from mmdpo_trainers.models.loading import load_model

MODEL = "llava-1.5-7b-hf"
LAYERS = 17
"""Pages speak of layer 16."""
_FILE = re.compile(r"# file: (\S+)\n")
"""First line of a block that is a file of the reader's."""
_RESULT = re.compile(r"\s#.* -> (.+)$")


def lay_out(folder: Path) -> Path:
    """Fill the folder: the model, configurations, pictures, and each kind of data that pages name."""
    make_tiny_llava(folder / MODEL, layers=LAYERS, hidden=16, heads=2, kv_heads=2)
    (folder / "FOLDER").symlink_to(folder / MODEL)
    (folder / "images").mkdir()
    turns = [{"from": "human", "value": "<image>\nwhat colour is it ?"}, {"from": "gpt", "value": "red"}]
    sources, pairs, answers = [], [], []
    for number, picture in enumerate(sample_pictures(4)):
        picture.save(folder / "images" / f"{number}.png")
        images = [f"images/{number}.png", f"images/{(number + 1) % 4}.png"]
        prompt = "Image1: <image>\nImage2: <image>\nwhat colour is the circle in Image2 ?"
        sources.append({"id": f"s{number}", "image": f"{number}.png", "conversations": turns})
        pair = {"id": f"p{number}", "images": images, "prompt": prompt, "chosen": "red", "rejected": "blue"}
        pairs.append({**pair, "answer": "red"})
        answers.append({"id": f"a{number}", "images": images, "prompt": prompt, "target": 1, "answer": "red", "response": "blue"})
    (folder / "llava.json").write_text(json.dumps(sources))
    _lines(folder / "pairs.jsonl", pairs)
    _lines(folder / "answers.jsonl", answers)
    _lines(folder / "prompts.jsonl", [{name: each[name] for name in each if name != "response"} for each in answers])
    for stage in ("select", "train"):
        (folder / "runs" / "mine" / stage).mkdir(parents=True)
    for each in pairs:
        for name in each["images"]:
            target = folder / "runs" / "mine" / "select" / name
            target.parent.mkdir(exist_ok=True)
            shutil.copy(folder / name, target)
    places = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "what colour is the circle in the second one ?"}]
    conversational = [
        {**each, "prompt": [{"role": "user", "content": places}]}
        | {name: [{"role": "assistant", "content": each[name]}] for name in ("chosen", "rejected")}
        for each in pairs
    ]
    _lines(folder / "runs" / "mine" / "select" / "pairs.jsonl", conversational)
    for block in every_block():
        if block.kind == "python" and (named := _FILE.match(block.text)):
            (folder / named[1]).write_text(block.text)
    (folder / "my.yaml").write_text(f"model: {MODEL}\ndata: {{source: llava.json, image_folder: images}}\n")
    return folder


def _lines(path: Path, records: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def _lora() -> LoraConfig:
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


class Given:
    """Objects that a script has before a page's first line: made anew for each page, the first time that it names one."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._loaded: LoadedModel | None = None

    def names(self) -> set[str]:
        return {name for name in dir(self) if not name.startswith("_") and name != "names"}

    def _model(self) -> LoadedModel:
        if self._loaded is None:
            self._loaded = load_model(self._folder / MODEL, dtype=torch.float32, device="cpu")
        return self._loaded

    def model(self) -> Any:
        return self._model().model

    def processor(self) -> Any:
        return self._model().processor

    def records(self) -> list[dict[str, Any]]:
        lines = (self._folder / "runs" / "mine" / "select" / "pairs.jsonl").read_text().splitlines()
        pictures = sample_pictures(2)
        return [{**json.loads(line), "images": pictures} for line in lines[:2]]

    def dataset(self) -> Any:
        from datasets import Dataset, Image, List

        wanted = ("images", "prompt", "chosen", "rejected")
        found = Dataset.from_list([{name: record[name] for name in wanted if name != "images"} for record in self.records()])
        return found.add_column("images", [self._paths()] * len(found)).cast_column("images", List(Image()))

    def _paths(self) -> list[str]:
        return [str(self._folder / "images" / f"{number}.png") for number in range(2)]

    def lora(self) -> LoraConfig:
        return _lora()

    def run(self) -> str:
        return "runs/mine"

    def segments(self) -> torch.Tensor:
        ids = self.inputs()["input_ids"]
        return image_segments(ids, self._model().image_token_id, [[16, 16]])

    def rows(self) -> torch.Tensor:
        rows = torch.zeros_like(self.inputs()["input_ids"], dtype=torch.bool)
        rows[:, -4:] = True
        return rows

    def inputs(self) -> dict[str, Any]:
        prompt = "Image1: <image>\nImage2: <image>\nwhat colour is the circle in Image2 ?"
        record = {"id": "a", "format": "sequence", "images": self._paths(), "prompt": prompt, "target": 1}
        return dict(encode_prompts(self._model(), [record], padding_side="right", answers=["the red circle"]).inputs)


def namespace(blocks: Sequence[Block], given: Given) -> dict[str, Any]:
    """Globals of a page: what its blocks use and never set, of `Given`. NameError for what nobody has."""
    used, bound = set[str](), set(dir(builtins))
    for node in (node for block in blocks for node in ast.walk(ast.parse(block.text))):
        if isinstance(node, ast.Name):
            (used if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            bound |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            bound.add(node.name)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
    first = _used_before_set(blocks)
    made: dict[str, Callable[[], Any]] = {name: getattr(given, name) for name in given.names()}
    unknown = used - bound - set(made)
    if unknown:
        raise NameError(f"{blocks[0].page}: nobody sets {', '.join(sorted(unknown))}")
    return {"__name__": "page", **{name: made[name]() for name in sorted(((used - bound) | first) & set(made))}}


def imports(block: Block) -> set[str]:
    """Top-level packages that a block imports."""
    nodes = list(ast.walk(ast.parse(block.text)))
    found = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    found |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    return {name.partition(".")[0] for name in found}


def _used_before_set(blocks: Sequence[Block]) -> set[str]:
    """Names that are read in a statement before any statement sets them: `model = patch_model(model)`."""
    found, known = set[str](), set[str]()
    for statement in (each for block in blocks for each in ast.parse(block.text).body):
        names = [node for node in ast.walk(statement) if isinstance(node, ast.Name)]
        found |= {node.id for node in names if isinstance(node.ctx, ast.Load)} - known
        known |= {node.id for node in names if isinstance(node.ctx, ast.Store)}
    return found


def run(block: Block, names: dict[str, Any]) -> None:
    """Execute a block; a line that ends in `# -> value` has to come to this value."""
    lines = block.text.splitlines()
    for statement in ast.parse(block.text).body:
        # A traceback then shows the page and the line in it.
        ast.increment_lineno(statement, block.line - 1)
        said = _RESULT.search(lines[(statement.end_lineno or 0) - block.line])
        if said and isinstance(statement, ast.Expr):
            value = eval(compile(ast.Expression(statement.value), str(ROOT / block.page), "eval"), names)
            assert str(value) == said[1].strip(), f"{block.page}:{statement.lineno}: {value}, and the page says {said[1]}"
        else:
            exec(compile(ast.Module([statement], []), str(ROOT / block.page), "exec"), names)
