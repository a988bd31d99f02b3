"""CHAIR: which of COCO's 80 kinds of object an answer names, and which of them the picture does not have.

Rohrbach et al., Object Hallucination in Image Captioning (arXiv 1809.02156), code https://github.com/LisaAnne/Hallucination; the figures
beside CHAIR_s and CHAIR_i are those of RLHF-V's Object HalBench (arXiv 2312.00849, https://github.com/RLHF-V/RLHF-V). What is there is the
union of the picture's instance annotations and of the objects that its five captions name.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmdpo_trainers.errors import DataError
from mmdpo_trainers.suites.objects.words import NONE, names_in, singulars, tokens
from mmdpo_trainers.suites.suite import Marks

COCO_KINDS = (
    *("person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light", "fire hydrant"),
    *(
        "stop sign",
        "parking meter",
        "bench",
        "bird",
        "cat",
        "dog",
        "horse",
        "sheep",
        "cow",
        "elephant",
        "bear",
        "zebra",
        "giraffe",
    ),
    *(
        "backpack",
        "umbrella",
        "handbag",
        "tie",
        "suitcase",
        "frisbee",
        "skis",
        "snowboard",
        "sports ball",
        "kite",
        "baseball bat",
    ),
    *(
        "baseball glove",
        "skateboard",
        "surfboard",
        "tennis racket",
        "bottle",
        "wine glass",
        "cup",
        "fork",
        "knife",
        "spoon",
        "bowl",
    ),
    *("banana", "apple", "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch"),
    *("potted plant", "bed", "dining table", "toilet", "tv", "laptop", "mouse", "remote", "keyboard", "cell phone", "microwave"),
    *("oven", "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush"),
)
"""The categories of COCO's instance annotations."""

_ANIMALS = ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe")
_INSTEAD = {
    **{f"{age} {animal}": animal for age in ("baby", "adult") for animal in _ANIMALS},
    **{f"passenger {vehicle}": vehicle for vehicle in ("jet", "train")},
    "toilet seat": "toilet",
    "bow tie": "tie",
}
"""Two words -> the one that they name: a baby elephant is no person, a toilet seat no chair."""
_NOTHING = frozenset({"home plate", "train track", "baby animal", "adult animal", "baby cub", "adult cub"})
"""Two words of which neither names an object."""


@dataclass(frozen=True)
class Kinds:
    """Words for COCO's kinds of object. source: what they are from, for the figures."""

    kind_of: Mapping[str, str]
    """Word or words -> kind."""
    source: str

    @classmethod
    def of_coco(cls) -> Kinds:
        """The 80 names themselves: a dog is found, a puppy is not."""
        return cls({name: name for name in COCO_KINDS}, "COCO's 80 names and their plurals")

    @classmethod
    def read(cls, path: Path) -> Kinds:
        """A list such as CHAIR's `synonyms.txt`: a line a kind, `name, synonym, …`. Raises DataError for another file."""
        kind_of: dict[str, str] = {}
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            words = [" ".join(word.split()).casefold() for word in line.split(",")]
            if words == [""]:
                continue
            if not all(words):
                raise DataError(f"{path}, line {number}: expected a kind and its synonyms, split by commas, got {line[:80]!r}")
            kind_of.update(dict.fromkeys(words, words[0]))
        missing = [name for name in COCO_KINDS if name not in kind_of]
        if missing:
            raise DataError(
                f"{path}: expected a line for each of COCO's 80 kinds of object, as in CHAIR's synonyms.txt; {len(missing)} are missing, "
                f"such as {missing[0]!r}"
            )
        return cls(kind_of, f"{path.name}, {len(kind_of):,} words")

    @functools.cached_property
    def _vocabulary(self) -> tuple[frozenset[str], int]:
        names = frozenset({*self.kind_of, *_INSTEAD, *_NOTHING})
        return names, max(len(name.split()) for name in names)

    def found(self, text: str) -> list[tuple[str, str]]:
        """(word, kind) of each object that a text names, in order, as often as it does."""
        vocabulary, longest = self._vocabulary
        names = (name for _, name in names_in(tokens(text), vocabulary, longest))
        found = [_INSTEAD.get(name, name) for name in names if name not in _NOTHING]
        if "toilet" in found:
            # "The seat of the toilet".
            found = [name for name in found if name != "seat"]
        return [(name, self.kind_of[name]) for name in found if name in self.kind_of]

    def listed(self, names: Iterable[str]) -> list[tuple[str, str]]:
        """The same of a list of names of objects, each counted once however often it is there."""
        return list(dict.fromkeys(pair for name in names for pair in self.found(name)))

    def kind(self, category: str) -> str:
        """The kind that a category of COCO's annotations is."""
        return self.kind_of[next((form for form in singulars(category.casefold()) if form in self.kind_of), category)]


def truth_of(kinds: Kinds, categories: Iterable[str], captions: Iterable[str]) -> list[str]:
    """The kinds of object in a picture, sorted: its annotated categories, and those that its captions name."""
    found = {kinds.kind(category) for category in categories}
    return sorted(found.union(*({kind for _, kind in kinds.found(caption)} for caption in captions)))


def marks_of(named: Sequence[tuple[str, str]], truth: Collection[str], words: int) -> tuple[str, Marks]:
    """What an answer that names these (word, kind), with repetitions, is worth, where the kinds in `truth` are in the picture.

    `all`: whether it names one that is not there; `naming`: the same of answers that name any; `chair_i`: of the objects named, those that
    are not there; `recall`: of the true kinds, those named; `words`: its length.
    """
    wrong = [word for word, kind in named if kind not in truth]
    hallucinates = float(bool(wrong))
    said = ", ".join(f"{word} (not there)" if word in wrong else word for word in dict.fromkeys(word for word, _ in named))
    return said or NONE, {
        "all": hallucinates,
        "naming": [hallucinates, float(bool(named))],
        "chair_i": [len(wrong), len(named)],
        "recall": [len({kind for _, kind in named} & set(truth)), len(truth)],
        "words": float(words),
    }
