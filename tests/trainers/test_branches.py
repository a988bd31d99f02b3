"""Branches beyond chosen, rejected and corrupted: a loss that looks at one, and its declaration, are all that training needs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import ImageOps
from tiny_models import make_tiny_llava, make_tiny_qwen, sample_pictures
from torch.nn.functional import logsigmoid
from training_cases import config, preference_records, tiny, warm_adapter
from transformers import HfArgumentParser

from mmdpo_kernels import patch_model
from mmdpo_kernels.loss_terms import Term
from mmdpo_kernels.losses import LOSSES, LossParameters, difference
from mmdpo_trainers.checks.baseline import BLUR, branch_logp
from mmdpo_trainers.config.run_config import RunConfig
from mmdpo_trainers.data.corruption import Corruption
from mmdpo_trainers.data.pair_records import BRANCHES, Branch
from mmdpo_trainers.data.pairs import read_pairs
from mmdpo_trainers.errors import DataError, RunFolderError
from mmdpo_trainers.files.json_lines import read_jsonl
from mmdpo_trainers.models.families import family_of
from mmdpo_trainers.models.loaded import LoadedModel
from mmdpo_trainers.models.loading import load_model
from mmdpo_trainers.run.pipeline import run_stage
from mmdpo_trainers.stages.context import StageContext
from mmdpo_trainers.stages.folder import RunFolder
from mmdpo_trainers.training import head
from mmdpo_trainers.training.batches.collator import PreferenceCollator
from mmdpo_trainers.training.config import PreferenceConfig
from mmdpo_trainers.training.trainer import PreferenceTrainer

FURTHER = {
    "crossed": ["corrupted", "rejected"],
    "mirrored": ["mirrored_images", "chosen"],
    "third": ["mirrored_images", "third"],
}
TABLE = {**BRANCHES, **{name: Branch(*pair) for name, pair in FURTHER.items()}}


def crossed(x: LossParameters) -> tuple[Term, ...]:
    """-log sigmoid(beta (the chosen ratio - that of the rejected response under the corrupted image))."""
    return (Term("minus_log_sigmoid", difference("chosen", "crossed"), scale=x.beta),)


def mirrored(x: LossParameters) -> tuple[Term, ...]:
    """The same against the two branches that show a column of the data."""
    return tuple(Term("minus_log_sigmoid", difference("chosen", name), scale=x.beta) for name in ("mirrored", "third"))


def mirrored_alone(x: LossParameters) -> tuple[Term, ...]:
    """The same against the first of them."""
    return (Term("minus_log_sigmoid", difference("chosen", "mirrored"), scale=x.beta),)


@pytest.fixture(autouse=True)
def more_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    for loss in (crossed, mirrored, mirrored_alone):
        monkeypatch.setitem(LOSSES, loss.__name__, loss)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("llava")


def records(count: int = 6) -> list[dict[str, Any]]:
    """Of one image, several and none, with another list of images and a third response."""
    found = preference_records(count, [picture.resize((48, 48)) for picture in sample_pictures(6)])
    for record in found:
        record.update(region=None, patch_grid=None, mirrored_images=[ImageOps.mirror(image) for image in record["images"]])
        record["third"] = [{"role": "assistant", "content": "two stars"}]
    return found


def collator(loaded: LoadedModel, **options: Any) -> PreferenceCollator:
    defaults = {"branches": TABLE, "corruption": BLUR, "family": family_of(loaded.model), "pad_id": loaded.pad_id}
    end = loaded.processor.tokenizer.eos_token_id
    return PreferenceCollator(loaded.processor, image_token_id=loaded.image_token_id, end_id=end, **{**defaults, **options})


@pytest.mark.parametrize("make", [make_tiny_llava, make_tiny_qwen])
def test_trees_and_padded_rows_have_the_separate_sequences_log_probabilities(make: Any, tmp_path: Path) -> None:
    loaded = load_model(make(tmp_path / "model"), dtype=torch.float64, device="cpu")
    expected = torch.stack([torch.stack([branch_logp(loaded, each, branch) for branch in TABLE.values()]) for each in records()])
    patch_model(loaded.model)
    for packing in (True, False):
        batch = collator(loaded, tree_packing=packing).batch(records())
        assert batch.branches == tuple(TABLE)
        # Norms of transformers round to float32.
        assert torch.allclose(head.batch_logps(loaded.model, batch), expected, rtol=1e-5)
    # The views show what they say: every branch of a record with images has a number of its own.
    assert all(len(set(row.tolist())) == len(TABLE) for row, each in zip(expected, records(), strict=True) if each["images"])


@pytest.mark.parametrize("kind", ["crop", "mask"])
def test_lengths_count_every_branch(folder: Path, kind: str) -> None:
    loaded, corruption = tiny(folder), Corruption(kind=kind, strength=1.0 if kind == "mask" else None)  # type: ignore[arg-type]
    tree, rows = (collator(loaded, corruption=corruption, tree_packing=packing) for packing in (True, False))
    for record in records():
        assert tree.tree_tokens(record) == tree.batch([record]).input_ids.shape[1]
        assert tree.length(record) == rows.batch([record]).input_ids.shape[1]


def test_keys_follow_every_branch(folder: Path) -> None:
    loaded, [first, *_] = tiny(folder), records(1)
    key = collator(loaded).key(first)
    four = {name: TABLE[name] for name in (*BRANCHES, "crossed")}
    others = [
        collator(loaded).key({**first, "mirrored_images": first["images"]}),
        collator(loaded).key({**first, "third": "one star"}),
        collator(loaded, branches=four).key(first),
        collator(loaded, branches={**four, "crossed": Branch("corrupted", "chosen")}).key(first),
        collator(loaded, branches=BRANCHES).key(first),
    ]
    assert len({key, *others}) == 1 + len(others)
    assert collator(loaded, branches=tuple(BRANCHES)).key({**first, "third": "one star"}) == others[-1]


def trained(folder: Path, output: Path, data: list[Any], **options: Any) -> tuple[PreferenceTrainer, list[dict[str, Any]]]:
    loaded = tiny(folder)
    settings = {"loss_type": ["sigmoid", "crossed", "mirrored"], "further_branches": FURTHER, "max_steps": 2, **options}
    trainer = PreferenceTrainer(loaded.model, config(output, **settings), processing_class=loaded.processor, train_dataset=data)
    warm_adapter(trainer)
    trainer.train()
    return trainer, [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    "options",
    [{}, {"tree_packing": False}, {"changed_token_weight": 3.0}, {"corruption_draw": "separate"}, {"max_tokens_per_batch": 900}],
)
def test_a_cached_reference_changes_nothing(folder: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    (_, log), (_, cached) = (
        trained(folder, tmp_path / str(cached), records(), precompute_ref_log_probs=cached, **options) for cached in (False, True)
    )
    assert len(log) == len(cached) == 2
    for one, other in zip(log, cached, strict=True):
        assert one == pytest.approx(other, rel=1e-6, abs=1e-9)
    assert len((tmp_path / "True" / "reference.jsonl").read_text().splitlines()) == 7


def test_the_log_has_the_loss_and_every_branch(folder: Path, tmp_path: Path) -> None:
    trainer, [entry, _] = trained(folder, tmp_path, records(4), learning_rate=0.0)
    batch = trainer.data_collator.batch(records(4))
    policy = head.batch_logps(trainer.model, batch)
    with trainer.reference.active():
        reference = head.batch_logps(trainer.reference.model, batch)
    rewards = dict(zip(batch.branches, (0.1 * (policy - reference)).unbind(1), strict=True))
    # The corrupted branch itself no loss looks at.
    assert list(rewards) == ["chosen", "rejected", *FURTHER]
    margins = {name: rewards["chosen"] - value for name, value in rewards.items() if name != "chosen"}
    assert entry["loss"] == pytest.approx(float(-sum(logsigmoid(margin) for margin in margins.values()).mean()), rel=1e-6)
    for name in FURTHER:
        assert entry[f"rewards/{name}"] == pytest.approx(float(rewards[name].mean()), rel=1e-6)
        assert entry[f"rewards/{name}_margins"] == pytest.approx(float(margins[name].mean()), rel=1e-6)
        assert entry[f"rewards/{name}_accuracies"] == pytest.approx(float((margins[name] > 0).double().mean()))
        assert entry[f"logps/{name}"] == pytest.approx(float(policy[:, batch.branches.index(name)].mean()), rel=1e-6)
    assert abs(entry["loss"] - 4 * math.log(2)) > 1e-3


def test_a_column_without_an_image_for_each_is_named(folder: Path) -> None:
    [record] = records(1)
    with pytest.raises(DataError, match=r"record record-0: mirrored_images must hold one image for each of images \(2\).* got 1"):
        collator(tiny(folder)).batch([{**record, "mirrored_images": record["images"][:1]}])
    del record["third"]
    with pytest.raises(DataError, match="record record-0: third must be text or a list of one assistant message, got None"):
        collator(tiny(folder)).batch([record])


def test_paths_of_further_columns_are_relative_to_the_data(tmp_path: Path) -> None:
    for name in ("one", "two"):
        sample_pictures(1)[0].save(tmp_path / f"{name}.png")
    line = '{"prompt": "<image>what ?", "chosen": "a", "rejected": "b", "images": ["one.png"], "mirrored_images": ["two.png"]}'
    (tmp_path / "pairs.jsonl").write_text(line)
    [record] = read_pairs(tmp_path / "pairs.jsonl", views=["mirrored_images"])
    assert record["mirrored_images"] == [str(tmp_path / "two.png")]


def test_a_run_carries_further_columns(tmp_path: Path, folder: Path) -> None:
    """From the user's data to the loss, whose paths are relative to it; a column that an arm asks for later is noticed."""
    tiny(folder)
    lines = []
    for index in range(4):
        for name in ("one", "two"):
            ImageOps.invert(sample_pictures(1)[0]).rotate(index + (name == "two")).save(tmp_path / f"{name}{index}.png")
        record = {"prompt": "<image>what ?", "chosen": "a", "rejected": "b", "images": [f"one{index}.png"]}
        lines.append(json.dumps({**record, "mirrored_images": [f"two{index}.png"]}) + "\n")
    (tmp_path / "mine.jsonl").write_text("".join(lines))
    args = {"loss_type": ["sigmoid", "mirrored_alone"], "max_steps": 1, "logging_steps": 1, "lora_r": 4, "report_to": "none"}
    args["further_branches"] = {"mirrored": FURTHER["mirrored"]}
    values = {
        "method": "mdpo",
        "model": str(folder),
        "device": "cpu",
        "pairs": {"source": str(tmp_path / "mine.jsonl"), "held_out": 0.5},
        "train": {"args": args},
    }
    run = RunFolder(tmp_path / "run")
    for stage in ("pairs", "train"):
        run_stage(StageContext(run=run, config=RunConfig.from_dict(values), stage=stage))
    [record] = list(read_jsonl(run.path / "pairs" / "pairs.jsonl"))[:1]
    assert (run.path / "pairs" / record["mirrored_images"][0]).resolve().parent == tmp_path.resolve()
    log = list(read_jsonl(run.path / "train" / "log.jsonl"))
    assert "logps/mirrored" in log[0] and log[0]["logps/mirrored"] != log[0]["logps/chosen"]
    args["further_branches"]["third"] = ["other_images", "chosen"]
    with pytest.raises(RunFolderError, match="further_views: was .*mirrored_images"):
        run_stage(StageContext(run=run, config=RunConfig.from_dict(values), stage="pairs"))


