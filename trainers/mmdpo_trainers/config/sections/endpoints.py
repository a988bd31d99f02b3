"""How an OpenAI-compatible endpoint is asked: what a judge's and a generating server's settings share."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import StrictFloat, StrictInt, StrictStr

from mmdpo_trainers.config.options import option
from mmdpo_trainers.config.values import Finite, Settings
from mmdpo_trainers.errors import ConfigError

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")


@dataclass(kw_only=True)
class AccessConfig(Settings):
    """The key, how many requests at a time, and what is done where one fails."""

    key_env: StrictStr = option(
        "OPENAI_API_KEY", "environment variable that holds the API key; the key itself is written nowhere", result=False
    )
    concurrency: StrictInt = option(8, "requests under way at a time", ge=1, result=False)
    requests_per_minute: StrictFloat | None = option(None, "at most this many; None: no limit", gt=0, result=False)
    timeout: StrictFloat = option(120.0, "seconds that one request may take", gt=0, result=False)
    retries: StrictInt = option(
        6, "times a request is sent again after a 408, 409, 425, 429, a 5xx or no reply", ge=0, result=False
    )
    backoff: StrictFloat = option(
        1.0,
        "seconds before the first repetition, doubled each time up to 60; Retry-After is followed where it is longer",
        ge=0,
        result=False,
    )


def check_key_env(name: str, setting: str) -> None:
    """Raise ConfigError for what is no name of an environment variable. It does not repeat what was given: that may be a key."""
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{setting}: expected the name of an environment variable, such as OPENAI_API_KEY; a key itself is never put into a configuration"
        )


def check_url(url: str, setting: str, key_setting: str) -> None:
    """Raise ConfigError for what is no bare address. It does not repeat what was given: a key may be in it."""
    scheme, _, rest = url.partition("://")
    if scheme not in ("http", "https") or not rest or "@" in rest or "?" in rest or "#" in rest:
        raise ConfigError(
            f"{setting}: expected http(s)://HOST[:PORT]/PATH without user, password, query and fragment; a key goes into the "
            f"environment variable that {key_setting} names"
        )


@dataclass(kw_only=True)
class ServerConfig(AccessConfig):
    """Servers of the run's model with OpenAI's `/chat/completions`, such as vLLM's, that answer the prompts."""

    urls: list[StrictStr] = option(
        help="base URLs, up to and without /chat/completions; requests go to the one with the fewest under way",
        factory=lambda: ["http://localhost:8000/v1"],
        result=False,
    )
    model: StrictStr = option("", "the model's name there; empty: the one that they serve", result=False)
    prompts: Literal["messages", "rendered"] = option(
        "messages",
        "messages: the server's chat template makes the prompt; rendered: it is sent as it is to be read, to a server whose template leaves it "
        "so",
        when="rendered where the two differ, which the first answers say: LLaVA-1.5's template takes pictures out of their places",
    )
    concurrency: StrictInt = option(64, "requests under way at a time, for each address", ge=1, result=False)
    timeout: StrictFloat = option(
        600.0, "seconds that one request may take, those included in which it waits in the server", gt=0, result=False
    )
    parameters: Finite[dict[StrictStr, Any]] = option(
        help="more fields of the request's body; null leaves one out that is sent otherwise, such as logprobs or return_token_ids",
        factory=dict,
    )

    def __post_init__(self) -> None:
        check_key_env(self.key_env, "generate.server.key_env")
        if not self.urls or len(set(self.urls)) != len(self.urls):
            raise ConfigError(f"generate.server.urls: expected one or more, each once, got {len(self.urls)}")
        for url in self.urls:
            check_url(url, "generate.server.urls", "generate.server.key_env")
