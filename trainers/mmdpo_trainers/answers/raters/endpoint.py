"""A judge behind an OpenAI-compatible endpoint: many requests at a time, at a bounded rate, repeated where they fail.

The API key is read from the environment and goes into one header. It is taken out of every text that comes back, and no error or file
has it.
"""

from __future__ import annotations

import base64
import email.utils
import functools
import io
import json
import logging
import os
import random
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from mmdpo_trainers.answers.raters.judge import Keep, Question
from mmdpo_trainers.answers.raters.rating import Surroundings
from mmdpo_trainers.answers.raters.replies import NO_REPLY, Reply
from mmdpo_trainers.config.sections.rating import AskedConfig
from mmdpo_trainers.data.images import png_bytes
from mmdpo_trainers.data.left_out import ALLOW
from mmdpo_trainers.data.records import IMAGE_TOKEN
from mmdpo_trainers.errors import ConfigError, StageError
from mmdpo_trainers.models.encode import load_images
from mmdpo_trainers.processes import ranks

logger = logging.getLogger(__name__)

_AGAIN = frozenset({408, 409, 425, 429})
"""Statuses below 500 after which a request is sent again."""
_LONGEST_BACKOFF, _LONGEST_WAIT = 60.0, 600.0
"""Seconds: of a wait by itself, and of one that the endpoint asks for."""
_LARGEST_REPLY = 4 * 2**20
"""Bytes."""
_LOSSLESS = 256 * 256
"""Pictures up to so many pixels are sent as PNG, larger ones as JPEG."""
_HOPELESS = 8
"""Refusals after which, with no reply among them, the settings are to blame and not the records."""
_SECRET = 8
"""Keys from this length on are taken out of texts; shorter ones, such as EMPTY, are words."""


@dataclass(frozen=True)
class _Failure:
    """An attempt that is worth another. after: seconds that the endpoint asks to wait."""

    what: str
    after: float = 0.0


class _Stopped(Exception):
    """Another question has ended the work."""


