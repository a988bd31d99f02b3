"""Files of published benchmarks in their own columns, made of given pictures and questions."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image


def picture_bytes(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind)
    return buffer.getvalue()


def in_base64(*images: Image.Image) -> str:
    """A cell of VLMEvalKit's TSV: base64 of a picture, or of several a list as Python writes it."""
    texts = [base64.b64encode(picture_bytes(image)).decode() for image in images]
    return texts[0] if len(texts) == 1 else str(texts)


def write_tsv(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """With all cells quoted, as VLMEvalKit writes it; cells that a row lacks are empty."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, names, delimiter="\t", quoting=csv.QUOTE_ALL)
        table.writeheader()
        table.writerows(rows)
    return path


def write_parquet(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """As the Hub has it: a picture is a struct of bytes and path."""
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(name for row in rows for name in row))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{name: row.get(name) for name in names} for row in rows]), path)
    return path


def hub_picture(image: Image.Image) -> dict[str, Any]:
    return {"bytes": picture_bytes(image, "JPEG"), "path": None}


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
