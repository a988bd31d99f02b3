"""Every block of code in README.md, CONTRIBUTING.md, SECURITY.md and docs/ is run, or read by what it is for; what cannot be is counted."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest
from docs_code import command, desk, records, shell
from docs_code.blocks import KINDS, PAGES, ROOT, Block, blocks_in, every_block

from mmdpo_kernels.losses import LOSSES
from mmdpo_trainers.config.run_config import RunConfig
from mmdpo_trainers.config.values import parse_yaml

BLOCKS = every_block()
NOT_RUN = {"docs/clusters.md": 3, "docs/exporting.md": 1, "docs/generation.md": 1, "docs/hub.md": 1}
"""Page -> blocks with the mark *Not run here: …*: they need programs or packages that are not here."""
NOT_INSTALLED = ("kernels", "vllm")
"""Packages that blocks of Python may import where they are marked."""


def of_kind(kind: str) -> list[Block]:
    return [block for block in BLOCKS if block.kind == kind]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return desk.lay_out(tmp_path_factory.mktemp("desk"))


def test_every_block_has_somebody_who_reads_it() -> None:
    strange = [str(block) for block in BLOCKS if block.kind not in KINDS or (block.kind != "json" and block.reader)]
    strange += [str(block) for block in of_kind("json") if block.reader not in records.READERS]
    assert not strange, f"no {', '.join(KINDS)} (json with one of {', '.join(records.READERS)}): {strange}"
    fences = sum(line.lstrip().startswith("```") for page in PAGES if page.exists() for line in page.read_text().splitlines())
    assert fences == 2 * len(BLOCKS), "a fence that is not read as the beginning or the end of a block"


def test_what_is_not_run_is_marked_and_counted() -> None:
    needed = {block for block in of_kind("sh") if shell.programs_in(block) & shell.CANNOT_BE_ASKED} | set(of_kind("dockerfile"))
    needed |= {block for block in of_kind("python") if desk.imports(block) & set(NOT_INSTALLED)}
    marked = {block for block in BLOCKS if block.marked}
    assert marked == needed, f"mark them, or take the mark off: {sorted(map(str, marked ^ needed))}"
    assert Counter(block.page for block in marked) == NOT_RUN, sorted(map(str, marked))


@pytest.mark.parametrize("block", of_kind("text"), ids=str)
def test_texts_are_no_code(block: Block) -> None:
    """Drawings, layouts, and what a command prints."""
    first = {line.split()[0] for line in block.text.splitlines() if line.split()}
    assert not first & {"mmdpo", "pip", "make", "python", "docker", "torchrun", "import", "from", "git"}


@pytest.mark.parametrize("page", sorted({block.page for block in of_kind("python") if not block.marked}))
def test_python(page: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page's blocks, one after the other in one namespace."""
    monkeypatch.chdir(folder)
    # TRL trains in bfloat16 unless told otherwise, which transformers asks a GPU for.
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    for left in folder.glob("out*"):
        shutil.rmtree(left)
    blocks = [block for block in of_kind("python") if block.page == page and not block.marked]
    names = desk.namespace(blocks, desk.Given(folder))
    losses = dict(LOSSES)
    try:
        for block in blocks:
            desk.run(block, names)
    finally:  # a page may add one
        LOSSES.clear()
        LOSSES.update(losses)


@pytest.mark.parametrize("page", sorted({block.page for block in of_kind("sh")}))
def test_shell(page: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(folder)
    command.without_work(monkeypatch)
    for block in (block for block in of_kind("sh") if block.page == page):
        for words in shell.commands_in(block):
            try:
                shell.read(words, lambda arguments: command.call(arguments, capsys))
            except (AssertionError, SystemExit) as error:
                raise AssertionError(f"{block}: {error}") from error


@pytest.mark.parametrize("block", of_kind("yaml"), ids=str)
def test_settings(block: Block) -> None:
    command.check_settings(RunConfig.from_dict(parse_yaml(block.text), where=str(block)))


@pytest.mark.parametrize("block", of_kind("json"), ids=str)
def test_records(block: Block, tmp_path: Path) -> None:
    records.check(block.reader, block.text, tmp_path)


def test_what_is_wrong_is_seen(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(folder)
    command.without_work(monkeypatch)
    page = "*Not run here: it needs Docker.*\n\n```sh\ndocker build . # x\nmmdpo run my.yaml \\\n  --set model=a\n```\n"
    (block,) = blocks_in(ROOT / "README.md", page)
    assert block.marked and block.line == 4 and shell.programs_in(block) == {"docker", "mmdpo"}
    assert shell.commands_in(block)[1] == ["mmdpo", "run", "my.yaml", "--set", "model=a"]
    for line in (
        "mmdpo run my.yaml --set score.layr=3",
        "mmdpo run my.yaml --set train.args.learning_rat=1",
        "mmdpo run none.yaml",
        "mmdpo trian --run runs/mine",
        "make nothing",
        "pip install '.[nothing]'",
        "pytest tests/none.py",
        "python -m benchmarks --cas pair",
        "python -m benchmarks.none",
        "torchrun --processes 2 -m mmdpo_trainers run my.yaml",
        "accelerate launch --config_file configs/none.yaml -m mmdpo_trainers train --run runs/mine",
        "frobnicate",
    ):
        (wrong,) = blocks_in(ROOT / "README.md", f"```sh\n{line}\n```\n")
        with pytest.raises((AssertionError, SystemExit)):
            shell.read(shell.commands_in(wrong)[0], lambda arguments: command.call(arguments, capsys))
    (wrong,) = blocks_in(ROOT / "README.md", "```python\nx = 2\nx * 3  # -> 7\n```\n")
    with pytest.raises(AssertionError, match="the page says 7"):
        desk.run(wrong, {})
    with pytest.raises(NameError, match="nobody sets nothing"):
        desk.namespace(blocks_in(ROOT / "README.md", "```python\nnothing\n```\n"), desk.Given(folder))
