"""Which tokens see which, cell by cell: the masks that transformers builds for separate padded sequences, and those of a packed tree.

Models whose pictures (or prompts) see themselves both ways, with pictures longer than the window, side by side and apart, hidden image tokens,
padding on either side.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import make_tiny_gemma3, make_tiny_gemma4, make_tiny_paligemma, make_tiny_paligemma2
from tiny_models.gemma4 import tiny_gemma4_unified_config
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    Gemma3nAudioConfig,
    Gemma3nConfig,
    Gemma3nForConditionalGeneration,
    Gemma3nTextConfig,
    Gemma3nVisionConfig,
)
from transformers.models.gemma3n import modeling_gemma3n

import mmdpo_kernels.patch
from mmdpo_kernels import TokenTree, patch_model
from mmdpo_kernels.patched import language_tower
from mmdpo_kernels.tree_mask import visible
from mmdpo_trainers.models.families import Family, family_of

PICTURE = 9


def from_folder(make: Callable[..., Path], **options: Any) -> Callable[[Path], Any]:
    return lambda folder: AutoModelForImageTextToText.from_pretrained(make(folder / "model", **options)).eval()


def unified(folder: Path, **options: Any) -> Any:
    """Without a processor, which needs torchvision."""
    return AutoModelForImageTextToText.from_config(tiny_gemma4_unified_config(**options)).eval()


def gemma3n(folder: Path) -> Any:
    """Its vision tower is timm's; nothing here goes through the layer that stands in for it."""
    text = Gemma3nTextConfig(
        vocab_size=90,
        vocab_size_per_layer_input=80,
        hidden_size=32,
        hidden_size_per_layer_input=4,
        intermediate_size=64,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"],
        num_kv_shared_layers=2,
        altup_num_inputs=2,
        laurel_rank=4,
        activation_sparsity_pattern=[0.0] * 5,
    )
    config = Gemma3nConfig(
        text_config=text,
        vision_config=Gemma3nVisionConfig(hidden_size=16, vocab_size=4, vocab_offset=80),
        audio_config=Gemma3nAudioConfig(hidden_size=16, vocab_size=4, vocab_offset=84),
        image_token_id=81,
        audio_token_id=85,
    )
    right = modeling_gemma3n.AutoModel.from_config
    with pytest.MonkeyPatch.context() as patch:
        made = lambda config, **options: right(config, **options) if "text" in config.model_type else torch.nn.Identity()  # noqa: E731
        patch.setattr(modeling_gemma3n.AutoModel, "from_config", made)
        return Gemma3nForConditionalGeneration(config).eval()


MODELS: dict[str, Callable[[Path], Any]] = {
    "gemma3": from_folder(make_tiny_gemma3, sliding_window=6),
    "gemma3, short pictures": from_folder(make_tiny_gemma3, sliding_window=16),
    "gemma3n": gemma3n,
    "gemma4": from_folder(make_tiny_gemma4, sliding_window=6),
    "gemma4, causal": from_folder(make_tiny_gemma4, sliding_window=6, both_ways=None),
    "gemma4_unified": lambda folder: unified(folder, sliding_window=2 * PICTURE),
    "paligemma": from_folder(make_tiny_paligemma),
    "paligemma 2, a prompt as long as the window": from_folder(make_tiny_paligemma2, sliding_window=24),
}


class Sequence:
    """Text, pictures as (identity, hidden tokens), and a response. Text ids from 5 on."""

    def __init__(self, image: int, parts: list[list[int] | tuple[int, tuple[int, ...]]], response: list[int]) -> None:
        ids, identities, hidden = [], [], []
        for part in parts:
            shown = isinstance(part, tuple)
            ids += [image] * PICTURE if shown else part
            identities += [100 * part[0] + place if shown else -1 for place in range(PICTURE if shown else len(part))]
            hidden += [shown and place in part[1] for place in range(PICTURE if shown else len(part))]
        self.prompt = len(ids)
        self.ids = np.array(ids + response)
        self.identities = np.array(identities + [-1] * len(response))
        self.hidden = np.array(hidden + [False] * len(response))
        self.is_image = self.identities >= 0


