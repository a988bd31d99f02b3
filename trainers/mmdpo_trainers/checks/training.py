"""Preference batches: packed into trees against separate sequences, their gradients, their pictures, and the head."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from mmdpo_kernels import SharedRows, TokenTree, patch_model
from mmdpo_trainers.checks.baseline import BLUR, branch_logp
from mmdpo_trainers.checks.copies import copy_of, patched
from mmdpo_trainers.checks.inputs import preference_records
from mmdpo_trainers.checks.result import CheckFailure, CheckResult, Differences
from mmdpo_trainers.data.pair_records import BRANCHES
from mmdpo_trainers.models.families import tree_refusal
from mmdpo_trainers.models.loaded import LoadedModel
from mmdpo_trainers.training import head, model_parts
from mmdpo_trainers.training.batches.collator import PreferenceBatch, PreferenceCollator, model_collator
from mmdpo_trainers.training.training_mode import disable_dropout


def collator(loaded: LoadedModel, *, packing: bool) -> PreferenceCollator:
    """Of the model, with a chosen, a rejected and a corrupted branch."""
    return model_collator(
        loaded.model, loaded.processor, tree_packing=packing, branches=BRANCHES, corruption=BLUR, date=loaded.date
    )


def preference_batch(loaded: LoadedModel, *, packing: bool, records: list[dict[str, Any]] | None = None) -> PreferenceBatch:
    """All `preference_records` in one micro-batch on the model's device."""
    found = collator(loaded, packing=packing)(preference_records() if records is None else records)["batch"]
    return found.to(loaded.device)


@torch.no_grad()
def check_tree(loaded: LoadedModel) -> CheckResult:
    """Responses' log-probabilities in a packed batch and in a padded one, against the unpatched model on each sequence by itself.

    Where packed trees are refused, that they are, with the reason.
    """
    records, refusal = preference_records(), tree_refusal(loaded.model)
    expected = torch.stack(
        [torch.stack([branch_logp(loaded, record, branch) for branch in BRANCHES.values()]) for record in records]
    )
    rows, packed = preference_batch(loaded, packing=False), 0
    found = Differences(loaded.dtype)
    with patched(loaded.model):
        found.add(head.batch_logps(loaded.model, rows), expected, "separate sequences")
        if refusal is None:
            tree = preference_batch(loaded, packing=True)
            packed = tree.input_ids.shape[1]
            found.add(head.batch_logps(loaded.model, tree), expected, "packed tree")
        else:
            _must_be_refused(loaded, rows.targets.tolist(), refusal)
    shown = [record["images"] for record in records]
    if any(bool(torch.isclose(values[0], values[2])) for values, images in zip(expected, shown, strict=True) if images):
        raise CheckFailure("a corrupted picture changes no log-probability, so nothing is compared")
    tokens = int(rows.attention_mask.sum())
    detail = f"{expected.numel()} sequences of {tokens} tokens" + (f", {packed} in the tree" if packed else "")
    return found.result("tree", detail, refused=refusal)


def _must_be_refused(loaded: LoadedModel, text: list[int], refusal: str) -> None:
    """A tree of text, given to the model by hand."""
    prompt = text[:4]
    tree = TokenTree.from_sequences([[*prompt, text[4]], [*prompt, text[5], text[6]]], prompt_lengths=[len(prompt)] * 2)
    given = {"input_ids": tree.input_ids[None], "attention_mask": tree.attention_mask, "position_ids": tree.position_ids[None]}
    try:
        loaded.model(**{name: value.to(loaded.device) for name, value in given.items()}, use_cache=False)
    except ValueError as error:
        if refusal not in str(error):
            raise CheckFailure(f"a tree is refused by {str(error)!r}, which does not say {refusal!r}") from error
        return
    raise CheckFailure(f"trees are not exact here ({refusal}), and yet one was not refused")


def check_gradients(loaded: LoadedModel) -> CheckResult:
    """Gradients of LoRA and of the token embedding with gradient checkpointing of both kinds, against those without.

    Of the kind that is not re-entrant alone where layers share keys and values, as training refuses the other.
    """
    packing = tree_refusal(loaded.model) is None
    batch = preference_batch(loaded, packing=packing)
    found = Differences(loaded.dtype)
    with copy_of(loaded.model) as base:
        adapted = _with_lora(base)
        with torch.no_grad():
            features = model_parts.image_features(adapted, batch)
        expected = _gradients(adapted, batch, features)
        if len(expected) < 3 or not any(bool(gradient.abs().max() > 0) for gradient in expected.values()):
            raise CheckFailure("LoRA and the embedding get no gradient")
        sizes = {name: float(gradient.abs().max()) for name, gradient in expected.items()}
        least = 1e-3 * max(sizes.values())
        for reentrant in (False,) if model_parts.shares_keys(base) else (True, False):
            _checkpointing(base, "enable")({"use_reentrant": reentrant})
            with _counted(base) as calls:
                got = _gradients(adapted, batch, features)
            _checkpointing(base, "disable")()
            if calls["forward"] < 2:
                raise CheckFailure("gradient checkpointing has no effect: the first layer ran once")
            if got.keys() != expected.keys():
                raise CheckFailure(
                    f"use_reentrant={reentrant}: {len(got)} parameters have gradients, {len(expected)} without checkpointing"
                )
            for name, gradient in expected.items():
                found.add(got[name], gradient, f"{name}, use_reentrant={reentrant}", max(sizes[name], least))
    kind = "packed tree" if packing else "separate sequences"
    return found.result("gradients", f"{len(expected)} parameters, {kind}")


