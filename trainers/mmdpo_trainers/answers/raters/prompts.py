"""A judge's prompts, from templates: the built-in ones, or the user's own.

Facts beside the question are LLaVA-RLHF's factual augmentation (arXiv 2309.14525): its reward model reads captions and options that the
policy does not see. There they stand inside the criterion of accuracy; here in a paragraph of their own. What a judge is told differs by
paper and data, so the template is the user's to replace.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mmdpo_trainers.config.sections.rating import RateConfig
from mmdpo_trainers.data.conversation import words
from mmdpo_trainers.data.records import IMAGE_TOKEN
from mmdpo_trainers.errors import ConfigError

_SHOWN = 500
"""Characters of a malformed reply that the judge is shown again."""


class JudgePrompts:
    """Texts to a judge, with `<image>` where the pictures of the record stand.

    A template has `prompt` (the question), `response` (or `first` and `second`), `attributes`, `lowest`, `highest` and `facts`, a
    mapping of those asked for that the record has. Raises ConfigError, naming file and line, for a template that cannot be filled.
    """

    def __init__(self, options: RateConfig) -> None:
        self._options = options
        self._rating = read_template("rate.template", options.template, "rate.txt.j2", __package__)
        self._comparison = read_template("rate.comparison_template", options.comparison_template, "compare.txt.j2", __package__)
        sample = {"id": "sample", "prompt": f"{IMAGE_TOKEN}\nWhat is it?", "images": ["sample.png"], "answer": "A cat."}
        self.rating(sample, "A dog.")
        self.comparison(sample, "A cat.", "A dog.")

    def rating(self, record: Mapping[str, Any], response: str) -> str:
        """Asks for the ratings of one answer."""
        return self._filled("template", self._rating, record, {"response": response})

    def comparison(self, record: Mapping[str, Any], first: str, second: str) -> str:
        """Asks which of two answers is better."""
        return self._filled("comparison_template", self._comparison, record, {"first": first, "second": second})

    def _filled(self, name: str, template: Template, record: Mapping[str, Any], answers: Mapping[str, str]) -> str:
        options, prompt = self._options, words(record["prompt"])
        prompt = prompt if options.images else plain(prompt)
        values = {
            "prompt": prompt,
            "attributes": list(options.attributes),
            "lowest": f"{options.lowest:g}",
            "highest": f"{options.highest:g}",
            "facts": self._facts(record),
            # A placeholder in what a model wrote would ask for a picture.
            **{key: plain(answer) for key, answer in answers.items()},
        }
        try:
            text = template.render(values)
        except (TemplateError, TypeError, ValueError, ArithmeticError) as error:
            number = getattr(error, "lineno", None)
            line = f", line {number}" if number else ""
            raise ConfigError(
                f"rate.{name}: {template.filename or 'the template'}{line} cannot be filled ({error}); it has the values {', '.join(values)}"
            ) from error
        if text.count(IMAGE_TOKEN) != prompt.count(IMAGE_TOKEN):
            raise ConfigError(
                f"rate.{name}: {template.filename}: expected `prompt` once, with the places of the pictures, got {text.count(IMAGE_TOKEN)} "
                f"{IMAGE_TOKEN} for {prompt.count(IMAGE_TOKEN)} pictures of record {record['id']!r}"
            )
        return text

    def _facts(self, record: Mapping[str, Any]) -> dict[str, str]:
        found: dict[str, str] = {}
        for name in self._options.facts:
            value = record.get(name)
            text = "; ".join(map(str, value)) if isinstance(value, list | tuple) else str(value or "")
            if text.strip():
                found["correct answer" if name == "answer" else name] = plain(text)
        return found


def again(text: str, reply: str, complaint: str) -> str:
    """The same question after a reply that could not be used."""
    shown = plain(reply)[:_SHOWN]
    return (
        f"{text.rstrip()}\n\nYour last reply was:\n{shown}\n\nIt cannot be used: {complaint}. Reply again, in the form asked for."
    )


def read_template(where: str, path: str | None, built_in: str, package: str) -> Template:
    """A jinja2 file of the user's, or one of a package. Raises ConfigError, naming `where`, file and line, for one that cannot be read."""
    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)
    try:
        source = (
            Path(path).read_text(encoding="utf-8") if path else resources.files(package).joinpath(built_in).read_text("utf-8")
        )
        template = environment.from_string(source)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where}: {path} cannot be read ({error}); give a jinja2 file, or leave it out") from error
    except TemplateError as error:
        raise ConfigError(f"{where}: {path}, line {getattr(error, 'lineno', '?')}: not a jinja2 template ({error})") from error
    template.filename = path or built_in
    return template


def plain(text: str) -> str:
    """A text without places for pictures: one in what a model wrote would ask for a picture."""
    return text.replace(IMAGE_TOKEN, "[picture]")
