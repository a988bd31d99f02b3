"""A preference pair through Qwen3.5's layers as one tree and as padded rows: tokens, and seconds of forward and backward.

    python -m benchmarks.runs.recurrent_tree            # table, results/recurrent_tree_cpu.json, and its section of docs/results.md
    python -m benchmarks.runs.recurrent_tree --small    # the same on tiny inputs, into build/benchmarks

A text model of random weights, three of four layers Gated DeltaNet by transformers' PyTorch kernels, float32, one thread. Both sides are the
same patched model with the same loss and train all weights; they take turns in one process, and processor time is counted.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

from benchmarks.measure import add_place, alternate, machine, markdown, place_of, ratios
from mmdpo_kernels import SequenceLogps, TokenTree, linear_logprobs, patch_model, preference_loss

GOAL = 1.6
ROWS, TREE = "padded rows", "tree"


@dataclass(frozen=True)
class Setting:
    hidden: int = 256
    layers: int = 4
    vocabulary: int = 4000
    prompt: int = 760
    response: int = 40
    """Tokens of each response."""
    pairs: int = 1


SMALL = Setting(hidden=32, vocabulary=50, prompt=70, response=9)


def build(setting: Setting) -> Any:
    """The patched model, with heads of 64 numbers that carry a state and heads of 64 that attend."""
    heads = max(1, setting.hidden // 64)
    config = Qwen3_5TextConfig(
        vocab_size=setting.vocabulary,
        hidden_size=setting.hidden,
        intermediate_size=2 * setting.hidden,
        num_hidden_layers=setting.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=64,
        linear_num_key_heads=heads,
        linear_num_value_heads=2 * heads,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return patch_model(Qwen3_5ForCausalLM(config))


class Sides:
    """The pairs in both forms, and a step of each."""

    def __init__(self, setting: Setting) -> None:
        self.model, draw = build(setting), torch.Generator().manual_seed(1)
        self.prompt = setting.prompt
        self.sequences = []
        for _ in range(setting.pairs):
            shared = torch.randint(1, setting.vocabulary, (setting.prompt,), generator=draw)
            for _ in range(2):
                own = torch.randint(1, setting.vocabulary, (setting.response,), generator=draw)
                self.sequences.append(torch.cat([shared, own]))
        self.tree = TokenTree.from_sequences(
            [row.tolist() for row in self.sequences], prompt_lengths=[setting.prompt] * len(self.sequences)
        )
        self.tokens = {ROWS: sum(map(len, self.sequences)), TREE: self.tree.num_tokens}

    def step(self, side: str) -> tuple[float, dict[str, Tensor]]:
        """Forward and backward; the loss, and the gradients by parameter."""
        self.model.zero_grad(set_to_none=True)
        hidden, rows, targets = self._tree() if side == TREE else self._rows()
        logps = linear_logprobs(hidden[rows], self.model.lm_head.weight, targets).logps
        chosen, rejected = logps.view(-1, 2, len(self.sequences[0]) - self.prompt).sum(-1).unbind(1)
        loss = preference_loss(SequenceLogps(chosen=chosen, rejected=rejected)).loss
        loss.backward()
        return float(loss), {name: parameter.grad for name, parameter in self.model.named_parameters()}

    def _tree(self) -> tuple[Tensor, Tensor, Tensor]:
        tree = self.tree
        inputs = {"input_ids": tree.input_ids[None], "position_ids": tree.position_ids[None]}
        hidden = self.model.model(**inputs, attention_mask=tree.attention_mask, use_cache=False).last_hidden_state[0]
        return hidden, torch.cat(tree.rows), torch.cat(tree.targets)

    def _rows(self) -> tuple[Tensor, Tensor, Tensor]:
        ids = torch.stack(self.sequences)
        hidden = self.model.model(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)
        width = ids.shape[1]
        rows = torch.cat([torch.arange(self.prompt - 1, width - 1) + width * row for row in range(len(ids))])
        return hidden, rows, ids[:, self.prompt :].flatten()


def difference(sides: Sides) -> dict[str, float]:
    """How far the tree is from the rows: its loss, and all gradients together, as a share of their norm."""
    (loss, gradients), (other, others) = sides.step(TREE), sides.step(ROWS)
    apart = sum(float((gradients[name] - others[name]).square().sum()) for name in gradients)
    whole = sum(float(others[name].square().sum()) for name in gradients)
    return {"loss": abs(loss - other), "gradients": (apart / whole) ** 0.5}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, help="turns that count, after one warm-up (default 11, small 1)")
    add_place(parser)
    arguments = parser.parse_args(argv)
    setting, repeats = (SMALL if arguments.small else Setting()), arguments.repeats or (1 if arguments.small else 11)
    console, place = Console(), place_of(arguments)
    torch.set_num_threads(1)
    sides = Sides(setting)
    apart = difference(sides)
    steps = {side: lambda side=side: sides.step(side) for side in (ROWS, TREE)}
    seconds = alternate(steps, repeats, console.print, clock=time.process_time)
    result = {
        "machine": machine(),
        "setting": asdict(setting),
        "tokens": sides.tokens,
        "seconds": seconds,
        "times_faster": ratios(seconds, ROWS, TREE),
        "difference": apart,
        "goal": GOAL,
    }
    path = place.result("recurrent_tree_cpu", result)
    place.section("docs/results.md", "recurrent_tree", text_of(result))
    console.print(text_of(result), markup=False)
    console.print(f"written: {path}")


def text_of(result: dict[str, Any]) -> str:
    """The section of docs/results.md."""
    tokens, on, faster, sizes = result["tokens"], result["machine"], result["times_faster"], result["setting"]
    rows = [[side, str(tokens[side]), f"{statistics.median(taken):.3f}"] for side, taken in result["seconds"].items()]
    times = f"{faster['median']:.2f} ({faster['min']:.2f} to {faster['max']:.2f})"
    rows.append(["rows over tree", f"{tokens[ROWS] / tokens[TREE]:.2f}", times])
    packages = ", ".join(f"{name} {on['packages'][name]}" for name in ("torch", "transformers"))
    apart = result["difference"]
    return (
        f"{markdown(['form', 'tokens', 'processor seconds (median)'], rows)}\n\nA prompt of {sizes['prompt']} tokens, two responses of "
        f"{sizes['response']}; goal at least {result['goal']}. The losses differ by {apart['loss']:.1e}, the gradients by "
        f"{apart['gradients']:.1e} of their norm. {on['cpu']}, {on['threads']} thread, {packages}; float32, random weights."
    )


if __name__ == "__main__":
    main()
