"""What lmms-eval calls of a task that `mmdpo export --lmms-eval` writes: the functions of its `utils.py`, which are copied from here.

They run in lmms-eval's own environment, where this package need not be: of names beyond their own they use `Path`, `Image`, `FOLDER` (that of
the task) and `is_right`, which are written in front of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from mmdpo_trainers.data.match import is_right

FOLDER = Path()


def doc_to_visual(doc: dict[str, Any]) -> list[Image.Image]:
    """The pictures, in their order."""
    return [Image.open(FOLDER / "images" / name).convert("RGB") for name in doc["images"]]


def doc_to_messages(doc: dict[str, Any], lmms_eval_specific_kwargs: Any = None) -> list[dict[str, Any]]:
    """The prompt as chat models are given it, each picture in its place."""
    pictures = iter(doc_to_visual(doc))
    return [
        {
            "role": message["role"],
            "content": [
                {"type": "image", "url": next(pictures)} if part["type"] == "image" else {"type": "text", "text": part["text"]}
                for part in message["content"]
            ],
        }
        for message in doc["messages"]
    ]


def doc_to_text(doc: dict[str, Any], lmms_eval_specific_kwargs: Any = None) -> str:
    """The texts alone, for models without a chat format, before which lmms-eval puts the pictures."""
    return "".join(part["text"] or "" for message in doc["messages"] for part in message["content"]).strip()


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """1 for a right answer, 0 for any other: of all, and of its group."""
    right = is_right(results[0], doc["answer"], options=doc["options"] or None, match=doc["match"])
    return {"accuracy": float(right is True), f"accuracy_{doc['group']}": float(right is True)}