def sequences(image: int) -> list[Sequence]:
    """Two answers and a second question about two pictures, one of them with hidden tokens, another one, pictures side by side, text alone."""
    start, question, middle = [2, 40, 41], [42, 43], [44]
    whole: list[Any] = [start, (1, ()), middle, (2, ())]
    return [
        Sequence(image, [*whole, question], [50, 51, 52]),
        Sequence(image, [*whole, question], [50, 53]),
        Sequence(image, [*whole, [45, 43]], [54]),
        Sequence(image, [start, (1, ()), middle, (2, (3, 4, 8)), question], [50, 51, 52]),
        Sequence(image, [start, (1, ()), middle, (3, ()), question], [50, 51]),
        Sequence(image, [[2], (1, ()), (2, (0,))], [55, 56]),
        Sequence(image, [start], [50, 51]),
    ]


def tree_of(family: Family, rows: list[Sequence]) -> TokenTree:
    blocks = [family.blocks(row.is_image, row.prompt) for row in rows]
    assert all(block is not None for block in blocks)
    return TokenTree.from_sequences(
        [row.ids for row in rows],
        prompt_lengths=[row.prompt for row in rows],
        identities=[row.identities for row in rows],
        unseen=[row.hidden for row in rows],
        blocks=[block for block in blocks if block is not None],
    )


def seen_by_layers(monkeypatch: pytest.MonkeyPatch, model: Any, family: Family, tree: TokenTree) -> list[Tensor]:
    """By layer (S, S) bool: what the patched model's attention is called with for a packed tree."""
    found: list[Tensor] = []
    right = mmdpo_kernels.patch.tree_attention

    def watched(query: Tensor, key: Tensor, value: Tensor, tree_end: Tensor, **options: Any) -> Any:
        found.append(visible(tree_end, options["window"], options["reach"])[0])
        return right(query, key, value, tree_end, **options)

    monkeypatch.setattr(mmdpo_kernels.patch, "tree_attention", watched)
    images = int((tree.input_ids == model.config.image_token_id).sum())
    features = [torch.randn(images, model.config.get_text_config().hidden_size)]
    position_ids = tree.position_ids[None] + family.first_position
    with torch.no_grad():
        family.hidden_states(
            patch_model(model).base_model,
            tree.input_ids[None],
            features,
            torch.arange(images),
            attention_mask=tree.attention_mask,
            position_ids=position_ids,
            use_cache=False,
        )
    return found


def dense_masks(model: Any, family: Family, rows: list[Sequence], side: str) -> list[list[Tensor]]:
    """By layer and sequence (L, L) bool: transformers' own, of a padded batch through the unpatched model."""
    width = max(len(row.ids) for row in rows) + 2
    places = [torch.arange(len(row.ids)) + (width - len(row.ids) if side == "left" else 0) for row in rows]
    ids, mask, answers = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(3))
    for index, (row, place) in enumerate(zip(rows, places, strict=True)):
        ids[index, place] = torch.from_numpy(row.ids)
        mask[index, place] = torch.from_numpy(~row.hidden).long()
        answers[index, place[row.prompt :]] = 1
    types = {family.token_types: (ids == model.config.image_token_id).long()} | family.answer_types(answers.bool())
    found: list[Tensor] = []
    tower = language_tower(model)
    tower.set_attn_implementation("eager")

    def keep(module: Any, args: Any, kwargs: Any) -> None:
        found.append(kwargs["attention_mask"][:, 0] == 0)

    hooks = [layer.self_attn.register_forward_pre_hook(keep, with_kwargs=True) for layer in tower.layers]
    with torch.no_grad():
        model.base_model(input_ids=ids, attention_mask=mask, use_cache=False, **types)
    for hook in hooks:
        hook.remove()
    return [[layer[index][place][:, place] for index, place in enumerate(places)] for layer in found]


