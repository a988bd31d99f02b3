"""A judge behind an OpenAI-compatible endpoint, asked by `ChatClient`.

No error or file has the API key: the client takes it out of every text that comes back.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mmdpo_trainers.answers.chat_client import Answered, ChatClient, Refused, Silent, check_client, data_url
from mmdpo_trainers.answers.raters.judge import Keep, Question
from mmdpo_trainers.answers.raters.rating import Surroundings
from mmdpo_trainers.answers.raters.replies import NO_REPLY, Reply
from mmdpo_trainers.config.sections.rating import AskedConfig
from mmdpo_trainers.data.left_out import ALLOW
from mmdpo_trainers.data.records import IMAGE_TOKEN
from mmdpo_trainers.errors import ConfigError, StageError
from mmdpo_trainers.models.encode import load_images

_HOPELESS = 8
"""Refusals after which, with no reply among them, the settings are to blame and not the records."""


class Endpoint:
    """An `Asker` over HTTP. Several processes divide concurrency and rate between them.

    Raises ConfigError without httpx2 or with settings that cannot be; `ask` raises StageError where the endpoint refuses the key, has no
    such model, or has not answered a question after all repetitions (with `allow_missing` that question has no reply). What had come
    until then is kept.
    """

    def __init__(self, options: AskedConfig, surroundings: Surroundings) -> None:
        self._options, self._endpoint, self._where = options, options.endpoint, options.where
        self._allow_missing = surroundings.allow_missing
        endpoint = options.endpoint
        self._client = ChatClient([endpoint.url], endpoint, who="the judge", settings=f"{options.where}.endpoint")
        self.identity: Mapping[str, Any] = {
            "judge": endpoint.model,
            "max_image_side": endpoint.max_image_side,
            "parameters": endpoint.parameters,
            "json_schema": endpoint.json_schema,
        }
        self._encoded = functools.lru_cache(maxsize=4 * self._client.threads)(self._data_urls)
        self._lock = threading.Lock()
        self._answered, self._refused = 0, 0

    def ask(self, questions: Sequence[Question], keep: Keep) -> None:
        self._client.each(questions, lambda question: self._one(question, keep))

    def close(self) -> None:
        self._client.close()

    def _one(self, question: Question, keep: Keep) -> None:
        found = self._client.ask(self._body(question), self._read)
        if isinstance(found, Answered):
            reply = replace(found.value, requests=found.requests)
        elif isinstance(found, Refused):
            reply = Reply(text=None, problem=found.problem, reason="refused", requests=found.requests)
        else:
            reply = self._silent(question, found)
        if reply.reason != NO_REPLY:
            self._count(reply)
        keep(question.key, question.id, reply)

    def _silent(self, question: Question, found: Silent) -> Reply:
        what = f"record {question.id}: {found.what}"
        if not self._allow_missing:
            raise StageError(f"{what}; all replies so far are kept, and the same command continues; or {ALLOW}")
        return Reply(text=None, problem=what, reason=NO_REPLY, requests=found.requests)

    def _count(self, reply: Reply) -> None:
        with self._lock:
            self._answered += reply.text is not None
            self._refused += reply.text is None
            hopeless = not self._answered and self._refused >= _HOPELESS
        if hopeless:
            raise StageError(
                f"the judge at {self._endpoint.url} refused the first {_HOPELESS} questions ({reply.problem}); mend "
                f"{self._where}.endpoint.model and .parameters, or rate.images for a judge that takes no pictures; then "
                f"--restart {self._where.partition('.')[0]}"
            )

    def _read(self, completion: Any) -> Reply:
        choice = completion["choices"][0]
        content = choice["message"].get("content")
        if isinstance(content, list):
            content = "".join(str(part.get("text") or "") for part in content)
        if not isinstance(content, str | None):
            raise TypeError
        usage = completion.get("usage") or {}
        tokens = {name: usage[name] for name in ("prompt_tokens", "completion_tokens") if isinstance(usage.get(name), int)}
        return Reply(text=self._client.clean(content or ""), cut=choice.get("finish_reason") == "length", **tokens)

    def _body(self, question: Question) -> dict[str, Any]:
        options, endpoint = self._options, self._endpoint
        content: list[dict[str, Any]] = []
        plain = all(isinstance(image, str) for image in question.images)
        urls = iter((self._encoded if plain else self._data_urls)(question.id, question.images))
        for place, text in enumerate(question.text.split(IMAGE_TOKEN)):
            if place:
                content.append({"type": "image_url", "image_url": {"url": next(urls)}})
            if text.strip():
                content.append({"type": "text", "text": text})
        body: dict[str, Any] = {
            "model": endpoint.model,
            "messages": [{"role": "user", "content": content if question.images else question.text}],
            "max_tokens": options.max_new_tokens,
        }
        if endpoint.json_schema:
            form = question.form
            body["response_format"] = {
                "type": "json_schema",
                "json_schema": {"name": form.name, "strict": True, "schema": form.schema},
            }
        return {name: value for name, value in {**body, **endpoint.parameters}.items() if value is not None}

    def _data_urls(self, id: str, images: tuple[Any, ...]) -> list[str]:
        return [data_url(image, self._endpoint.max_image_side) for image in load_images({"id": id, "images": list(images)})]


def check_endpoint(options: AskedConfig) -> None:
    """Raise ConfigError for settings of an endpoint that cannot be, before anything is asked."""
    check_client(options.endpoint, f"{options.where}.endpoint")
    if not options.endpoint.model:
        raise ConfigError(
            f"{options.where}.endpoint.model: expected the model's name at the endpoint, got none; GET .../v1/models lists them"
        )
