"""The embedded default: the procedural world, its training data, and the shipped checkpoint."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from mmdpo_trainers.shapes import model, world
from mmdpo_trainers.shapes.build import base as build_base
from mmdpo_trainers.shapes.build import formats, lessons

BASE = Path(world.__file__).parent / "base"


def pixels(picture):
    return np.asarray(picture).tobytes()


def test_a_seed_fixes_the_world_and_seeds_are_disjoint():
    first, again, other = ([pixels(p) for _, p, _ in world.sample_world(300, seed)] for seed in (1, 1, 2))
    assert first == again
    assert len(set(first) & set(other)) <= 3
    assert [q for _, _, q in world.sample_world(20, 1)] == [q for _, _, q in world.sample_world(20, 1)]


def test_pictures_show_what_their_scene_says():
    for scene, picture, _ in world.sample_world(100, 5):
        assert picture.size == (world.IMAGE_SIZE, world.IMAGE_SIZE)
        colours = {colour for _, colour in picture.getcolors()}
        assert colours == {world.COLOURS[scene.colour], world.BACKGROUNDS[scene.background]}
        drawn = (np.asarray(picture) == world.COLOURS[scene.colour]).all(-1)
        assert drawn[scene.y, scene.x] == (scene.shape != "ring")
        rows, columns = drawn.any(1).nonzero()[0], drawn.any(0).nonzero()[0]
        assert abs(columns[-1] - columns[0] + 1 - scene.diameter) <= 2
        tall = rows[-1] - rows[0] + 1 > 0.6 * scene.diameter
        assert tall == (scene.shape != "bar")


def test_answers_follow_from_the_scene():
    for scene, _, questions in world.sample_world(200, 7):
        for question in questions:
            words = question.answer.split()
            facts = {scene.colour, scene.shape, scene.background, "a", "an", "on"}
            assert set(words) <= facts
            if "colour" in question.text:
                assert question.answer == scene.colour
            if "shape is" in question.text.lower():
                assert words[-1] == scene.shape
            if "background" in question.text:
                assert question.answer == scene.background
            if question.options:
                assert question.answer in question.options
                assert len(set(question.options)) == len(question.options)
                assert all(option in question.text for option in question.options)
        assert f"{scene.colour} {scene.shape} on {scene.background}" in " | ".join(q.answer for q in questions)


def test_training_data_is_llava_conversations(tmp_path):
    path = world.write_sft(tmp_path / "a", pictures=20, seed=3, questions_per_picture=3)
    records = json.loads(path.read_text())
    assert len(records) == 60 and len({r["id"] for r in records}) == 60
    for record in records:
        human, gpt = record["conversations"]
        assert (human["from"], gpt["from"]) == ("human", "gpt")
        assert human["value"].startswith("<image>\n") and gpt["value"]
        with Image.open(tmp_path / "a" / "images" / record["image"]) as picture:
            assert picture.size == (48, 48)
    again = world.write_sft(tmp_path / "b", pictures=20, seed=3, questions_per_picture=3)
    assert again.read_bytes() == path.read_bytes()
    with pytest.raises(ValueError, match="questions_per_picture"):
        world.write_sft(tmp_path / "c", pictures=2, seed=3, questions_per_picture=99)


def test_chat_template_keeps_pictures_in_place():
    processor = model.build_processor()
    prompt = "Image1:<image>\nImage2:<image>\nIn Image2, what is drawn here?"
    for content in (prompt, [{"type": "text", "text": prompt}]):
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False)
        assert text == f"USER: {prompt} ASSISTANT:"
    picture = Image.new("RGB", (48, 48))
    batch = processor(images=[picture, picture], text=text, return_tensors="pt")
    is_image = batch.input_ids[0] == processor.tokenizer.convert_tokens_to_ids("<image>")
    assert is_image.sum() == 2 * formats.TOKENS
    assert processor.tokenizer.unk_token_id not in batch.input_ids


def test_every_word_of_the_world_is_in_the_vocabulary():
    tokenizer = model.build_processor().tokenizer
    for _, _, questions in world.sample_world(300, 11):
        for question in questions:
            for text in (question.text, question.answer, *formats.PIP_OPENINGS):
                assert tokenizer.unk_token_id not in tokenizer(text).input_ids
            assert tokenizer.decode(tokenizer(question.answer).input_ids) == question.answer


def test_patches_are_owned_by_the_scene_they_show():
    rng = random.Random(0)
    for kind in ("single", "grid", "pip"):
        for _ in range(20):
            item = formats.compose(kind, rng)
            assert item.picture.size == (48, 48)
            patches = np.asarray(item.picture, dtype=int).reshape(4, 12, 4, 12, 3).transpose(0, 2, 1, 3, 4).reshape(16, -1, 3)
            for patch, owner in zip(patches, item.owner, strict=True):
                if owner < 0:
                    assert (patch == 255).all()
                    continue
                scene = item.scenes[owner]
                palette = np.array([world.COLOURS[scene.colour], world.BACKGROUNDS[scene.background]])
                nearest = np.abs(patch[:, None] - palette).sum(-1).min(-1)
                assert (nearest < 60).mean() > 0.6
    expected = formats.pixel_values([item.picture])
    got = model.build_processor().image_processor(item.picture, return_tensors="pt").pixel_values
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_packed_questions_answer_as_separate_prompts_do():
    """The tree of a packed sample gives each question the logits of its own prompt through the processor."""

    torch.manual_seed(0)
    processor = model.build_processor()
    net = model.build_model(processor).eval()
    rng = random.Random(1)
    pool = [formats.compose("sequence", rng) for _ in range(12)]
    samples = [formats.sample("sequence", pool, rng, 3) for _ in range(2)]
    batch = formats.pack(samples, [[t.answer for t in s.turns] for s in samples], processor)
    packed = lessons.response_logits(net, batch, lessons.encode(net, pool))
    row = 0
    for item in samples:
        for turn in item.turns:
            inputs = processor(
                images=[pool[i].picture for i in item.pictures],
                text=f"USER: {item.prefix}{turn.prompt} ASSISTANT: {turn.answer}</s>",
                return_tensors="pt",
            )
            count = len(processor.tokenizer(turn.answer).input_ids) + 1
            alone = net(**inputs).logits[0, -count - 1 : -1]
            torch.testing.assert_close(packed[row : row + count], alone, rtol=1e-4, atol=1e-4)
            row += count
    assert row == len(packed)


def test_attention_lesson_points_at_the_asked_about_picture():
    processor = model.build_processor()
    ids = processor.tokenizer.convert_tokens_to_ids([f"image{k}" for k in range(1, 6)])
    rng = random.Random(2)
    pool = [formats.compose("sequence", rng) for _ in range(12)]
    samples = [formats.sample("sequence", pool, rng, 2) for _ in range(3)]
    batch = formats.pack(samples, [[t.answer for t in s.turns] for s in samples], processor)
    lesson = lessons.AttentionLesson.of(batch, samples, pool, ids)
    rows = (batch.labels >= 0).nonzero()
    turns = [turn for sample in samples for turn in sample.turns]
    for (sample, row), target, images in zip(rows.tolist(), lesson.target_keys, lesson.image_keys, strict=True):
        asked = turns[batch.turn[sample, row]].target
        patches = batch.patch[sample][target].tolist()
        first = samples[sample].pictures[asked] * formats.TOKENS
        assert patches == list(range(first, first + formats.TOKENS))
        assert images.sum() == formats.TOKENS * len(samples[sample].pictures)
        assert batch.input_ids[sample, lesson.label_key[sample, row]] == ids[asked]
    seen = torch.zeros(3, 4, *[batch.input_ids.shape[1]] * 2)
    seen[rows[:, 0], :, rows[:, 1]] = lesson.target_keys[:, None].float() / formats.TOKENS
    labelled = (lesson.label_key >= 0).nonzero()
    link = torch.zeros_like(seen)
    link[labelled[:, 0], 0, labelled[:, 1], lesson.label_key[labelled[:, 0], labelled[:, 1]]] = 1
    assert lesson.loss([link, seen, seen], batch.labels >= 0).item() == pytest.approx(0, abs=1e-4)
    assert lesson.loss([link, seen.flip(-1), seen], batch.labels >= 0) > 1


def test_the_base_is_built_from_its_seed(tmp_path):
    steps = {"vision_steps": 2, "single_steps": 2, "multi_steps": 3, "confuse_steps": 2}
    sizes = {"single": 2, "sequence": 2, "grid": 2, "pip": 2}
    config = build_base.BaseConfig(pictures=12, vision_batch=4, batch=sizes, turns=sizes, probe_samples=2, ceiling=-1.0, **steps)
    weights = []
    for name in ("a", "b"):
        accuracy = build_base.build_base(config, tmp_path / name)
        assert set(accuracy) == set(formats.FORMATS)
        weights.append(AutoModelForImageTextToText.from_pretrained(tmp_path / name).state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    fresh = model.build_model(AutoProcessor.from_pretrained(tmp_path / "a")).state_dict()
    assert any(not torch.equal(fresh[name], weights[0][name]) for name in fresh if "vision_tower" in name)


@pytest.fixture(scope="module")
def shipped():
    return AutoModelForImageTextToText.from_pretrained(BASE).eval(), AutoProcessor.from_pretrained(BASE)


def test_shipped_checkpoint_is_small_and_single_precision(shipped):
    assert sum(f.stat().st_size for f in BASE.iterdir()) <= 4_000_000
    assert shipped[0].dtype == torch.float32


def test_shipped_checkpoint_answers_questions_about_one_picture(shipped):
    net, processor = shipped
    texts, pictures, answers = [], [], []
    for _, picture, questions in world.sample_world(100, seed=90_000):
        content = [{"type": "text", "text": f"<image>\n{questions[0].text}"}]
        texts.append(
            processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False)
        )
        pictures.append([picture])
        answers.append(questions[0].answer)
    inputs = processor(images=pictures, text=texts, padding=True, return_tensors="pt")
    generated = net.generate(**inputs, max_new_tokens=8)[:, inputs.input_ids.shape[1] :]
    right = [
        said == truth
        for said, truth in zip(processor.tokenizer.batch_decode(generated, skip_special_tokens=True), answers, strict=True)
    ]
    assert np.mean(right) >= 0.9
