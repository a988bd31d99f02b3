"""`PreferenceCollator`: what a batch holds, what is shared, corrupted and counted, and what its keys depend on."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageFile, ImageOps
from processes import context
from tiny_models import make_tiny_llava, make_tiny_qwen, sample_pictures
from torch.utils.data import DataLoader

from mmdpo_trainers.data.corruption import Corruption
from mmdpo_trainers.errors import DataError
from mmdpo_trainers.models.chat_format import render_prompt
from mmdpo_trainers.models.families import family_of
from mmdpo_trainers.models.loaded import LoadedModel
from mmdpo_trainers.models.loading import load_model
from mmdpo_trainers.training.batches import views
from mmdpo_trainers.training.batches.collator import PreferenceBatch, PreferenceCollator
from mmdpo_trainers.training.batches.examples import changed_token_weights

TRIPLE = ("chosen", "rejected", "corrupted")
SIZES = [(48, 48), (72, 36), (36, 60)]
Make = Callable[..., PreferenceCollator]


@pytest.fixture(scope="module", params=["llava", "qwen2_5_vl"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    make = {"llava": make_tiny_llava, "qwen2_5_vl": make_tiny_qwen}[request.param]
    return load_model(make(tmp_path_factory.mktemp("model") / "model"), device="cpu")


@pytest.fixture
def make(loaded: LoadedModel) -> Make:
    def made(**options: Any) -> PreferenceCollator:
        if "corrupted" in options.get("branches", TRIPLE):
            options = {"branches": TRIPLE, "corruption": Corruption(keep=(0.3, 0.5)), **options}
        return PreferenceCollator(
            loaded.processor,
            family=family_of(loaded.model),
            image_token_id=loaded.image_token_id,
            end_id=loaded.processor.tokenizer.eos_token_id,
            **options,
        )

    return made


def pictures() -> list[Image.Image]:
    return [picture.resize(size) for picture, size in zip(sample_pictures(3), SIZES, strict=True)]


def record(**changes: Any) -> dict[str, Any]:
    return {
        "id": "one",
        "images": pictures(),
        "target": 1,
        "prompt": "Image 1 : <image>\nImage 2 : <image>\nImage 3 : <image>\nwhat colour is the star ?",
        "chosen": "red and blue",
        "rejected": "red circle",
        **changes,
    }


def separate(make: Make, records: list[dict[str, Any]], **options: Any) -> PreferenceBatch:
    return make(tree_packing=False, **options)(records)["batch"]


def shown(batch: PreferenceBatch, width: int) -> list[list[int]]:
    """Feature rows of each separate sequence's image tokens; `width`: image tokens of one."""
    return batch.feature_rows.view(-1, width).tolist()


def test_prompts_are_the_processors(loaded: LoadedModel, make: Make) -> None:
    text = render_prompt(loaded.processor, record()["prompt"])
    expected = loaded.processor(text=[text], images=pictures(), return_tensors="pt")
    batch = separate(make, [record()], branches=("chosen", "rejected"))
    prompt = expected["input_ids"].shape[1]
    assert torch.equal(batch.input_ids[:, :prompt], expected["input_ids"].expand(2, -1))
    assert batch.pictures is not None
    assert torch.equal(batch.pictures.pixel_values, expected["pixel_values"])
    tokens = loaded.processor.tokenizer("red circle", add_special_tokens=False).input_ids
    assert batch.targets[-batch.lengths[0, 1] :].tolist() == [*tokens, loaded.processor.tokenizer.eos_token_id]
    if batch.position_ids is not None:
        kinds = (batch.input_ids == loaded.image_token_id).int()
        kept = batch.attention_mask
        positions = loaded.model.model.get_rope_index(
            batch.input_ids, kinds, expected["image_grid_thw"].repeat(2, 1), attention_mask=kept
        )
        assert torch.equal(batch.position_ids, positions[0]) and len(batch.position_ids.unique(dim=0)) > 1


