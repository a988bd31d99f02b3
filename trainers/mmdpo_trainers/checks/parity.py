"""A patched model against the unpatched one: logits, generated tokens, and that nothing of the patch stays."""

from __future__ import annotations

import copy
from typing import Any

import torch

from mmdpo_trainers.checks.copies import patched
from mmdpo_trainers.checks.inputs import answers, prompt_records
from mmdpo_trainers.checks.result import CheckFailure, CheckResult, Differences
from mmdpo_trainers.models.encode import encode_prompts
from mmdpo_trainers.models.loaded import LoadedModel

_NEW_TOKENS = 8


@torch.no_grad()
def check_parity(loaded: LoadedModel) -> CheckResult:
    """Logits of a padded batch with two, one and no picture a row, padded on either side."""
    found = Differences(loaded.dtype)
    for side in ("right", "left"):
        encoded = encode_prompts(loaded, prompt_records(), padding_side=side, answers=answers())
        kept = encoded.inputs["attention_mask"].bool()
        expected = loaded.model(**encoded.inputs, use_cache=False).logits[kept]
        with patched(loaded.model):
            found.add(loaded.model(**encoded.inputs, use_cache=False).logits[kept], expected, f"padded on the {side}")
    return found.result("parity", f"logits of {kept.shape[0]} rows of {kept.shape[1]} tokens")


@torch.no_grad()
def check_generate(loaded: LoadedModel) -> CheckResult:
    """Greedy answers token for token. Where they part, it is at two tokens that are as likely as each other."""
    inputs = encode_prompts(loaded, prompt_records(), padding_side="left").inputs
    options: dict[str, Any] = {
        "max_new_tokens": _NEW_TOKENS,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
        "pad_token_id": loaded.pad_id,
    }
    expected = loaded.model.generate(**inputs, **options)
    with patched(loaded.model):
        got = loaded.model.generate(**inputs, **options)
    width = inputs["input_ids"].shape[1]
    found, same = Differences(loaded.dtype), 0
    for row, (theirs, ours) in enumerate(zip(expected.sequences[:, width:], got.sequences[:, width:], strict=True)):
        length = min(len(theirs), len(ours))
        parted = (theirs[:length] != ours[:length]).nonzero()
        steps = int(parted[0]) if len(parted) else length
        same += steps
        for step in range(min(steps + 1, length)):
            found.add(got.logits[step][row], expected.logits[step][row], f"logits of row {row}, token {step}")
        if steps < length:
            logits = expected.logits[steps][row].double()
            gap = float(logits[theirs[steps]] - logits[ours[steps]])
            if gap > 2 * found.limit * float(logits.abs().max()):
                raise CheckFailure(
                    f"row {row}: token {steps} is {int(ours[steps])}, and unpatched {int(theirs[steps])}, by {gap:.2g}"
                )
    return found.result("generate", f"{same} tokens of {len(got.sequences)} left-padded rows")


@torch.no_grad()
def check_unpatch(loaded: LoadedModel) -> CheckResult:
    """Attributes, hooks, configurations and logits, bit for bit, before and after."""
    inputs = encode_prompts(loaded, prompt_records(), padding_side="right", answers=answers()).inputs
    kept = inputs["attention_mask"].bool()
    # transformers installs hooks of its own in a first forward.
    expected = loaded.model(**inputs, use_cache=False).logits[kept]
    before = _snapshot(loaded.model)
    with patched(loaded.model):
        if _snapshot(loaded.model) == before:
            raise CheckFailure("the patched model is as it was, so the patch does nothing")
        loaded.model(**inputs, use_cache=False)
    after = _snapshot(loaded.model)
    changed = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    if changed:
        raise CheckFailure(f"{changed[0] or 'the model'} is not as it was before patching")
    again = loaded.model(**inputs, use_cache=False).logits[kept]
    if not torch.allclose(again, expected, rtol=0, atol=0, equal_nan=True):
        raise CheckFailure("logits are not those from before patching")
    return CheckResult(
        name="unpatch", figure=0.0, limit=0.0, verdict="exact", detail=f"{len(before)} modules, and logits bit for bit"
    )


def _snapshot(model: Any) -> dict[str, Any]:
    """By module, everything that patching could leave behind: attributes, hooks and configurations."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        plain = {key: value for key, value in vars(module).items() if key not in ("_parameters", "_buffers", "_modules")}
        found[name] = {key: _plain(value) if hasattr(value, "to_dict") else repr(value) for key, value in plain.items()}
    return found


def _plain(value: Any) -> Any:
    """A copy of what configurations hold, which may themselves refuse to be compared."""
    if hasattr(value, "to_dict"):
        value = value.__dict__
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return copy.deepcopy(value)
