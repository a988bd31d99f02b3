"""Tiny checkpoints that vLLM's CPU build can run, and its answers beside those of transformers; for `make test-vllm` and its benchmark.

vLLM's attention on a CPU knows heads of 32 and more; those of the other tests' checkpoints are narrower.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from prompt_records import make_prompts
from tiny_models import TINY
from tiny_models.recipes import BY_RECIPE

from mmdpo_trainers.answers import vllm_engine
from mmdpo_trainers.config.run_config import RunConfig
from mmdpo_trainers.errors import MmdpoError
from mmdpo_trainers.files.json_lines import read_jsonl
from mmdpo_trainers.models.loading import load_model
from mmdpo_trainers.models.published import copy_files, write_weights
from mmdpo_trainers.stages import generate
from mmdpo_trainers.stages.context import StageContext
from mmdpo_trainers.stages.folder import RunFolder

FOLDER = "MMDPO_VLLM_MODELS"
"""Variable: the folder of the checkpoints that another transformers has written, a folder a family."""
ALIKE = 5e-5
"""How far perplexities may be apart, relatively: both are float32."""
KINDS: Mapping[str, Sequence[tuple[str, int]]] = {
    "one picture": [("single", 1), ("grid", 4), ("pip", 2), ("single", 1)],
    "several": [("sequence", 3), ("sequence", 2), ("sequence", 4), ("sequence", 2)],
}
ENGINE = {"enforce_eager": True, "max_model_len": 4096}

_WIDE = {"hidden": 64, "heads": 2, "kv_heads": 1}
_OWN: Mapping[str, Mapping[str, Any]] = {
    # Weights of experts that are not square; embeddings that are the output head too, as vLLM expects of some.
    "qwen3_vl_moe": {**_WIDE, "width": 48},
    "gemma4": {"head_dim": 32, "tied": True},
    "paligemma": {"head_dim": 32, "tied": True},
    "paligemma2": {"head_dim": 32, "tied": True},
    "cohere2_vision": {"heads": 1, "tied": True},
}
FAMILIES: Mapping[str, Mapping[str, Any]] = {
    name: _OWN.get(name, {"heads": 1} if name in BY_RECIPE else _WIDE) for name in {**TINY, **BY_RECIPE}
}
"""Family -> options of what makes its checkpoint."""


def settle() -> None:
    """The environment of vLLM on a CPU: in this process, quiet, and without a look at the network."""
    os.environ.update(
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_LOGGING_LEVEL="ERROR",
        VLLM_NO_USAGE_STATS="1",
        HF_HUB_OFFLINE="1",
    )


def write(name: str, folder: Path) -> Path:
    """Write a family's checkpoint as `mmdpo export` writes one, to `folder`/`name`. Raises as its maker does."""
    target = folder / name
    shutil.rmtree(target, ignore_errors=True)
    maker = {**BY_RECIPE, **TINY}[name]
    with tempfile.TemporaryDirectory() as temporary:
        plain = maker(Path(temporary) / "model", **FAMILIES[name])
        loaded = load_model(plain, device="cpu")
        write_weights(loaded.model, target)
        copy_files(plain, target, loaded.dtype)
    return target


def responses(model: Path, prompts: Path, engine: str, **options: Any) -> list[dict[str, Any]]:
    """What stage generate writes with an engine."""
    values: dict[str, Any] = {"input": str(prompts), "max_new_tokens": 8, "engine": engine, "record_attention": False, **options}
    if engine == "vllm":
        values = {"engine_args": ENGINE, **values}
    config = RunConfig.from_dict({"model": str(model), "device": None if engine == "vllm" else "cpu", "generate": values})
    with tempfile.TemporaryDirectory() as folder:
        context = StageContext(run=RunFolder(folder), config=config, stage="generate")
        generate.run(context)
        return list(read_jsonl(context.folder / "responses.jsonl"))


def compare(model: Path, kinds: Mapping[str, Sequence[tuple[str, int]]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Greedy answers of both engines to prompts of these kinds, kind by kind.

    prompts, same: how many, and of how many all token ids are the same; perplexity: the largest relative difference. Where vLLM does
    not answer: refused, its message. What transformers answers comes first of all: where vLLM runs a model by transformers' own modules, it
    changes them in the whole process. Families that are refused for what is measured here are measured all the same.
    """
    with mock.patch.object(vllm_engine, "check_vllm_family"), tempfile.TemporaryDirectory() as folder:
        files = {}
        for kind, prompts in kinds.items():
            (Path(folder) / kind).mkdir()
            make_prompts(Path(folder) / kind, prompts)
            files[kind] = Path(folder) / kind / "prompts.jsonl"
        expected = {kind: responses(model, file, "transformers") for kind, file in files.items()}
        for kind, file in files.items():
            try:
                found = responses(model, file, "vllm")
            except MmdpoError as error:
                yield kind, {"refused": message(error)}
                continue
            pairs = list(zip(found, expected[kind], strict=True))
            yield (
                kind,
                {
                    "prompts": len(pairs),
                    "same": sum(one["response_ids"] == other["response_ids"] for one, other in pairs),
                    "perplexity": max(abs(one["perplexity"] / other["perplexity"] - 1) for one, other in pairs),
                },
            )


def alike(found: Mapping[str, Any]) -> bool:
    """Whether `compare` found the engines to agree."""
    return "same" in found and found["same"] == found["prompts"] and bool(found["perplexity"] <= ALIKE)


def message(error: BaseException) -> str:
    """An error in one line, without folders of this machine, and of vLLM's own words no more than their beginning."""
    text = re.sub(r"; see generate\.engine_args.*|; set generate\.engine to.*", "", " ".join(str(error).split()))
    text = re.sub(r"^(model|records?) [^:]+: ", "", text)
    return re.sub(r"/\S*/", "", text)[:240]
