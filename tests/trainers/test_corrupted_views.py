"""Several corrupted views, drawn or brought along by records: log-probabilities, keys, losses and runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import ImageOps
from tiny_models import make_tiny_llava, make_tiny_qwen, sample_pictures
from torch.nn.functional import logsigmoid
from training_cases import config, preference_records, tiny, warm_adapter

from mmdpo_kernels import patch_model
from mmdpo_trainers.checks.baseline import branch_logp
from mmdpo_trainers.config.run_config import RunConfig
from mmdpo_trainers.data.corruption import Corruption
from mmdpo_trainers.data.pair_records import BRANCHES, Branch
from mmdpo_trainers.data.pairs import read_pairs
from mmdpo_trainers.errors import DataError
from mmdpo_trainers.files.json_lines import read_jsonl
from mmdpo_trainers.models.families import family_of
from mmdpo_trainers.models.loaded import LoadedModel
from mmdpo_trainers.models.loading import load_model
from mmdpo_trainers.run.pipeline import run_stage
from mmdpo_trainers.stages.context import StageContext
from mmdpo_trainers.stages.folder import RunFolder
from mmdpo_trainers.training import head
from mmdpo_trainers.training.batches.collator import PreferenceCollator
from mmdpo_trainers.training.trainer import PreferenceTrainer

TABLE = {**BRANCHES, "corrupted_2": Branch("corrupted_2", "chosen"), "corrupted_3": Branch("corrupted_3", "chosen")}
DRAWN = [Corruption(kind="blur", strength=0.5), Corruption(kind="blank"), Corruption(kind="mask", strength=0.5)]
SIZE = (48, 48)


def records(count: int = 6) -> list[dict[str, Any]]:
    """Of one picture, several and none; each of their own two lists of other pictures."""
    found = preference_records(count, [picture.resize(SIZE) for picture in sample_pictures(6)])
    for record in found:
        record.update(region=None, patch_grid=None)
    return found


def with_own(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    own = {"rejected_images": ImageOps.mirror, "rejected_images_2": ImageOps.invert, "rejected_images_3": ImageOps.flip}
    return [
        {**record, **{column: [change(image.convert("RGB")) for image in record["images"]] for column, change in own.items()}}
        for record in cases
    ]


def collator(loaded: LoadedModel, **options: Any) -> PreferenceCollator:
    defaults = {"branches": TABLE, "family": family_of(loaded.model), "pad_id": loaded.pad_id}
    end = loaded.processor.tokenizer.eos_token_id
    return PreferenceCollator(loaded.processor, image_token_id=loaded.image_token_id, end_id=end, **{**defaults, **options})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("llava")


@pytest.mark.parametrize("make", [make_tiny_llava, make_tiny_qwen])
def test_given_views_have_the_separate_sequences_log_probabilities(make: Any, tmp_path: Path) -> None:
    """Every record's own pictures, as columns that the unpatched model sees one sequence at a time."""
    loaded = load_model(make(tmp_path / "model"), dtype=torch.float64, device="cpu")
    cases = with_own(records())
    columns = [("images", "chosen"), ("images", "rejected"), *((f"rejected_images{n}", "chosen") for n in ("", "_2", "_3"))]
    expected = torch.stack([torch.stack([branch_logp(loaded, each, Branch(*pair)) for pair in columns]) for each in cases])
    patch_model(loaded.model)
    for packing in (True, False):
        batch = collator(loaded, corruption=[None, None, None], tree_packing=packing).batch(cases)
        assert batch.branches == tuple(TABLE)
        # Norms of transformers round to float32.
        assert torch.allclose(head.batch_logps(loaded.model, batch), expected, rtol=1e-5)
    assert all(len(set(row.tolist())) == 5 for row, each in zip(expected, cases, strict=True) if each["images"])