def test_what_declares_no_branch_is_left_to_the_trainers_settings(tmp_path: Path) -> None:
    for wrong in (["crossed"], {"crossed": "corrupted"}, {"crossed": ["corrupted"]}):
        config = RunConfig.from_dict({"train": {"args": {"further_branches": wrong}}})
        assert StageContext(run=RunFolder(tmp_path), config=config, stage="pairs").further_views == ()


def test_declarations_that_do_not_fit_are_refused(tmp_path: Path, folder: Path) -> None:
    for wrong, message in {
        "chosen": "expected names of letters and digits other than chosen",
        "a-b": "expected names of letters and digits",
        "x_margins": "expected names .* without accuracies or margins at the end",
    }.items():
        with pytest.raises(ValueError, match=f"further_branches: {message}"):
            config(tmp_path, further_branches={wrong: ["images", "chosen"]})
    with pytest.raises(ValueError, match="expected crossed: .view, response., such as .corrupted, rejected., got 'corrupted'"):
        config(tmp_path, further_branches={"crossed": "corrupted"})
    with pytest.raises(
        ValueError, match="'crossed' looks at the branches crossed; training records have chosen, rejected, corrupted; add"
    ):
        config(tmp_path, loss_type=["crossed"])
    with pytest.raises(ValueError, match="no_image: without pictures there is none to corrupt"):
        config(tmp_path, loss_type=["crossed"], further_branches=FURTHER, no_image=True)
    with pytest.raises(ValueError, match="branches: expected chosen, rejected first"):
        collator(tiny(folder), branches={"crossed": Branch("corrupted", "rejected"), **BRANCHES})


