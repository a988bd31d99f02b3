"""Generation with image tokens hidden: the logits of an unpatched padded model with the same attention mask and positions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prompt_records import make_prompts
from test_unknown_families import make_tiny_llava_on
from tiny_models import TINY, make_tiny_llava, make_tiny_mllama, make_tiny_qwen, make_tiny_qwen3_5
from transformers import Lfm2Config

from mmdpo_kernels import patch_model
from mmdpo_trainers.answers.transformers_engine import generate_responses
from mmdpo_trainers.errors import ConfigError
from mmdpo_trainers.models.encode import EncodedPrompts, encode_prompts
from mmdpo_trainers.models.loaded import LoadedModel
from mmdpo_trainers.models.loading import load_model

OPENINGS = ["the colour is", "", "it is a"]
STEPS = 4
HIDDEN_SHARE = 0.6
# Mllama's pictures are no tokens; a hidden token enters a state that layers carry; PaliGemma is refused; GLM-4.5V's router rounds to
# float32, and all else of it is GLM-4.1V's.
FAMILIES = [
    name for name in TINY if name not in ("mllama", "glm4v_moe") and not name.startswith(("qwen3_5", "minicpm", "paligemma"))
]

Record = dict[str, Any]


def hidden(row: int, count: int) -> np.ndarray:
    """Some image tokens of each record, other ones of each."""
    return np.random.RandomState(row).random_sample(count) < HIDDEN_SHARE


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    """Prompts of several lengths and numbers of pictures, so that rows are padded."""
    return make_prompts(tmp_path_factory.mktemp("prompts"), [("sequence", 3), ("single", 1), ("sequence", 2)])


def generated(loaded: LoadedModel, records: list[Record], hide: Any) -> tuple[list[list[int]], list[torch.Tensor]]:
    """Greedy ids, and the model's own logits of each step's last column: generate hands on float32."""
    steps: list[torch.Tensor] = []
    hook = loaded.model.register_forward_hook(lambda module, args, output: steps.append(output.logits[:, -1].clone()))
    try:
        answers = generate_responses(loaded, records, max_new_tokens=STEPS, openings=OPENINGS, hidden=hide)
    finally:
        hook.remove()
    return [answer["response_ids"] for answer in answers], steps


def padded(loaded: LoadedModel, encoded: EncodedPrompts, steps: int) -> tuple[list[list[int]], list[torch.Tensor]]:
    """The same without a cache, a whole forward for each step, masks and positions written out."""
    inputs = dict(encoded.inputs)
    ids, seen = inputs.pop("input_ids"), inputs.pop("attention_mask")
    width = ids.shape[1]
    positions = loaded.family.position_ids(ids, inputs.get("image_grid_thw"), seen)
    counted = (seen.cumsum(-1) - 1).clamp(min=0) + loaded.family.first_position
    positions = counted if positions is None else positions
    seen = seen.clone()
    for row in range(len(ids)):
        columns = (ids[row] == loaded.image_token_id).nonzero().flatten()
        seen[row, columns[torch.from_numpy(hidden(row, len(columns)))]] = 0
    found: list[torch.Tensor] = []
    ended = torch.zeros(len(ids), 1, dtype=torch.bool)
    for _ in range(steps):
        with torch.no_grad():
            output = loaded.model(input_ids=ids, attention_mask=seen, position_ids=positions, use_cache=False, **inputs)
        found.append(output.logits[:, -1])
        scores = output.logits[:, -1].clone()
        scores[:, loaded.image_token_id] = -torch.inf
        chosen = scores.argmax(-1, keepdim=True).masked_fill(ended, loaded.pad_id)
        ended |= torch.isin(chosen, torch.tensor(sorted(loaded.end_ids)))
        ids = torch.cat([ids, chosen], 1)
        seen = torch.cat([seen, torch.ones_like(seen[:, :1])], 1)
        positions = torch.cat([positions, positions[..., -1:] + 1], -1)
        for name in ("token_type_ids", "mm_token_type_ids"):
            if name in inputs:
                inputs[name] = torch.cat([inputs[name], torch.zeros_like(inputs[name][:, :1])], 1)
    return ids[:, width:].tolist(), found


@pytest.mark.parametrize("name", FAMILIES)
def test_hidden_keys_are_those_of_a_padded_model(name: str, tmp_path: Path, records: list[Record]) -> None:
    path = TINY[name](tmp_path / "model")
    loaded, plain = (load_model(path, dtype=torch.float64, device="cpu") for _ in range(2))
    patch_model(loaded.model)
    ids, logits = generated(loaded, records, hidden)
    encoded = encode_prompts(plain, records, padding_side="left", answers=OPENINGS)
    expected_ids, expected = padded(plain, encoded, len(logits))
    assert len(logits) == STEPS and (encoded.inputs["attention_mask"] == 0).any()
    for step, (one, other) in enumerate(zip(logits, expected, strict=True)):
        assert (one - other).abs().max() < 1e-9, step
    assert ids == [row[: len(its)] for row, its in zip(expected_ids, ids, strict=True)] and any(map(len, ids))
    # They are hidden: nothing of the same numbers is left of what the model says where it sees all.
    _, others = generated(loaded, records, None)
    assert ((logits[0] - others[0]).abs().amax(-1) > 1e-3).all()


@pytest.mark.parametrize("make", [make_tiny_llava, make_tiny_qwen])
def test_what_is_hidden_is_not_seen(make: Callable[..., Path], tmp_path: Path) -> None:
    """With all its tokens hidden, another picture of the same size makes no difference; in an unhidden prompt it does."""
    loaded = load_model(make(tmp_path / "model"), dtype=torch.float64, device="cpu")
    patch_model(loaded.model)
    one, other = (
        make_prompts(tmp_path / str(seed), [("sequence", 2), ("single", 1), ("single", 1)], seed=seed) for seed in (0, 1)
    )
    assert one[0]["prompt"] == other[0]["prompt"]

    def all_of_it(row: int, count: int) -> np.ndarray:
        return np.ones(count, dtype=bool)

    for hide, same in ((all_of_it, True), (None, False)):
        (_, first), (_, second) = generated(loaded, one, hide), generated(loaded, other, hide)
        assert torch.equal(first[0], second[0]) is same


def test_hiding_nothing_changes_nothing(tmp_path: Path, records: list[Record]) -> None:
    loaded = load_model(make_tiny_llava(tmp_path / "model"), dtype=torch.float64, device="cpu")
    patch_model(loaded.model)
    ids, logits = generated(loaded, records, None)
    same_ids, same = generated(loaded, records, lambda row, count: np.zeros(count, dtype=bool))
    assert ids == same_ids and all(torch.equal(*both) for both in zip(logits, same, strict=True))


def test_families_where_it_cannot_be(tmp_path: Path, records: list[Record]) -> None:
    recurrent = make_tiny_llava_on(tmp_path / "lfm2", Lfm2Config, layer_types=["conv", "full_attention", "conv"])
    for path, message in (
        (
            make_tiny_mllama(tmp_path / "mllama"),
            "family mllama: image tokens cannot be hidden: its pictures come in by cross-attention",
        ),
        (
            TINY["paligemma"](tmp_path / "paligemma"),
            "family paligemma: image tokens cannot be hidden: its prompts see themselves both ways",
        ),
        (
            make_tiny_qwen3_5(tmp_path / "qwen"),
            "family qwen3_5: image tokens cannot be hidden: its layers of linear_attention carry every token on",
        ),
        (recurrent, "family llava: image tokens cannot be hidden: its layers of conv carry every token on"),
    ):
        loaded = load_model(path, device="cpu")
        patch_model(loaded.model)
        with pytest.raises(ConfigError, match=message):
            generate_responses(loaded, records, max_new_tokens=2, hidden=hidden)


def test_an_answer_goes_on_from_its_opening_and_ends_by_its_text(tmp_path: Path, records: list[Record]) -> None:
    """What follows an opening is what follows it in the whole answer; a row that has ended is no business of its neighbours."""
    loaded = load_model(make_tiny_llava(tmp_path / "model"), dtype=torch.float64, device="cpu")
    patch_model(loaded.model)
    whole = [answer["response_ids"] for answer in generate_responses(loaded, records, max_new_tokens=6)]
    openings = [loaded.tokenizer.decode(ids[:2]) for ids in whole]
    assert [loaded.texts.answer("r", "the answer", text) for text in openings] == [ids[:2] for ids in whole]
    rest = [answer["response_ids"] for answer in generate_responses(loaded, records, max_new_tokens=4, openings=openings)]
    assert rest == [ids[2:] for ids in whole]
    ended = generate_responses(loaded, records, max_new_tokens=6, finished=lambda row, ids: len(ids) == 3 and row != 1)
    assert [answer["response_ids"] for answer in ended] == [whole[0][:3], whole[1], whole[2][:3]]
    assert [answer["num_tokens"] for answer in ended] == [3, 6, 3]
