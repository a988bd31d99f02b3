"""`mmdpo env` where things are missing: it says what, and how to get it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from mmdpo_trainers.cli import env

PROGRAM = """
import importlib.abc, importlib.metadata, sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

version = importlib.metadata.version
def without(name):
    if name in {blocked!r}:
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)

sys.meta_path.insert(0, Blocked())
sys.modules["mmdpo_kernels._native"] = None
importlib.metadata.version = without
from mmdpo_trainers.cli.env import print_environment
print_environment()

if "torch" not in {blocked!r}:
    import torch, mmdpo_kernels
    query = torch.randn(1, 2, 4, 8, requires_grad=True)
    mmdpo_kernels.tree_attention(query, query, query, torch.tensor([[4, 4, 3, 4]])).output.sum().backward()
    hidden = torch.randn(3, 8, requires_grad=True)
    logps = mmdpo_kernels.linear_logprobs(hidden, torch.randn(5, 8), torch.tensor([0, 1, 2])).logps
    mass = mmdpo_kernels.attention_mass(
        query, query, torch.zeros(1, 4).int(), row_positions=torch.arange(4)[None], num_segments=1
    )
    pair = mmdpo_kernels.SequenceLogps(chosen=logps[:1], rejected=logps[1:2])
    (mmdpo_kernels.preference_loss(pair, pair).loss + mass.sum()).backward()
    assert "triton" not in sys.modules and hidden.grad is not None
"""
TRAIN = ("accelerate", "datasets", "peft", "PIL", "pillow", "pydantic", "pyyaml", "rich", "transformers", "yaml")


def printed_without(*blocked: str) -> str:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(blocked=blocked)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_extras_triton_extension_and_gpu() -> None:
    """All of it is said in lines that name a command, and every op runs and is differentiated."""
    text = printed_without(*TRAIN, "triton")
    lines = [" ".join(line.split()) for line in text.splitlines()]
    for name in ("transformers", "peft", "accelerate", "datasets", "pillow", "pyyaml"):
        assert f"{name} not installed: pip install 'mmdpo-kernels[train]'" in lines
    assert "triton not installed: pip install triton" in lines
    for op in ("tree_attention", "attention_mass", "linear_logprobs", "preference_loss"):
        assert f"{op} triton no: it needs triton, which is not installed: pip install triton" in lines
        assert f"{op} reference yes" in lines
        (native,) = (line for line in lines if line.startswith(f"{op} native no: mmdpo_kernels._native cannot be imported"))
        assert native.endswith(
            "wheels of mmdpo-kernels have it, and in a checkout `pip install .` builds it with a C++17 compiler"
        )
    assert any(line.startswith("cuda none: ") for line in lines) and "make install" not in text


def test_without_torch_it_says_so() -> None:
    text = printed_without("torch", "triton", "rich")
    assert "torch          not installed: pip install torch\n" in text and "kernel backends" not in text


def test_drawn_and_plain_say_the_same(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands in brackets, an extra for one, is no markup to rich."""
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr(env, "_version", lambda name: None)
    env.print_environment()
    drawn = capsys.readouterr().out
    assert "not installed: pip install 'mmdpo-kernels[train]'" in drawn
    monkeypatch.setattr(env, "_is_there", lambda module: module != "rich")
    env.print_environment()
    words = {word for word in capsys.readouterr().out.split() if word.isidentifier()}
    assert words <= set(drawn.split())
