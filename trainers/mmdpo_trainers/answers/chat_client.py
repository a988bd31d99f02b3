"""A client of OpenAI-compatible chat endpoints: many requests at a time, at a bounded rate, over one address or several, repeated where
they fail.

The API key is read from the environment and goes into one header. It is taken out of every text that comes back, and no error has it.
"""

from __future__ import annotations

import base64
import email.utils
import io
import json
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from PIL import Image

from mmdpo_trainers.answers.addresses import Address, Addresses
from mmdpo_trainers.config.sections.endpoints import AccessConfig
from mmdpo_trainers.data.images import png_bytes
from mmdpo_trainers.errors import ConfigError, StageError
from mmdpo_trainers.processes import ranks

logger = logging.getLogger(__name__)

T = TypeVar("T")

_AGAIN = frozenset({408, 409, 425, 429})
"""Statuses below 500 after which a request is sent again."""
_LONGEST_BACKOFF, _LONGEST_WAIT = 60.0, 600.0
"""Seconds: of a wait by itself, and of one that the endpoint asks for."""
_LARGEST_REPLY = 16 * 2**20
"""Bytes."""
_LOSSLESS = 256 * 256
"""Pictures up to so many pixels are sent as PNG, larger ones as JPEG, where no loss is not asked for."""
_SECRET = 8
"""Keys from this length on are taken out of texts; shorter ones, such as EMPTY, are words."""


@dataclass(frozen=True)
class Answered(Generic[T]):
    """What came of a request. requests: times it was sent until this came."""

    value: T
    requests: int


@dataclass(frozen=True)
class Refused:
    """The endpoint will not answer this request, whatever else it answers."""

    problem: str
    requests: int


@dataclass(frozen=True)
class Silent:
    """No answer came, however often it was asked. what: `… did not answer after N requests (…)`."""

    what: str
    requests: int


@dataclass(frozen=True)
class _Failure:
    """An attempt that is worth another. after: seconds that the endpoint asks to wait. gone: nobody is there to answer."""

    what: str
    after: float = 0.0
    gone: bool = False


class Stopped(Exception):
    """Another request has ended the work."""


