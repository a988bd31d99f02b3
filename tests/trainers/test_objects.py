"""Objects that an answer names: words and plurals, CHAIR's kinds and its marks, AMBER's nouns and what they are worth, all by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmdpo_trainers.errors import DataError
from mmdpo_trainers.suites.objects.amber import Association, described, dimension, nouns_in
from mmdpo_trainers.suites.objects.chair import COCO_KINDS, Kinds, marks_of, truth_of
from mmdpo_trainers.suites.objects.coco import Annotations, entries
from mmdpo_trainers.suites.objects.words import singulars, tokens

ASSOCIATION = Association.of(
    {
        **{"dog": [], "grass": ["ground"], "ground": ["floor"], "person": ["people", "man"], "table": ["desk"], "light": []},
        **{"can": [], "watch": [], "leave": [], "hot": [], "car": ["tire"], "sky": []},
    },
    ["light"],
)


def test_words_and_what_they_may_be_the_plural_of() -> None:
    assert tokens("The dog's T-shirts, 2 cats!") == ["the", "dog", "t-shirts", ",", "2", "cats", "!"]
    expected = {
        **{
            "dogs": "dog",
            "buses": "bus",
            "knives": "knife",
            "puppies": "puppy",
            "children": "child",
            "wolves": "wolf",
            "skis": "skis",
        },
        **{"people": "person", "glass": "glass", "bus": "bus"},
    }
    for word, singular in expected.items():
        assert singular in list(singulars(word))
    assert list(singulars("glass")) == ["glass"]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("Two dogs and a cat.", ["dog", "cat"]),
        ("He eats hot dogs at a dining table.", ["hot dog", "dining table"]),
        ("A baby elephant beside adult zebras", ["elephant", "zebra"]),
        ("The seat of the toilet; a toilet seat", ["toilet", "toilet"]),
        ("A bow tie, and buses behind traffic lights", ["tie", "bus", "traffic light"]),
        ("He slides to home plate over a train track", []),
        ("A train on its track", ["train"]),
        ("Wine glasses and teddy bears", ["wine glass", "teddy bear"]),
        ("A doggedly catty carpet", []),
    ],
)
def test_kinds_of_object_in_a_text(text: str, named: list[str]) -> None:
    assert [kind for _, kind in Kinds.of_coco().found(text)] == named


def synonyms(path: Path) -> Path:
    lines = [{"dog": "dog, puppy , pup", "person": "person,man, people"}.get(name, name) for name in COCO_KINDS]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_list_of_synonyms_is_the_users(tmp_path: Path) -> None:
    kinds = Kinds.read(synonyms(tmp_path / "synonyms.txt"))
    assert kinds.found("The man's puppies") == [("man", "person"), ("puppy", "dog")]
    assert kinds.source == "synonyms.txt, 84 words"
    assert kinds.listed(["a puppy", "red dogs", "puppies"]) == [("puppy", "dog"), ("dog", "dog")]
    (tmp_path / "few.txt").write_text("dog, puppy\n")
    with pytest.raises(DataError, match="79 are missing, such as 'person'"):
        Kinds.read(tmp_path / "few.txt")
    (tmp_path / "gap.txt").write_text("dog, , puppy\n")
    with pytest.raises(DataError, match="line 1: expected a kind and its synonyms"):
        Kinds.read(tmp_path / "gap.txt")


def test_chairs_marks() -> None:
    """By hand: dog, cat, dog named, dog and person true: one of three mentions is wrong, one of two true kinds is there."""
    kinds = Kinds.of_coco()
    truth = truth_of(kinds, ["dog"], ["A person with a dog", "dogs"])
    assert truth == ["dog", "person"]
    assert marks_of(kinds.found("A dog, a cat and a dog"), truth, 7) == (
        "dog, cat (not there)",
        {"all": 1.0, "naming": [1.0, 1.0], "chair_i": [1, 3], "recall": [1, 2], "words": 7.0},
    )
    said, marks = marks_of([], truth, 2)
    assert said == "no object" and marks["all"] == 0 and marks["naming"] == [0.0, 0.0] and marks["chair_i"] == [0, 0]


def test_cocos_annotations_are_read_one_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "annotations"
    folder.mkdir()
    instances = {
        "images": [{"id": 1, "file_name": "1.jpg"}],
        "annotations": [{"image_id": 1, "category_id": 18, "segmentation": [[1, 2]]}, {"image_id": 2, "category_id": 1}],
        "categories": [{"id": 18, "name": "dog"}, {"id": 1, "name": "person"}],
    }
    (folder / "instances_val2014.json").write_text(json.dumps(instances, indent=1))
    with pytest.raises(DataError, match="lacks COCO's annotations"):
        Annotations.read(tmp_path)
    captions = {
        "images": [],
        "annotations": [{"image_id": 1, "caption": "A dog with a frisbee."}, {"image_id": 3, "caption": "Nothing"}],
    }
    (folder / "captions_val2014.json").write_text(json.dumps(captions))
    read = Annotations.read(tmp_path)
    assert [read.truth(image) for image in ("1", "2", "3", "4")] == [["dog", "frisbee"], ["person"], [], None]
    assert not list(entries(folder / "captions_val2014.json", "images"))
    (folder / "cut.json").write_text('{"annotations": [{"a": 1}, {"b"')
    with pytest.raises(DataError, match="list 'annotations' is not valid JSON"):
        list(entries(folder / "cut.json", "annotations"))
    with pytest.raises(DataError, match="expected a list 'images'"):
        list(entries(folder / "cut.json", "images"))


@pytest.mark.parametrize(
    ("text", "nouns"),
    [
        ("Dogs on the grass; a man at a desk.", ["dog", "grass", "man", "desk"]),
        ("It can be seen. A can of soda. Cans!", ["can", "can"]),
        ("They watch a watch and want to leave the leaves.", ["watch", "leave"]),
        ("It is hot, and the sky is blue.", ["sky"]),
        ("A feline", []),
    ],
)
def test_nouns_of_a_description(text: str, nouns: list[str]) -> None:
    assert nouns_in(text, ASSOCIATION.vocabulary) == nouns


def test_what_a_description_names() -> None:
    """By hand: ground stands for grass, the first that it comes with; table is imagined, and named by its desk; car is plainly wrong."""
    found = described(
        "A dog on the ground under a light, a desk, a car.", ["dog", "grass", "ground"], ["table", "person"], ASSOCIATION
    )
    assert found.nouns == ["dog", "ground", "light", "desk", "car"]
    assert found.wrong == ["desk", "car"] and (found.covered, found.cognitive) == (2, 1)
    assert found.said == "dog, ground, light, desk (not there), car (not there)"
    nothing = described("Nothing.", ["dog"], [], ASSOCIATION)
    assert (nothing.said, nothing.wrong, nothing.covered) == ("no object", [], 0)


def test_dimensions() -> None:
    kinds = (
        "generative",
        "discriminative-hallucination",
        "discriminative-attribute-number",
        "discriminative-relation",
        "relation",
    )
    assert [dimension(kind) for kind in kinds] == ["descriptions", "existence", "number", "relation", "relation"]