class Endpoint:
    """An `Asker` over HTTP. Several processes divide concurrency and rate between them.

    Raises ConfigError without httpx2 or with settings that cannot be; `ask` raises StageError where the endpoint refuses the key, has no
    such model, or has not answered a question after all repetitions (with `allow_missing` that question has no reply). What had come
    until then is kept.
    """

    def __init__(self, options: AskedConfig, surroundings: Surroundings) -> None:
        self._options, self._endpoint, self._where = options, options.endpoint, options.where
        self._allow_missing = surroundings.allow_missing
        self._httpx = _httpx()
        self._key = _key(options)
        endpoint, share = options.endpoint, ranks.world_size()
        self.identity: Mapping[str, Any] = {
            "judge": endpoint.model,
            "max_image_side": endpoint.max_image_side,
            "parameters": endpoint.parameters,
            "json_schema": endpoint.json_schema,
        }
        self._threads = max(1, endpoint.concurrency // share)
        self._stop = threading.Event()
        self._pace = _Pace(None if endpoint.requests_per_minute is None else endpoint.requests_per_minute / share, self._stop)
        self._url = f"{endpoint.url.rstrip('/')}/chat/completions"
        self._client = self._httpx.Client(
            headers={"Content-Type": "application/json", **({"Authorization": f"Bearer {self._key}"} if self._key else {})},
            timeout=endpoint.timeout,
            limits=self._httpx.Limits(max_connections=self._threads),
        )
        self._encoded = functools.lru_cache(maxsize=4 * self._threads)(self._data_urls)
        self._lock = threading.Lock()
        self._answered, self._refused = 0, 0

    def ask(self, questions: Sequence[Question], keep: Keep) -> None:
        if not questions:
            return
        self._stop.clear()
        with ThreadPoolExecutor(min(self._threads, len(questions)), thread_name_prefix="judge") as pool:
            futures = [pool.submit(self._one, question, keep) for question in questions]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                # Replies that are under way were paid for, so they are waited for and kept.
                self._stop.set()
                for future in futures:
                    future.cancel()
                raise

    def close(self) -> None:
        self._client.close()

    def _one(self, question: Question, keep: Keep) -> None:
        body = json.dumps(self._body(question), ensure_ascii=False).encode()
        last, failure = self._endpoint.retries, _Failure("")
        for attempt in range(last + 1):
            self._pace.wait()
            if self._stop.is_set():
                raise _Stopped
            found = self._send(body)
            if isinstance(found, Reply):
                self._count(found)
                keep(question.key, question.id, replace(found, requests=attempt + 1))
                return
            failure = found
            if attempt < last:
                self._back_off(failure, attempt)
        what = f"record {question.id}: the judge at {self._url} did not answer after {last + 1} requests ({failure.what})"
        if not self._allow_missing:
            raise StageError(f"{what}; all replies so far are kept, and the same command continues; or {ALLOW}")
        keep(question.key, question.id, Reply(text=None, problem=what, reason=NO_REPLY, requests=last + 1))

    def _back_off(self, failure: _Failure, attempt: int) -> None:
        own = min(_LONGEST_BACKOFF, self._endpoint.backoff * 2.0**attempt) * random.uniform(0.5, 1.0)
        seconds = max(own, min(failure.after, _LONGEST_WAIT))
        if failure.after:
            # It is meant for all requests with this key.
            self._pace.hold(min(failure.after, _LONGEST_WAIT))
        if seconds >= 10:
            logger.warning("the judge at %s: %s; asked again in %d s", self._url, failure.what, seconds)
        self._stop.wait(seconds)

    def _count(self, reply: Reply) -> None:
        with self._lock:
            self._answered += reply.text is not None
            self._refused += reply.text is None
            hopeless = not self._answered and self._refused >= _HOPELESS
        if hopeless:
            raise StageError(
                f"the judge at {self._url} refused the first {_HOPELESS} questions ({reply.problem}); mend {self._where}.endpoint.model "
                f"and .parameters, or rate.images for a judge that takes no pictures; then --restart {self._where.partition('.')[0]}"
            )

    def _send(self, body: bytes) -> Reply | _Failure:
        try:
            status, headers, data = self._exchange(body)
        except TimeoutError:
            return _Failure(f"no reply within {self._endpoint.timeout:g} s")
        except (self._httpx.RequestError, self._httpx.StreamError) as error:
            return _Failure(self._clean(f"{type(error).__name__}: {error}"))
        if status in _AGAIN or status >= 500:
            return _Failure(f"status {status}", _retry_after(headers))
        said = self._clean(" ".join(data.decode(errors="replace").split()))[:300]
        if status in (401, 403):
            # What it says may hold a part of the key.
            name = self._endpoint.key_env
            state = "which is set" if self._key else "which is not set"
            raise StageError(
                f"the judge at {self._url} refused access (status {status}); the key is read from the environment variable {name}, {state}"
            )
        if status in (404, 405) or 300 <= status < 400:
            raise StageError(
                f"the judge at {self._url} answered with status {status} ({said}); mend {self._where}.endpoint.url or .model"
            )
        if status != 200:
            return Reply(text=None, problem=f"refused with status {status}: {said}", reason="refused")
        try:
            return self._read(json.loads(data))
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
            return _Failure(f"status 200 with something that is no chat completion: {said[:120]!r}")

    def _exchange(self, body: bytes) -> tuple[int, Mapping[str, str], bytes]:
        """Status, headers and content. TimeoutError: also where it comes bit by bit and takes longer in all."""
        end, parts, size = time.monotonic() + self._endpoint.timeout, [], 0
        try:
            with self._client.stream("POST", self._url, content=body) as response:
                for part in response.iter_bytes():
                    parts.append(part)
                    size += len(part)
                    if time.monotonic() > end:
                        raise TimeoutError
                    if size > _LARGEST_REPLY:
                        break
        except self._httpx.TimeoutException:
            raise TimeoutError from None
        return response.status_code, response.headers, b"".join(parts)

    def _read(self, completion: Any) -> Reply:
        choice = completion["choices"][0]
        content = choice["message"].get("content")
        if isinstance(content, list):
            content = "".join(str(part.get("text") or "") for part in content)
        if not isinstance(content, str | None):
            raise TypeError
        usage = completion.get("usage") or {}
        tokens = {name: usage[name] for name in ("prompt_tokens", "completion_tokens") if isinstance(usage.get(name), int)}
        return Reply(text=self._clean(content or ""), cut=choice.get("finish_reason") == "length", **tokens)

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

    def _clean(self, text: str) -> str:
        return text.replace(self._key, "***") if len(self._key) >= _SECRET else text


class _Pace:
    """When the next request may go: evenly, at most so many a minute, and not before the endpoint allows."""

    def __init__(self, per_minute: float | None, stop: threading.Event) -> None:
        self._every = 0.0 if per_minute is None else 60.0 / per_minute
        self._lock, self._stop, self._next = threading.Lock(), stop, 0.0

    def wait(self) -> None:
        while not self._stop.is_set():
            with self._lock:
                now = time.monotonic()
                if now >= self._next:
                    self._next = now + self._every
                    return
                seconds = self._next - now
            self._stop.wait(seconds)

    def hold(self, seconds: float) -> None:
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)


def data_url(image: Image.Image, longest: int) -> str:
    """A picture as a `data:` URL: its longer side at most `longest` pixels, re-encoded, so that nothing else of the file is sent."""
    scale = longest / max(image.size)
    if scale < 1:
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.LANCZOS)
    if image.width * image.height <= _LOSSLESS:
        return f"data:image/png;base64,{base64.b64encode(png_bytes(image)).decode()}"
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=92)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def check_endpoint(options: AskedConfig) -> None:
    """Raise ConfigError for settings of an endpoint that cannot be, before anything is asked."""
    _httpx()
    _key(options)
    if not options.endpoint.model:
        raise ConfigError(
            f"{options.where}.endpoint.model: expected the model's name at the endpoint, got none; GET .../v1/models lists them"
        )


def _httpx() -> Any:
    try:
        import httpx2
    except ImportError:
        raise ConfigError(
            "a judge behind an endpoint needs httpx2, which is not installed; pip install 'mmdpo-kernels[judge]'"
        ) from None
    return httpx2


def _key(options: AskedConfig) -> str:
    key = os.environ.get(options.endpoint.key_env, "").strip()
    if not key.isascii() or not key.isprintable():
        raise ConfigError(
            f"{options.where}.endpoint.key_env: the environment variable {options.endpoint.key_env} holds characters that no key has; set it "
            "again"
        )
    return key


def _retry_after(headers: Mapping[str, str]) -> float:
    """Seconds, from `Retry-After`: a number or a date."""
    said = headers.get("retry-after", "").strip()
    try:
        return max(0.0, float(said))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(said).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0.0
