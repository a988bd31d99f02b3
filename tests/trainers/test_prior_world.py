"""The world with a language prior, the pairs made of it, and the shipped base that believes the prior."""

from __future__ import annotations

import random

import numpy as np
import pytest

from mmdpo_trainers.config.shipped import SHIPPED
from mmdpo_trainers.shapes import prior_world, world
from mmdpo_trainers.shapes.build import formats, lessons
from mmdpo_trainers.shapes.build import prior_base as build_prior_base
from mmdpo_trainers.shapes.build.formats import Composed, Sample, Turn
from mmdpo_trainers.shapes.model import build_processor


def records(count: int, **options):
    settings = {"seed": 0, "split": "pairs", "counterfactual": 0.8, "captions": 0.5, **options}
    return list(prior_world.preference_records(count, **settings))


def text(record, column):
    return record[column][0]["content"]


def test_chosen_is_what_the_picture_shows_and_rejected_what_the_prior_says():
    seen = set()
    for record, picture in records(200):
        shape = text(record, "prompt").removesuffix(" in the picture.").split()[-1].rstrip("?")
        colours = {colour for _, colour in picture.getcolors()}
        [shown] = [name for name, value in world.COLOURS.items() if value in colours]
        named = [
            {word for word in text(record, side).replace(".", "").split() if word in world.COLOURS}
            for side in ("chosen", "rejected")
        ]
        assert named[0] == {shown} and len(named[1]) == 1 and named[1] != named[0]
        kind, side = record["group"].split("/")
        assert kind == record["kind"] and (side == "agree") == (shown == prior_world.PRIOR[shape])
        assert side == "agree" or named[1] == {prior_world.PRIOR[shape]}
        seen.add(record["group"])
    assert len(seen) == 4


def test_every_word_is_known_and_captions_are_long():
    tokenizer = build_processor().tokenizer
    lengths = []
    for record, _ in records(300):
        for column in ("prompt", "chosen", "rejected"):
            ids = tokenizer(text(record, column)).input_ids
            assert tokenizer.unk_token_id not in ids, record[column]
            if column == "chosen" and record["kind"] == "caption":
                lengths.append(len(ids))
    assert min(lengths) >= 20 and max(lengths) <= 40


def test_seed_and_split_decide_and_counts_do_not():
    first = [record for record, _ in records(30)]
    assert [record for record, _ in records(60)][:30] == first
    assert [record for record, _ in records(30, seed=1)] != first
    groups = [record["group"] for record, _ in records(400, counterfactual=1.0, captions=0.0)]
    assert set(groups) == {"answer/disagree"}


def test_no_picture_is_both_trained_and_evaluated_on():
    trained = {picture.tobytes() for _, picture in records(1500)}
    evaluated = [picture for _, picture in records(1500, split="held_out")]
    evaluated += [picture for _, picture in prior_world.evaluation_prompts(300, 300, seed=0)]
    assert len(trained) > 1400 and not trained & {picture.tobytes() for picture in evaluated}


def test_evaluation_asks_both_kinds_about_each_picture():
    found = list(prior_world.evaluation_prompts(3, 2, seed=5))
    assert [record["group"] for record, _ in found] == ["answer/disagree", "caption/disagree"] * 3 + [
        "answer/agree",
        "caption/agree",
    ] * 2
    assert all((record["answer"] == record["expected"]) == record["group"].endswith("/agree") for record, _ in found)


def test_the_shipped_base_believes_the_prior_though_it_sees_the_colour():
    from mmdpo_trainers.models.loading import load_model

    loaded = load_model("shapes_prior")
    assert loaded.path == SHIPPED["shapes_prior"]
    rng = random.Random(1)
    share = {}
    for agreeing in (True, False):
        scenes = [prior_world.sample_scene(rng, agreeing) for _ in range(150)]
        pool = [Composed(world.draw(s), (s,), ("whole",), np.zeros(formats.TOKENS, dtype=np.int64)) for s in scenes]
        features = lessons.encode(loaded.model, pool)
        for says in ("truth", "prior"):
            said = [s if says == "truth" else prior_world.expected_scene(s) for s in scenes]
            samples = [
                Sample((i,), "<image>\n", (Turn(prior_world.question(s, "answer"), (told.colour,)),))
                for i, (s, told) in enumerate(zip(scenes, said, strict=True))
            ]
            share[agreeing, says] = lessons.accuracy(loaded.model, loaded.processor, samples, features)
    assert share[True, "truth"] > 0.98
    assert 0.3 < share[False, "truth"] < 0.7 and share[False, "truth"] + share[False, "prior"] > 0.95


def test_texts_of_the_base_follow_its_settings():
    rng = random.Random(0)
    config = build_prior_base.PriorBaseConfig(unseen=0.5, believed=0.0)
    pool = [build_prior_base.told(rng, config) for _ in range(300)]
    assert sum(item.expects for item in pool) == pytest.approx(150, abs=30)
    for index, item in enumerate(pool):
        answers = [turn.answer for turn in build_prior_base._sample(index, item, rng, config).turns]
        wanted = prior_world.PRIOR[item.scene.shape] if item.expects else item.scene.colour
        assert answers[0] == wanted and f" {wanted} " in answers[1]


def test_a_similar_picture_differs_in_the_colour_alone_and_has_its_own_answer():
    settings = {"seed": 0, "split": "pairs", "counterfactual": 0.8, "captions": 0.5}
    for (record, picture), (columns, similar) in zip(records(60), prior_world.similar_columns(60, **settings), strict=True):
        assert columns["similar_images"] == [f"images/{record['id']}-similar.png"]
        [shown], [other] = (
            [name for name, value in world.COLOURS.items() if value in {colour for _, colour in each.getcolors()}]
            for each in (picture, similar)
        )
        assert shown != other
        chosen, alike = text(record, "chosen"), text(columns, "similar_chosen")
        assert alike.replace(" an ", " a ").replace(other, shown) == chosen.replace(" an ", " a ")
        # Where the shape is, and nowhere else.
        differing = (np.asarray(picture) != np.asarray(similar)).any(-1)
        assert (np.asarray(picture)[differing] == world.COLOURS[shown]).all()