def test_a_settings_file_declares_branches(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(f"output_dir: {tmp_path}\nloss_type: crossed\nfurther_branches: {{crossed: [corrupted, rejected]}}\n")
    [args] = HfArgumentParser(PreferenceConfig).parse_yaml_file(str(file))  # type: ignore[arg-type]
    assert args.branches == {"chosen": TABLE["chosen"], "rejected": TABLE["rejected"], "crossed": TABLE["crossed"]}


SYMMETRIC = {
    "exchanged": ["images", "third"],
    "similar_chosen": ["mirrored_images", "third"],
    "similar_rejected": ["mirrored_images", "chosen"],
}


@pytest.mark.parametrize("packing", [True, False])
def test_losses_of_further_branches_are_those_of_separate_sequences(folder: Path, tmp_path: Path, packing: bool) -> None:
    """SymMPO's five branches, and a second rejected response, whose loss is weighted."""
    names = ["ipo", "symmetric", "similar_anchor", "symmetric_margin"]
    options = {
        "loss_type": names,
        "loss_weights": [1.0, 0.5, 1.0, 1e-2],
        "extra_negative": "exchanged",
        "extra_negative_weight": 0.3,
    }
    data = records(4)
    trainer, [entry, _] = trained(
        folder, tmp_path, data, learning_rate=0.0, further_branches=SYMMETRIC, tree_packing=packing, **options
    )
    assert list(trainer.args.branches) == ["chosen", "rejected", *SYMMETRIC]
    batch = collator(tiny(folder), branches=trainer.args.branches, corruption=None, tree_packing=False).batch(data)
    policy = head.batch_logps(trainer.model, batch)
    with trainer.reference.active():
        reference = head.batch_logps(trainer.reference.model, batch)
    ratio = dict(zip(batch.branches, (policy - reference).unbind(1), strict=True))
    length = dict(zip(batch.branches, batch.lengths.unbind(1), strict=True))
    w = ratio["chosen"] / length["chosen"]
    here, there = ratio["chosen"] - ratio["exchanged"], ratio["similar_chosen"] - ratio["similar_rejected"]
    expected = sum(share * (w - ratio[name] / length[name] - 5) ** 2 for name, share in (("rejected", 0.7), ("exchanged", 0.3)))
    expected = expected - 0.5 * (logsigmoid(0.1 * here) + logsigmoid(0.1 * there))
    expected = expected - logsigmoid(0.1 * ratio["similar_chosen"]) + 1e-2 * (here - there) ** 2
    assert entry["loss"] == pytest.approx(float(expected.mean()), rel=1e-6)


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"loss_type": ["symmetric"]},
            r"'symmetric' looks at the branches exchanged, similar_chosen, similar_rejected; training records have chosen, rejected, "
            r"corrupted; add the columns with further_branches: \{exchanged: \[images, similar_chosen\], "
            r"similar_chosen: \[similar_images, similar_chosen\]",
        ),
        (
            {"extra_negative": "hallucinated"},
            r"looks at the branches hallucinated; .* \{hallucinated: \[images, hallucinated\]\}",
        ),
        ({"extra_negative": "hallucinated", "loss_type": ["nll"]}, "extra_negative: it acts on hinge, ipo, sigmoid only"),
        ({"extra_negative": "rejected"}, "extra_negative: expected a branch other than chosen and rejected"),
        ({"extra_negative_weight": 2.0}, "extra_negative_weight: expected a share"),
        ({"similar_beta": 0.0}, "similar_beta: expected a value above 0"),
    ],
)
def test_what_a_loss_lacks_is_said_with_its_declaration(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)
