"""Fenced blocks of a page, each with its kind, its place and the mark of what is not run here."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
KINDS = ("python", "sh", "yaml", "json", "text", "dockerfile")
"""What may stand behind the three backticks; `json` is followed by the setting that reads such records, all others stand alone."""

_FENCE = re.compile(r"^( *)```([^\n]*)\n(.*?)^\1```$", re.M | re.S)
_MARK = re.compile(r"^\*Not run here: .+\.\*$")


@dataclass(frozen=True)
class Block:
    """A block of code."""

    page: str
    """Path of the page from the repository's root."""
    line: int
    """Of its first line of code."""
    kind: str
    """Of `KINDS`."""
    reader: str
    """What else stands behind the backticks."""
    text: str
    marked: bool
    """Whether the line in front of it says *Not run here: …*, for readers to see."""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_in(page: Path, text: str | None = None) -> list[Block]:
    """The blocks of a page, or of a text that stands for it, in their order."""
    text = page.read_text(encoding="utf-8") if text is None else text
    found = []
    for match in _FENCE.finditer(text):
        before = text[: match.start()].rstrip().rpartition("\n")[2]
        kind, _, reader = match[2].partition(" ")
        code = re.sub(rf"^{match[1]}", "", match[3], flags=re.M)
        line = text.count("\n", 0, match.start()) + 2
        found.append(Block(page.relative_to(ROOT).as_posix(), line, kind, reader, code, bool(_MARK.match(before.strip()))))
    return found


def every_block() -> list[Block]:
    """All blocks of all pages."""
    return [block for page in PAGES if page.exists() for block in blocks_in(page)]
