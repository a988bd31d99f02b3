"""The page: sections in the order that the run's method names them, in one layout."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import resources
from typing import Any

import yaml
from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup, escape

from . import numbers, tables
from .comparison import PageInputs
from .sections import OF_EVERY_METHOD, SECTIONS


def render(page: PageInputs) -> str:
    """The page as HTML text that needs no other file and no network.

    Raises StageError where matplotlib is not installed.
    """
    first, *others = page.method.page
    names = [first, *(name for name in OF_EVERY_METHOD if name not in page.method.page), *others]
    made = [(name, SECTIONS[name](page)) for name in names]
    config, now = page.config, page.now or datetime.now(UTC)
    values = {
        "title": page.title,
        "facts": [
            ("Run", page.run.folder.name),
            ("Model", config.get("model", "–")),
            ("Seed", config.get("seed", "–")),
            *tables.data_facts(page.run),
            ("Date", now.strftime("%Y-%m-%d %H:%M UTC")),
        ],
        "lost": tables.lost_table(page.run),
        "left_out": tables.lost_fact(page.run),
        "sections": [(name, values) for name, values in made if values is not None],
        "versions": tables.versions_table(),
        "config": yaml.safe_dump(json.loads(json.dumps(config)), sort_keys=False, allow_unicode=True) if config else "",
    }
    return _filled("layout.html.j2", values)


def _filled(template: str, page: Mapping[str, Any]) -> str:
    """HTML text: a template of this folder with its values."""
    folder = resources.files(__package__)

    def read(name: str) -> str:
        return folder.joinpath(name).read_text(encoding="utf-8")

    environment = Environment(
        loader=FunctionLoader(read), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"percent": numbers.percent, "points": numbers.points, "ratio": numbers.ratio, "breakable": _breakable}
    return environment.get_template(template).render(page=page, css=read("page.css"))


def _breakable(text: str) -> Markup:
    """With places at which a narrow column may break a name of several parts."""
    return Markup(re.sub(r"([/_])", r"\1<wbr>", str(escape(text))))