def test_drawn_views_are_those_of_one_view_at_a_time(folder: Path) -> None:
    loaded = tiny(folder)
    patch_model(loaded.model)
    several = {packing: collator(loaded, corruption=DRAWN, tree_packing=packing) for packing in (True, False)}
    found = {packing: head.batch_logps(loaded.model, each.batch(records())) for packing, each in several.items()}
    assert torch.allclose(found[True], found[False], rtol=1e-9)
    for number, corruption in enumerate(DRAWN[:2]):
        # What draws nothing is the same as the only view.
        alone = collator(loaded, corruption=corruption, branches=BRANCHES)
        assert torch.allclose(head.batch_logps(loaded.model, alone.batch(records()))[:, 2], found[True][:, 2 + number], rtol=1e-9)
    own = collator(loaded, corruption=DRAWN).batch(with_own(records()))
    given = collator(loaded, corruption=[None] * 3).batch(with_own(records()))
    assert torch.equal(head.batch_logps(loaded.model, own), head.batch_logps(loaded.model, given))


def test_two_views_of_one_kind_are_two_draws(folder: Path) -> None:
    loaded = tiny(folder)
    patch_model(loaded.model)
    crops = collator(loaded, corruption=[Corruption(), Corruption()], branches={name: TABLE[name] for name in list(TABLE)[:4]})
    single = collator(loaded, corruption=Corruption(), branches=BRANCHES)
    found, first = (head.batch_logps(loaded.model, each.batch(records(5))) for each in (crops, single))
    # The first one's draw is the one of a single view. Two crops of a picture may both be of one colour.
    assert torch.allclose(found[:, 2], first[:, 2], rtol=1e-9) and torch.isclose(found[:, 2], found[:, 3]).sum() <= 1


@pytest.mark.parametrize("cases", [records(), with_own(records())], ids=["drawn", "given"])
def test_lengths_count_every_view(folder: Path, cases: list[dict[str, Any]]) -> None:
    loaded = tiny(folder)
    # Masked tokens behind the first of a picture would be shared.
    corruption = [*DRAWN[:2], Corruption(kind="mask", strength=1.0)]
    tree, rows = (collator(loaded, corruption=corruption, tree_packing=packing) for packing in (True, False))
    for record in cases:
        assert tree.tree_tokens(record) == tree.batch([record]).input_ids.shape[1]
        assert tree.length(record) == rows.batch([record]).input_ids.shape[1]


def test_keys_follow_every_view(folder: Path) -> None:
    loaded, [first] = tiny(folder), with_own(records(1))
    plain = records(1)[0]
    two = {name: TABLE[name] for name in list(TABLE)[:4]}
    keys = [
        collator(loaded, corruption=DRAWN).key(plain),
        collator(loaded, corruption=[*DRAWN[:2], Corruption(kind="mask", strength=0.6)]).key(plain),
        collator(loaded, corruption=DRAWN[:2], branches=two).key(plain),
        collator(loaded, corruption=DRAWN[1::-1], branches=two).key(plain),
        collator(loaded, corruption=DRAWN[0], branches=BRANCHES).key(plain),
        collator(loaded, corruption=DRAWN).key(first),
        collator(loaded, corruption=DRAWN).key({**first, "rejected_images_2": first["images"]}),
        collator(loaded, corruption=DRAWN).key({**first, "rejected_images_3": None}),
    ]
    assert len(set(keys)) == len(keys)
    # One view in a list is one view.
    assert collator(loaded, corruption=DRAWN[:1], branches=BRANCHES).key(plain) == keys[4]


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_copo_is_the_mean_over_the_views(folder: Path, tmp_path: Path, cached: bool, given: bool) -> None:
    loaded = tiny(folder)
    views: list[Any] = ["given", "given"] if given else ["crop", {"kind": "blur", "strength": 0.4}]
    options = {"loss_type": ["copo", "ancpo"], "anchors": ["chosen", "corrupted"], "corruptions": views}
    data = with_own(records(4)) if given else records(4)
    args = config(tmp_path, learning_rate=0.0, precompute_ref_log_probs=cached, **options)
    assert list(args.branches) == ["chosen", "rejected", "corrupted", "corrupted_2"]
    trainer = PreferenceTrainer(loaded.model, args, processing_class=loaded.processor, train_dataset=data)
    warm_adapter(trainer)
    trainer.train()
    [entry] = [entry for entry in trainer.state.log_history if "loss" in entry]
    batch = collator(
        tiny(folder), branches=args.branches, corruption=[None] * 2 if given else args.image_corruptions, tree_packing=False
    ).batch(data)
    policy = head.batch_logps(trainer.model, batch)
    with trainer.reference.active():
        reference = head.batch_logps(trainer.reference.model, batch)
    w, _, *others = (0.1 * (policy - reference)).unbind(1)
    expected = -logsigmoid(w) + sum(-logsigmoid(w - c) - logsigmoid(-c) for c in others) / 2
    assert entry["loss"] == pytest.approx(float(expected.mean()), rel=1e-6)
    assert entry["rewards/corrupted_2"] == pytest.approx(float(others[1].mean()), rel=1e-6, abs=1e-9)