@pytest.mark.parametrize("name", list(MODELS))
def test_a_tree_sees_what_separate_sequences_see(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODELS[name](tmp_path)
    family = family_of(model)
    rows = sequences(model.config.image_token_id)
    tree = tree_of(family, rows)
    assert tree.num_tokens < sum(len(row.ids) for row in rows)
    expected = {side: dense_masks(model, family, rows, side) for side in ("left", "right")}
    found = seen_by_layers(monkeypatch, model, family, tree)
    assert len(found) == len(expected["left"]) == model.config.get_text_config().num_hidden_layers
    ahead = 0
    for side, layers in expected.items():
        for layer, its_rows in enumerate(layers):
            for index, (path, mask) in enumerate(zip(tree.paths, its_rows, strict=True)):
                seen = found[layer][path]
                assert torch.equal(seen[:, path], mask), (side, layer, index, (seen[:, path] != mask).nonzero().tolist()[:5])
                assert int(seen.sum()) == int(mask.sum()), "a token sees another branch"
                ahead += int(mask.triu(1).sum())
    assert (ahead > 0) == (name not in ("gemma3n", "gemma4, causal"))


@pytest.mark.parametrize("name", ["gemma3n", "gemma4_unified"])
def test_a_tree_is_its_sequences_where_no_checkpoint_can_be_loaded(name: str, tmp_path: Path) -> None:
    """Their vision towers or processors need packages that are not here, so features are drawn."""
    model = patch_model(MODELS[name](tmp_path)).double()
    family, rows = family_of(model), sequences(model.config.image_token_id)
    tree = tree_of(family, rows)
    features = [torch.randn(1000, model.config.get_text_config().hidden_size, dtype=torch.float64)]
    shown = torch.tensor([rows[first].identities[offset] for first, offset in tree.origin.tolist()])
    body: Any = model.base_model
    inputs = {"attention_mask": tree.attention_mask, "position_ids": tree.position_ids[None], "use_cache": False}
    with torch.no_grad():
        packed = family.hidden_states(body, tree.input_ids[None], features, shown[shown >= 0], **inputs)[0]
        for row, path in zip(rows, tree.paths, strict=True):
            ids, shown = torch.from_numpy(row.ids)[None], torch.from_numpy(row.identities[row.is_image])
            mask = torch.from_numpy(~row.hidden).long()[None]
            alone = family.hidden_states(body, ids, features if len(shown) else [], shown, attention_mask=mask, use_cache=False)[
                0
            ]
            torch.testing.assert_close(packed[path], alone, rtol=0, atol=2e-6 * float(alone.abs().max()))


def test_what_a_tree_shares(tmp_path: Path) -> None:
    """Pictures whole or not at all; a prefix only where all of it is the same."""
    gemma, prefix = (family_of(MODELS[name](tmp_path / name)) for name in ("gemma3", "paligemma"))
    one, same, other, masked, *_ = rows = sequences(7)
    trees = {name: tree_of(family, rows[:4]) for name, family in (("gemma3", gemma), ("paligemma", prefix))}
    question = one.prompt - 2
    # Up to the second picture, which is another one where tokens of it are hidden.
    assert trees["gemma3"].num_tokens == sum(len(row.ids) for row in rows[:4]) - (one.prompt + 1) - question - (
        question - PICTURE
    )
    assert trees["paligemma"].num_tokens == len(one.ids) + len(same.ids) - one.prompt - 1 + len(other.ids) + len(masked.ids)


@pytest.mark.parametrize(
    ("name", "model", "what"),
    [
        ("paligemma 2", from_folder(make_tiny_paligemma2, sliding_window=23), "a prompt of 24 tokens .* window of 23"),
        ("gemma4_unified", lambda folder: unified(folder, sliding_window=8), "a picture of 9 tokens .* window of 8"),
    ],
)
def test_what_sees_itself_past_the_window_is_refused(name: str, model: Any, what: str, tmp_path: Path) -> None:
    """Where transformers takes a picture into the mask behind the window, and not before it."""
    family = family_of(model(tmp_path))
    is_image = np.arange(30) // PICTURE == 1
    with pytest.raises(ValueError, match=what):
        family.blocks(is_image, 24)
