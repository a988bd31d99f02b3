"""`mmdpo export --lmms-eval`: prompts with answers as a task of lmms-eval, which reads local files alone.

lmms-eval: https://github.com/EvolvingLMMs-Lab/lmms-eval, `--include_path`. A task is a YAML file, and beside it the functions it names.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmdpo_trainers.data import match
from mmdpo_trainers.data.conversation import conversation_of
from mmdpo_trainers.data.images import content_key, png_bytes
from mmdpo_trainers.data.records import read_prompts
from mmdpo_trainers.errors import ConfigError, DataError, StageError
from mmdpo_trainers.files.atomic import write_atomic
from mmdpo_trainers.models.chat_format import chat_of, typed_parts
from mmdpo_trainers.models.encode import load_images
from mmdpo_trainers.models.loaded import LoadedModel
from mmdpo_trainers.models.merged import check_empty
from mmdpo_trainers.run.export import handed_over
from mmdpo_trainers.run.export.source import Source

_OPTIONS = "from mmdpo_trainers.config.options import Match\n"
_HEADER = """
from pathlib import Path
from typing import Any, Literal

from PIL import Image

Match = Literal["exact", "contains", "choice"]
FOLDER = Path(__file__).parent
"""
_TASK = """# Written by `mmdpo export --lmms-eval`: lmms-eval eval --include_path THIS_FOLDER --tasks {name} --model … --model_args pretrained=…
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.doc_to_visual
doc_to_messages: !function utils.doc_to_messages
doc_to_text: !function utils.doc_to_text
doc_to_target: answer
process_results: !function utils.process_results
generation_kwargs:
  max_new_tokens: {tokens}
  temperature: 0
  do_sample: false
metric_list:
{metrics}metadata:
  - version: 1.0
"""
_METRIC = """  - metric: {name}
    aggregation: mean
    higher_is_better: true
"""


def check(source: Source, folder: str | None, given: str | None) -> None:
    """Raise MmdpoError where `write_task` would, before any work."""
    if folder is None:
        if given is not None:
            raise ConfigError("--lmms-eval-input: expected --lmms-eval beside it, the folder that is written")
        return
    check_empty(Path(folder).expanduser().absolute())
    _prompts(source, given)


def write_task(source: Source, model: LoadedModel, folder: str | Path, given: str | None = None) -> str:
    """Write the task to a new folder; returns the command that runs it, and what it does not read as this project does.

    source: what is exported. model: its texts, of which no weight is asked. given: prompts with answers (.jsonl) in place of the run's own
    evaluation prompts. Raises MmdpoError where there are none, or where they cannot be read.
    """
    target = Path(folder).expanduser().absolute()
    path = _prompts(source, given)
    options = None if source.context is None else source.context.config.evaluate
    rule, tokens = ("exact", 16) if options is None else (options.match, options.max_new_tokens)
    lines, otherwise, groups = [], 0, dict[str, None]()
    for record in read_prompts(path):
        if not isinstance(record.get("answer"), str):
            raise DataError(
                f"{path}, record {record['id']!r}: expected an `answer`, got {record.get('answer')!r}; add it, or leave the record out"
            )
        messages = _messages(model, record)
        otherwise += not _reads_alike(model, record, messages)
        group = re.sub(r"\W+", "_", str(record.get("group") or record["format"]))
        groups[group] = None
        lines.append(
            {
                "id": record["id"],
                "messages": messages,
                "images": [_saved(picture, target / "images") for picture in load_images(record)],
                "answer": record["answer"],
                # The reader of lmms-eval's data takes a column of lists to have some.
                "options": list(record.get("options") or []),
                "group": group,
                "match": rule,
            }
        )
    if not lines:
        raise StageError(f"{path} holds no prompts; give prompts with answers with --lmms-eval-input")
    named = path.stem if given is not None or source.context is None else source.context.run.path.name
    name = f"mmdpo_{re.sub(r'[^a-z0-9]+', '_', named.lower())}"
    write_atomic(target / "prompts.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    write_atomic(target / "utils.py", _functions())
    metrics = "".join(_METRIC.format(name=each) for each in ("accuracy", *(f"accuracy_{group}" for group in groups)))
    data = json.dumps(str(target / "prompts.jsonl"))
    write_atomic(target / f"{name}.yaml", _TASK.format(name=name, data=data, tokens=tokens, metrics=metrics))
    said = f"{len(lines):,} prompts as task {name}: lmms-eval eval --include_path {folder} --tasks {name} --model_args pretrained=… --model …"
    if otherwise:
        said += (
            f"\n{otherwise:,} of them become other prompts with lmms-eval's chat models than in training: the chat template takes pictures out "
            "of their places, or is not told what this project tells it"
        )
    return said


def _prompts(source: Source, given: str | None) -> Path:
    if given is not None:
        if not Path(given).expanduser().is_file():
            raise ConfigError(f"--lmms-eval-input: {given} is not a file; give prompts with an `answer` each (.jsonl)")
        return Path(given).expanduser().absolute()
    path = None if source.context is None else source.context.evaluation_prompts
    if path is None or not path.is_file():
        raise ConfigError(
            "--lmms-eval: there are no evaluation prompts of a run here; give prompts with answers with --lmms-eval-input"
        )
    return path


def _messages(model: LoadedModel, record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The prompt as messages of typed parts, in the form that the chat template keeps in order, where it does."""
    chat = chat_of(model.processor, model.date)
    messages = []
    for turn in conversation_of(record).turns:
        parts = (None if chat is None else next(chat.contents(turn.text), None)) or typed_parts(turn.text)
        # Each with the same fields: they become columns.
        messages.append({"role": turn.role, "content": [{"type": part["type"], "text": part.get("text")} for part in parts]})
    return messages


def _reads_alike(model: LoadedModel, record: Mapping[str, Any], messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the processor's own rendering of the messages is the prompt of this project."""
    conversation = conversation_of(record)
    parts = [
        {
            "role": message["role"],
            "content": [{key: value for key, value in part.items() if value is not None} for part in message["content"]],
        }
        for message in messages
    ]
    try:
        rendered = model.processor.apply_chat_template(parts, tokenize=False, add_generation_prompt=True)
    except (ValueError, TypeError, KeyError, AttributeError):
        return False
    return bool(rendered == model.texts.rendered(record["id"], conversation))


def _saved(picture: Any, folder: Path) -> str:
    data = png_bytes(picture)
    name = f"{content_key(data)}.png"
    if not (folder / name).is_file():
        write_atomic(folder / name, data, durable=False)
    return name


def _functions() -> str:
    """`utils.py`: how answers are compared, and the functions of `handed_over`."""
    rules = inspect.getsource(match)
    assert _OPTIONS in rules
    functions = (handed_over.doc_to_visual, handed_over.doc_to_messages, handed_over.doc_to_text, handed_over.process_results)
    head = rules.replace(_OPTIONS, _HEADER.lstrip()).rstrip("\n")
    return "\n\n\n".join([head, *(inspect.getsource(each).rstrip("\n") for each in functions)]) + "\n"