def test_given_asks_every_record_for_its_own(folder: Path, tmp_path: Path) -> None:
    for options, column in (
        ({"corruption": "given"}, "rejected_images"),
        ({"corruptions": ["crop", "given"]}, "rejected_images_2"),
    ):
        data = [{**record, column: None} for record in with_own(records(2))]
        args, loaded = config(tmp_path, loss_type=["sigmoid", "copo"], **options), tiny(folder)
        trainer = PreferenceTrainer(loaded.model, args, processing_class=loaded.processor, train_dataset=data)
        with pytest.raises(DataError, match=f"record record-[01]: expected {column}, as no corruption is set"):
            trainer.train()


def test_a_column_of_one_picture_each(tmp_path: Path) -> None:
    """A run carries them, in lists."""
    for index, picture in enumerate(sample_pictures(4)):
        picture.resize(SIZE).save(tmp_path / f"{index}.png")
    line = {"prompt": "<image>\nwhat ?", "chosen": "red", "rejected": "blue"}
    own = {"rejected_images": "1.png", "rejected_images_2": "2.png", "retrieved": "3.png"}
    lines = [{**line, "id": str(number), "images": ["0.png"], **own} for number in range(2)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    [first, _] = read_pairs(tmp_path / "data.jsonl", views=["rejected_images_2", "retrieved"])
    assert [first[name] for name in own] == [[str(tmp_path / f"{number}.png")] for number in (1, 2, 3)]

    args = {"corruptions": ["given", "given"], "further_branches": {"found": ["retrieved", "chosen"]}}
    values = {"method": "mdpo", "pairs": {"source": str(tmp_path / "data.jsonl"), "held_out": 0.0}, "train": {"args": args}}
    config = RunConfig.from_dict(values)
    run = RunFolder(tmp_path / "run")
    context = StageContext(run=run, config=config, stage="pairs")
    assert context.further_views == ("retrieved", "rejected_images_2")
    run_stage(context)
    [stored, _] = read_jsonl(run.path / "pairs" / "pairs.jsonl")
    assert [Path(stored[name][0]).name for name in own] == ["1.png", "2.png", "3.png"]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"corruptions": "crop"}, r"corruptions: expected a list of one or more, such as \[crop, "),
        ({"corruptions": []}, "corruptions: expected a list of one or more"),
        ({"corruptions": ["noise"], "corruption_strength": 3.0}, "and no corruption_strength beside it"),
        ({"corruptions": ["crop", "smudge"]}, "corruption kind: expected one of .* got 'smudge'"),
        ({"corruptions": [{"strength": 3.0}]}, "expected a kind, or kind with keep or strength, got"),
        ({"corruptions": [{"kind": "crop", "strength": 3.0}]}, "kind 'crop' has none"),
        (
            {"further_branches": {"corrupted_2": ["images", "third"]}},
            "further_branches: expected names of letters and digits other",
        ),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(tmp_path, loss_type=["copo"], **options)