def _checkpointing(model: Any, what: str) -> Any:
    """A method of transformers, under the name that 5.20 gave it where there is one: the older name warns from then on."""
    return getattr(model, f"activation_checkpointing_{what}", None) or getattr(model, f"gradient_checkpointing_{what}")


def _with_lora(model: Any) -> Any:
    """The model patched, in training mode without dropout, with LoRA away from its starting point; the embedding is trained too."""
    disable_dropout(model)
    decoder = model.get_decoder()
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    # Attention, MLP and layers that carry a state by the names that most decoders have, others by whatever linears there are.
    leaves = {name.rsplit(".", 1)[-1] for name, module in decoder.named_modules() if isinstance(module, nn.Linear)}
    usual = {"q_proj", "v_proj", "down_proj", "in_proj_qkv", "in_proj_a", "in_proj_b", "in_proj_z"}
    chosen = sorted(leaves & usual) or sorted(leaves)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        target = rf"{prefix}\..*\.({'|'.join(chosen)})"
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=target, init_lora_weights=False))
    patch_model(model)
    model.get_input_embeddings().weight.requires_grad_(True)
    return adapted.train()


def _gradients(model: Any, batch: PreferenceBatch, features: list[Tensor]) -> dict[str, Tensor]:
    """By parameter, of a weighted sum of the responses' log-probabilities."""
    model.zero_grad(set_to_none=True)
    logps = head.response_logps(model, model_parts.hidden_states(model, batch, features), batch)
    weights = torch.linspace(1.0, 2.0, logps.numel(), device=logps.device, dtype=logps.dtype).view_as(logps)
    (logps * weights).mean().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@contextmanager
def _counted(model: Any) -> Iterator[dict[str, int]]:
    """How often the first decoder layer's attention or MLP runs, recomputation included."""
    calls = {"forward": 0}
    inner = next(iter(model.get_decoder().layers[0].children()))

    def count(*_: Any) -> None:
        calls["forward"] += 1

    hook = inner.register_forward_pre_hook(count)
    try:
        yield calls
    finally:
        hook.remove()


@torch.no_grad()
def check_shared_vision(loaded: LoadedModel) -> CheckResult:
    """Pictures that several branches and records show go through the vision tower once, with the log-probabilities of a pass each."""
    records = preference_records()
    packing = tree_refusal(loaded.model) is None
    batch = preference_batch(loaded, packing=packing, records=records)
    shown = sum(2 * len(record["images"]) + len(record["images"]) for record in records)
    encoded = 0 if batch.pictures is None else len(batch.pictures.tokens)
    # Those of the first record are the second's too; of each record one picture is also blurred.
    distinct = sum(len(record["images"]) for record in records[:1] + records[2:]) + len([r for r in records[1:] if r["images"]])
    if encoded != distinct:
        raise CheckFailure(f"expected {distinct} pictures to be encoded for {shown} that are shown, got {encoded}")
    body = loaded.model.base_model
    parts = dict(body.named_modules())
    tower = next((parts[name] for name in loaded.family.vision if name in parts), None)
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    hook = None if tower is None else tower.register_forward_pre_hook(count)
    try:
        with patched(loaded.model):
            got = head.batch_logps(loaded.model, batch)
            in_batch = calls
            each = [preference_batch(loaded, packing=packing, records=[record]) for record in records]
            expected = torch.cat([head.batch_logps(loaded.model, one) for one in each])
    finally:
        if hook is not None:
            hook.remove()
    if in_batch > encoded:
        raise CheckFailure(f"the vision tower was called {in_batch} times for {encoded} pictures")
    found = Differences(loaded.dtype)
    found.add(got, expected, "against each record by itself")
    return found.result(
        "shared vision", f"{shown} pictures shown, {encoded} encoded, {in_batch} call{'s' * (in_batch != 1)} of the tower"
    )


@torch.no_grad()
def check_heads(loaded: LoadedModel) -> CheckResult:
    """The head's log-probabilities against `log_softmax` of the model's logits, from the same hidden states."""
    model: Any = loaded.model
    output = model.get_output_embeddings()
    text = [record for record in preference_records() if not record["images"]]
    batch = preference_batch(loaded, packing=False, records=text)
    hidden: list[Tensor] = []
    hook = output.register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
    try:
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    finally:
        hook.remove()
    # All tokens of the vocabulary in turn, so that every row of the weight is looked at.
    vocabulary = logits.shape[-1]
    rows = batch.rows.repeat_interleave(16)
    step = max(1, vocabulary // 16)
    targets = (torch.arange(16, device=rows.device) * step).repeat(len(batch.rows)) + batch.targets.repeat_interleave(16) % step
    targets = targets.clamp(max=vocabulary - 1)
    expected = logits.flatten(0, 1)[rows].double().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    pairs: Any = SimpleNamespace(shared_rows=SharedRows.from_pairs(rows, targets))
    got = head.token_logps(model, head.scored_rows(hidden[-1], pairs), pairs)
    found = Differences(loaded.dtype)
    found.add(got, expected, "log-probabilities")
    tied = output.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    config = model.config.get_text_config()
    named = [
        name
        for name in ("final_logit_softcapping", "logit_scale", "logits_scaling", "output_multiplier")
        if getattr(config, name, None)
    ]
    return found.result("heads", ", ".join(["tied" if tied else "untied", *named, f"{len(rows)} log-probabilities"]))