@pytest.mark.parametrize("target", [1, None])
def test_only_the_target_is_corrupted(make: Make, target: int | None) -> None:
    batch = separate(make, [record(target=target)])
    assert batch.pictures is not None and batch.branches == TRIPLE
    counts = batch.pictures.tokens
    chosen, rejected, corrupted = shown(batch, sum(counts[:3]))
    assert chosen == rejected == list(range(sum(counts[:3])))
    changed = [any(row not in chosen for row in piece.tolist()) for piece in torch.tensor(corrupted).split(counts[:3])]
    assert changed == [target is None or place == target for place in range(3)]
    assert len(counts) == 3 + sum(changed)
    assert batch.lengths[0, 0] == batch.lengths[0, 2]


def test_the_tree_shares_what_comes_before_the_target(make: Make, loaded: LoadedModel) -> None:
    batch, rows = make()([record()])["batch"], separate(make, [record()])
    before = int((rows.input_ids[0] == loaded.image_token_id).nonzero()[rows.pictures.tokens[0]])
    prompt = int(rows.attention_mask[0].sum()) - int(rows.lengths[0, 0])
    common = 1  # "red"
    expected = prompt + int(rows.lengths.sum()) - common + prompt - before
    assert batch.input_ids.shape == (1, expected)


def test_corruption_follows_from_content_and_seed(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same in any batch, tree or not; another with another seed, prompt or picture."""
    made: list[bytes] = []
    original = views.corrupt

    def watched(*args: Any, **options: Any) -> Image.Image:
        found = original(*args, **options)
        made.append(found.tobytes())
        return found

    monkeypatch.setattr(views, "corrupt", watched)
    other = record(id="other", prompt=record()["prompt"].replace("star", "circle"))
    make()([record(), other])
    make(tree_packing=False)([other, record(id="renamed")])
    assert made[:2] == made[:1:-1] and made[0] != made[1]
    make(corruption=Corruption(keep=(0.3, 0.5), seed=1))([record()])
    assert made[-1] != made[0]


def test_separate_draw_gives_the_reference_its_own(make: Make) -> None:
    assert set(make()([record()])) == {"batch"}
    both = make(corruption=Corruption(keep=(0.3, 0.5), draw="separate"))([record()])
    policy, reference = both["batch"].pictures, both["reference_batch"].pictures
    split = [encoded.pixel_values.split(_blocks(encoded)) for encoded in (policy, reference)]
    assert [torch.equal(*pair) for pair in zip(*split, strict=True)] == [True, True, True, False]
    assert both["batch"].keys == both["reference_batch"].keys != make()([record()])["batch"].keys
    assert torch.equal(policy.pixel_values, make()([record()])["batch"].pictures.pixel_values)


def _blocks(encoded: Any) -> list[int]:
    return [1] * len(encoded.tokens) if encoded.grids is None else encoded.grids.prod(1).tolist()


def test_own_corrupted_pictures(make: Make) -> None:
    """`rejected_images` stand for all pictures; one that is the picture itself is shared with it."""
    own = [pictures()[0], ImageOps.flip(pictures()[1]), pictures()[2].resize((48, 24))]
    batch = make(corruption=None)([record(rejected_images=own)])["batch"]
    assert batch.pictures is not None and len(batch.pictures.tokens) == 5
    with pytest.raises(DataError, match=r"one: rejected_images must hold one picture for each of images \(3\), got 1"):
        make()([record(rejected_images=own[:1])])
    with pytest.raises(DataError, match="record one: expected rejected_images, as no corruption is set"):
        make(corruption=None)([record()])


def test_another_picture_of_the_pool(make: Make) -> None:
    pool = [pictures()[1], sample_pictures(5)[4]]
    found = make(corruption=Corruption(kind="other"), picture_pool=pool)([record()])["batch"]
    wanted = make(corruption=None)([record(rejected_images=[pictures()[0], pool[1].resize(SIZES[1], 3), pictures()[2]])])["batch"]
    assert torch.equal(found.pictures.pixel_values, wanted.pictures.pixel_values)
    with pytest.raises(DataError, match="record one: picture_pool holds no picture other than the record's own"):
        make(corruption=Corruption(kind="other"), picture_pool=pool[:1])([record()])
    with pytest.raises(ValueError, match="picture_pool: corruption kind 'other' needs pictures"):
        make(corruption=Corruption(kind="other"))


def test_masked_tokens_are_unseen_and_keep_their_positions(make: Make) -> None:
    mask = Corruption(kind="mask", strength=0.5)
    rows, tree = separate(make, [record()], corruption=mask), make(corruption=mask)([record()])["batch"]
    assert rows.pictures is not None and len(rows.pictures.tokens) == 3
    hidden = (rows.attention_mask[0] == 1) & (rows.attention_mask[2] == 0)
    assert int(hidden.sum()) == (rows.pictures.tokens[1] + 1) // 2
    ends = tree.attention_mask[0, 0, 0]
    assert int((ends < 0).sum()) == int(hidden.sum())
    if rows.position_ids is not None:
        assert torch.equal(rows.position_ids[:, 0], rows.position_ids[:, 2])


def test_without_pictures(loaded: LoadedModel, make: Make) -> None:
    options = {"branches": ("chosen", "rejected"), "no_image": True}
    for prompt, left in {
        record()["prompt"]: "Image 1 : \nImage 2 : \nImage 3 : \nwhat colour is the star ?",
        "<image><image>\n<image>\nis it red ?": "is it red ?",
        "is it red ?\n<image><image><image>": "is it red ?",
    }.items():
        batch = separate(make, [record(prompt=prompt)], **options)
        expected = loaded.processor.tokenizer(render_prompt(loaded.processor, left)).input_ids
        assert batch.pictures is None and not len(batch.feature_rows)
        assert batch.input_ids[0, : len(expected)].tolist() == expected
        assert int(batch.attention_mask[0].sum()) == len(expected) + int(batch.lengths[0, 0])
    with pytest.raises(ValueError, match="no_image: without pictures there is nothing to corrupt"):
        make(no_image=True)


def test_a_record_without_pictures_has_its_chosen_sequence_there(make: Make) -> None:
    text = record(id="text", images=[], target=None, prompt="which one ?")
    batch = separate(make, [text])
    assert torch.equal(batch.input_ids[0], batch.input_ids[2])
    assert make()([text])["batch"].input_ids.shape[1] == make(branches=("chosen", "rejected"))([text])["batch"].input_ids.shape[1]


def test_questions_about_the_same_pictures_share_them(make: Make) -> None:
    questions = [
        record(id=str(index), prompt=f"{'<image>' * 3}{text} ?", target=2) for index, text in enumerate(["what", "is it red"])
    ]
    collator = make()
    apart = sum(collator(questions[index : index + 1])["batch"].input_ids.shape[1] for index in range(2))
    batch = collator(questions)["batch"]
    shared = collator.shared_tokens(questions)
    assert shared > sum(batch.pictures.tokens[:3])
    # The true prompt's beginning, and again up to the target in the corrupted branches, which share that with the true one already.
    assert batch.input_ids.shape[1] == apart - shared
    assert collator.image_key(questions[0]) == collator.image_key(questions[1])
    assert collator.image_key(questions[0]) != collator.image_key(record(images=pictures()[::-1]))


def test_changed_tokens_weigh_more(make: Make) -> None:
    batch = make(changed_token_weight=3.0)([record()])["batch"]
    # "red and blue", "red circle", and the chosen one again, each with its end.
    assert batch.token_weights.tolist() == [1, 3, 3, 1] + [1, 3, 1] + [1, 3, 3, 1]
    assert make()([record()])["batch"].token_weights is None
    assert changed_token_weights([1, 2, 3], [1, 2, 3], 5.0)[0].tolist() == [1, 1, 1]


def test_lengths_need_no_pixels(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = []
    for index, picture in enumerate(pictures()):
        exif = Image.Exif()
        exif[0x0112] = 6 if index == 1 else 1  # turned by a quarter when it is opened
        picture.save(tmp_path / f"{index}.jpg", exif=exif)
        paths.append(str(tmp_path / f"{index}.jpg"))
    cases = [
        record(images=paths),
        record(images=paths, target=None),
        record(rejected_images=[pictures()[0].resize((96, 96))] * 3),
    ]
    collator = make()
    expected = []
    for case in cases:
        sizes = separate(make, [case]).attention_mask.sum(1).max(), collator([case])["batch"].input_ids.shape[1]
        expected.append(tuple(map(int, sizes)))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("a picture was decoded"))
    assert [(collator.length(case), collator.tree_tokens(case)) for case in cases] == expected


def test_keys_follow_content(make: Make, tmp_path: Path) -> None:
    for index, picture in enumerate(pictures()):
        picture.save(tmp_path / f"{index}.png")
    paths = [str(tmp_path / f"{index}.png") for index in range(3)]
    shutil.copy(paths[0], tmp_path / "copy.png")
    collator = make()
    key = collator.key(record(images=paths))
    assert key == collator([record(images=paths)])["batch"].keys[0] == make(tree_packing=False).key(record(images=paths))
    assert key == collator.key(record(id="renamed", images=[str(tmp_path / "copy.png"), *paths[1:]]))
    bytes_only = [{"bytes": Path(path).read_bytes(), "path": None} for path in paths]
    assert key == collator.key(record(images=bytes_only))
    others = [
        collator.key(record(images=paths[::-1])),
        collator.key(record(images=paths, chosen="blue")),
        collator.key(record(images=paths, rejected="blue")),
        collator.key(record(images=paths, target=0)),
        collator.key(record(images=paths, prompt=record()["prompt"] + " no")),
        collator.key(record(images=paths, rejected_images=paths[::-1])),
        make(branches=("chosen", "rejected")).key(record(images=paths)),
        make(branches=("chosen", "rejected"), no_image=True).key(record(images=paths)),
        make(changed_token_weight=2.0).key(record(images=paths)),
        make(corruption=Corruption(keep=(0.3, 0.5), seed=1)).key(record(images=paths)),
        make(corruption=Corruption(kind="blank")).key(record(images=paths)),
    ]
    assert len({key, *others}) == 1 + len(others)
    # Texts of the same tokens are corrupted by draws of their own.
    spaced = record(images=paths, prompt=record()["prompt"].replace(" ", "  ", 1))
    assert collator.batch([spaced]).input_ids.tolist() == collator.batch([record(images=paths)]).input_ids.tolist()
    assert collator.key(spaced) != key
    palettes = [Image.new("P", (48, 48)) for _ in range(2)]
    for index, picture in enumerate(palettes):
        picture.putpalette([50 * index] * 768)
    assert len({collator.key(record(images=[picture, *paths[1:]])) for picture in palettes}) == 2
    pictures()[0].rotate(90).save(paths[0])
    assert collator.key(record(images=paths)) != key


def test_another_process_makes_the_same_batch(make: Make) -> None:
    collator = make()
    assert len(pickle.dumps(collator)) < 500_000
    loader = DataLoader([record()], collate_fn=collator, num_workers=1, multiprocessing_context=context())
    (found,) = loader
    expected = collator([record()])["batch"]
    assert torch.equal(found["batch"].input_ids, expected.input_ids)
    assert torch.equal(found["batch"].pictures.pixel_values, expected.pictures.pixel_values)
    assert (expected.position_ids.ndim == 3) == (expected.pictures.grids is not None)
    assert pickle.loads(pickle.dumps(collator)).key(record()) == collator.key(record())


def test_refused_pictures_and_placeholders_are_named(make: Make, loaded: LoadedModel) -> None:
    token = loaded.processor.image_token
    if token != "<image>":
        with pytest.raises(DataError, match="record one: the prompt has 4 image tokens for 3 pictures"):
            make()([record(prompt=record()["prompt"] + token)])
        thin = record(id="thin", images=[Image.new("RGB", (2000, 2)), *pictures()[1:]])
        with pytest.raises(DataError, match="record thin: the image processor refuses a picture: absolute aspect ratio"):
            make()([record(), thin])
        with pytest.raises(DataError, match="record thin: the image processor refuses a picture: absolute aspect ratio"):
            make().length(thin)
    with pytest.raises(ValueError, match="branches: expected"):
        make(branches=("rejected", "chosen"))
