"""Answers of the policy as it is: adapter on, no copy, and afterwards nothing of it or of random states has changed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from mmdpo_trainers.answers.transformers_engine import generate_responses
from mmdpo_trainers.config.sections.online import OnlineConfig
from mmdpo_trainers.data.pair_records import record_images, record_name, stored_prompt
from mmdpo_trainers.data.seeds import batch_seed
from mmdpo_trainers.errors import DataError
from mmdpo_trainers.models.encode import load_images
from mmdpo_trainers.models.loaded import LoadedModel
from mmdpo_trainers.training.online.choice import Answer


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, in which no layer checkpoints its activations, and each module in its own mode again afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def as_prompt(record: Mapping[str, Any]) -> dict[str, Any]:
    """A preference record as engines and raters read prompts: with an `<image>` for each picture, the pictures in `images`."""
    images = record_images(record)
    text = {"id": record_name(record), "prompt": stored_prompt(record), "images": images, "num_images": len(images)}
    return {**{name: value for name, value in record.items() if name not in ("chosen", "rejected")}, **text}


def sample(
    loaded: LoadedModel,
    prompts: Sequence[Mapping[str, Any]],
    options: OnlineConfig,
    *,
    seed: int,
    step: int,
    autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> list[list[Answer]]:
    """`options.samples` answers to each prompt, in batches of `options.batch_size` prompts.

    A batch's seed follows from `seed`, the step and the names of its records: neither from a random state nor from the number of
    processes. autocast: the context of the policy's forward passes.
    """
    found: list[list[Answer]] = []
    for start in range(0, len(prompts), options.batch_size):
        batch = prompts[start : start + options.batch_size]
        pictures = [load_images(prompt) for prompt in batch]
        with evaluating(loaded.model), autocast():
            answers = generate_responses(
                loaded,
                [prompt for prompt in batch for _ in range(options.samples)],
                max_new_tokens=options.max_new_tokens,
                do_sample=True,
                temperature=options.temperature,
                top_p=options.top_p,
                seed=batch_seed(seed, "answers", step, *(prompt["id"] for prompt in batch)),
                pictures=[shown for shown in pictures for _ in range(options.samples)],
            )
        for number, prompt in enumerate(batch):
            own = answers[number * options.samples : (number + 1) * options.samples]
            found.append([_answer(loaded, prompt["id"], answer) for answer in own])
    return found


def _answer(loaded: LoadedModel, name: str, answer: Mapping[str, Any]) -> Answer:
    """An answer; one whose text has marks of the chat format or of a picture spelt out cannot be trained on."""
    try:
        loaded.texts.answer(name, "a sampled answer", answer["response"])
        usable = True
    except DataError:
        usable = False
    return Answer(answer["response"], answer["num_tokens"] + answer["ended"], answer["ended"], usable)