class ChatClient:
    """Sends requests, each to the address with the fewest under way. Several processes divide concurrency and rate between them.

    urls: base addresses, up to and without `/chat/completions`. who: what errors call the other side. settings: the section of the
    configuration that names it, with `url_setting` in it. kept: what of the work there still is after an error, as a sentence's part.

    Raises ConfigError without httpx2, or where the key cannot be one; `ask` raises StageError where access is refused, or there is no such
    model.
    """

    def __init__(self, urls: Sequence[str], access: AccessConfig, *, who: str, settings: str, url_setting: str = "url") -> None:
        self._access, self._who, self._settings, self._url_setting = access, who, settings, url_setting
        self._httpx = _httpx(settings)
        self._key = _key_of(access, settings)
        share = ranks.world_size()
        self._stop = threading.Event()
        pace = None if access.requests_per_minute is None else access.requests_per_minute / share
        self._pace = Pace(pace, self._stop)
        self.addresses = Addresses(urls, who)
        self.threads = max(1, access.concurrency // share) * len(urls)
        """Requests under way at a time, of this process."""
        self._client = self._httpx.Client(
            headers={"Content-Type": "application/json", **({"Authorization": f"Bearer {self._key}"} if self._key else {})},
            timeout=access.timeout,
            limits=self._httpx.Limits(max_connections=self.threads),
        )

    def each(self, tasks: Sequence[T], do: Callable[[T], None], advance: Callable[[], None] = lambda: None) -> None:
        """`do` every task, in threads, and `advance` in this one after each.

        The first error ends the work; what is under way then is waited for: it may have been paid for.
        """
        if not tasks:
            return
        self._stop.clear()
        with ThreadPoolExecutor(min(self.threads, len(tasks)), thread_name_prefix="chat") as pool:
            futures = [pool.submit(do, task) for task in tasks]
            try:
                for future in as_completed(futures):
                    future.result()
                    advance()
            except BaseException:
                self._stop.set()
                for future in futures:
                    future.cancel()
                raise

    def ask(self, body: Mapping[str, Any], read: Callable[[Any], T]) -> Answered[T] | Refused | Silent:
        """Send one request until it is answered. read: makes something of the completion, or raises ValueError and the like where it is none,
        which is a failure as any other. Raises Stopped where another request has ended the work."""
        data = json.dumps(body, ensure_ascii=False).encode()
        last, failure = self._access.retries, _Failure("")
        address: Address | None = None
        for attempt in range(last + 1):
            self._pace.wait()
            if self._stop.is_set():
                raise Stopped
            with self.addresses.one(unlike=address) as address:
                found = self._send(address, data, read)
                self.addresses.saw(address, found.what if isinstance(found, _Failure) and found.gone else None)
            if isinstance(found, Refused):
                return Refused(found.problem, attempt + 1)
            if not isinstance(found, _Failure):
                return Answered(found.value, attempt + 1)
            failure = found
            if attempt < last and not (failure.gone and self.addresses.another(address)):
                self._back_off(address, failure, attempt)
        assert address is not None
        where = f"{self._who} at {self._full(address)}"
        return Silent(f"{where} did not answer after {last + 1} requests ({failure.what}){self.addresses.others()}", last + 1)

    def names(self) -> dict[str, list[str] | None]:
        """By address the names of the models that it serves; None where it does not say. Addresses that are not there are left out.

        Raises StageError where none is there, after all repetitions, or one refuses access.
        """
        found: dict[str, list[str] | None] = {}
        for attempt in range(self._access.retries + 1):
            failures = []
            for address in self.addresses.all:
                names = self._names(address)
                if isinstance(names, _Failure):
                    failures.append((address, names))
                else:
                    found[address.url] = names
            if found:
                for address, failure in failures:
                    self.addresses.leave_out(address, failure.what)
                return found
            if attempt < self._access.retries:
                self._back_off(*failures[0], attempt)
        told = "; ".join(f"{address.url}: {failure.what}" for address, failure in failures)
        raise StageError(
            f"{self._settings}.{self._url_setting}: nobody answers there ({told}); start what is to answer, or mend the addresses. "
            "What was done so far is kept, and the same command continues"
        )

    def look_again(self) -> None:
        """Take addresses that were left out back, where they answer again."""
        for address in self.addresses.left_out:
            if not isinstance(self._names(address, timeout=min(5.0, self._access.timeout)), _Failure):
                self.addresses.take_back(address)

    def close(self) -> None:
        self._client.close()

    def clean(self, text: str) -> str:
        """A text without the key."""
        return text.replace(self._key, "***") if len(self._key) >= _SECRET else text

    def _names(self, address: Address, timeout: float | None = None) -> list[str] | None | _Failure:
        try:
            response = self._client.get(f"{address.url}/models", timeout=timeout or self._access.timeout)
            if response.status_code >= 500:
                return _Failure(f"status {response.status_code}", gone=True)
            self._check_access(f"{address.url}/models", response.status_code)
            return [str(each["id"]) for each in response.json()["data"]]
        except self._httpx.HTTPError as error:
            return _Failure(self.clean(f"{type(error).__name__}: {error}"), gone=True)
        except (ValueError, TypeError, KeyError) as error:
            if isinstance(error, StageError):
                raise
            return None

    def _back_off(self, address: Address, failure: _Failure, attempt: int) -> None:
        own = min(_LONGEST_BACKOFF, self._access.backoff * 2.0**attempt) * random.uniform(0.5, 1.0)
        seconds = max(own, min(failure.after, _LONGEST_WAIT))
        if failure.after:
            # It is meant for all requests with this key.
            self._pace.hold(min(failure.after, _LONGEST_WAIT))
        if seconds >= 10:
            logger.warning("%s at %s: %s; asked again in %d s", self._who, self._full(address), failure.what, seconds)
        self._stop.wait(seconds)

    def _send(self, address: Address, body: bytes, read: Callable[[Any], T]) -> Answered[T] | Refused | _Failure:
        try:
            status, headers, data = self._exchange(self._full(address), body)
        except TimeoutError:
            return _Failure(f"no reply within {self._access.timeout:g} s", gone=True)
        except (self._httpx.RequestError, self._httpx.StreamError) as error:
            return _Failure(self.clean(f"{type(error).__name__}: {error}"), gone=True)
        if status in _AGAIN or status >= 500:
            return _Failure(f"status {status}", _retry_after(headers), gone=status >= 500)
        said = self.clean(" ".join(data.decode(errors="replace").split()))[:300]
        self._check_access(self._full(address), status)
        if status in (404, 405) or 300 <= status < 400:
            raise StageError(
                f"{self._who} at {self._full(address)} answered with status {status} ({said}); mend {self._settings}.{self._url_setting} or "
                f"{self._settings}.model"
            )
        if status != 200:
            return Refused(f"refused with status {status}: {said}", 1)
        try:
            return Answered(read(json.loads(data)), 1)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
            return _Failure(f"status 200 with something that is no chat completion: {said[:120]!r}")

    def _check_access(self, url: str, status: int) -> None:
        if status in (401, 403):
            # What it says may hold a part of the key.
            state = "which is set" if self._key else "which is not set"
            raise StageError(
                f"{self._who} at {url} refused access (status {status}); the key is read from the environment variable "
                f"{self._access.key_env}, {state}"
            )

    def _exchange(self, url: str, body: bytes) -> tuple[int, Mapping[str, str], bytes]:
        """Status, headers and content. TimeoutError: also where it comes bit by bit and takes longer in all."""
        end, parts, size = time.monotonic() + self._access.timeout, [], 0
        try:
            with self._client.stream("POST", url, content=body) as response:
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

    @staticmethod
    def _full(address: Address) -> str:
        return f"{address.url}/chat/completions"


class Pace:
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


def data_url(image: Image.Image, longest: int | None = None) -> str:
    """A picture as a `data:` URL, re-encoded, so that nothing else of its file is sent: with its pixels as they are, as PNG.

    longest: its longer side is at most so many pixels, and a large picture may be a JPEG.
    """
    scale = 1.0 if longest is None else longest / max(image.size)
    if scale < 1:
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.LANCZOS)
    if longest is None or image.width * image.height <= _LOSSLESS:
        return f"data:image/png;base64,{base64.b64encode(png_bytes(image)).decode()}"
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=92)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def check_client(access: AccessConfig, settings: str) -> None:
    """Raise ConfigError where no client could be made: httpx2 is not there, or the key cannot be one."""
    _httpx(settings)
    _key_of(access, settings)


def _httpx(settings: str) -> Any:
    try:
        import httpx2
    except ImportError:
        raise ConfigError(f"{settings} needs httpx2, which is not installed; pip install 'mmdpo-kernels[judge]'") from None
    return httpx2


def _key_of(access: AccessConfig, settings: str) -> str:
    """The key that the environment holds; "": none. ConfigError where it has characters that no header can have."""
    key = os.environ.get(access.key_env, "").strip()
    if not key.isascii() or not key.isprintable():
        raise ConfigError(
            f"{settings}.key_env: the environment variable {access.key_env} holds characters that no key has; set it again"
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
