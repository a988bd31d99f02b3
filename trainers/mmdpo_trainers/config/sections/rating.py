"""Who rates answers, and how the judge is asked."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import StrictBool, StrictFloat, StrictInt, StrictStr

from mmdpo_trainers.config.options import MATCH_WORDS, Match, option
from mmdpo_trainers.config.values import Finite, Settings
from mmdpo_trainers.errors import ConfigError

ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
"""What answers are rated on in arXiv 2402.10884, each from 0 to 4."""

Fact = Literal["answer", "caption", "options"]
"""A field of a record that a judge may be told."""

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")


@dataclass(kw_only=True)
class EndpointConfig(Settings):
    """A judge behind an OpenAI-compatible endpoint (`/chat/completions`)."""

    url: StrictStr = option("http://localhost:8000/v1", "base URL, up to and without /chat/completions", result=False)
    model: StrictStr = option("", "the model's name there")
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
    max_image_side: StrictInt = option(1024, "pictures are sent with their longer side at most this long, in pixels", ge=16)
    parameters: Finite[dict[StrictStr, Any]] = option(
        help="fields of the request's body beside model, messages and max_tokens, such as temperature, seed; null leaves a field out",
        factory=lambda: {"temperature": 0},
    )
    json_schema: StrictBool = option(
        False, "send the form of the reply as response_format: fewer malformed replies, where the server takes it"
    )

    def __post_init__(self) -> None:
        # Neither message repeats what was given: it may be a key.
        if not _NAME.fullmatch(self.key_env):
            raise ConfigError(
                "endpoint.key_env: expected the name of an environment variable, such as OPENAI_API_KEY; a key itself is never put "
                "into a configuration"
            )
        scheme, _, rest = self.url.partition("://")
        if scheme not in ("http", "https") or not rest or "@" in rest or "?" in rest or "#" in rest:
            raise ConfigError(
                "endpoint.url: expected http(s)://HOST[:PORT]/PATH without user, password, query and fragment; a key goes into the "
                "environment variable that endpoint.key_env names"
            )


def _changing_ratings(endpoint: Any) -> dict[str, Any]:
    """Which of an endpoint's settings may change a rating: not where it is, nor how often and fast it is asked."""
    names = ("model", "max_image_side", "parameters", "json_schema")
    return {name: getattr(endpoint, name) for name in names}


@dataclass(kw_only=True)
class AskedConfig(Settings):
    """A model that is asked in words: what ratings and judged benchmarks share."""

    judge: StrictStr | None = option(None, "not with `source: endpoint`: local Hugging Face folder of what rates", path=True)
    engine: Literal["transformers", "vllm"] = option("transformers", "`source: model` only: what runs it")
    engine_args: Finite[dict[StrictStr, Any]] = option(help="`engine: vllm` only: arguments of vllm.LLM", factory=dict)
    endpoint: EndpointConfig = option(
        help="`source: endpoint` only: where the judge is and how it is asked", factory=EndpointConfig, result=_changing_ratings
    )
    batch_size: StrictInt = option(16, "records rated together, and lost at most by a kill", ge=1)
    max_new_tokens: StrictInt = option(256, "longest reply of the judge, in tokens", ge=1)
    tries: StrictInt = option(3, "times that a judge is asked for a rating in all, where its replies are none", ge=1)
    replies: StrictStr | None = option(
        None, "a judge's replies.jsonl of another run, of which nothing is asked again", path=True, result=False
    )

    @property
    def source(self) -> str:
        """Who is asked: `endpoint` and `model` are what this section is about."""
        raise NotImplementedError

    @property
    def where(self) -> str:
        """What the section is called, for error messages."""
        raise NotImplementedError


@dataclass(kw_only=True)
class JudgeConfig(AskedConfig):
    """Who judges answers to benchmarks."""

    source: Literal["none", "endpoint", "model"] = option(
        "none", "none: nobody; endpoint: a judge behind an OpenAI-compatible endpoint; model: a judge in a local model folder"
    )
    templates: dict[StrictStr, StrictStr] = option(
        help="benchmark -> a jinja2 file of your own in place of the judge's built-in prompt", factory=dict, path=True
    )

    @property
    def where(self) -> str:
        return "evaluate.judge"


def changing_judgements(judge: JudgeConfig) -> dict[str, Any]:
    """Which of a judge's settings may change what it says; a local model and templates count by what is in them."""
    names = ("source", "engine", "engine_args", "max_new_tokens", "tries")
    found = {name: getattr(judge, name) for name in names}
    return {**found, "templates": sorted(judge.templates), "endpoint": _changing_ratings(judge.endpoint)}


@dataclass(kw_only=True)
class RateConfig(AskedConfig):
    """Ratings of answers: from a file, from the truth, or from a judge."""

    input: StrictStr | None = option(None, "your own responses .jsonl in place of generate/responses.jsonl", path=True)
    source: Literal["exact", "file", "endpoint", "model", "reward_model"] = option(
        "exact",
        "exact: agreement with the record's answer; file: ratings of your own; endpoint: a judge behind an OpenAI-compatible endpoint; "
        "model: a judge in a local model folder; reward_model: a model with a scalar head",
    )
    attributes: list[StrictStr] = option(help="what answers are rated on", factory=lambda: list(ATTRIBUTES))
    lowest: StrictFloat = option(0.0, "lowest rating")
    highest: StrictFloat = option(4.0, "highest rating")
    match: Match = option("contains", f"`source: exact` only: how an answer is compared with the truth; {MATCH_WORDS}")
    file: StrictStr | None = option(
        None, "`source: file` only: .jsonl with `id` and `ratings`, a mapping of attributes to numbers for each answer", path=True
    )
    template: StrictStr | None = option(None, "the judge's prompt, a jinja2 file of your own; None: the built-in one", path=True)
    facts: list[Fact] = option(
        help="what the judge is told beside question and answer, of a record's fields: answer (the truth), caption, options",
        factory=list,
    )
    comparison_template: StrictStr | None = option(
        None, "the prompt that has the judge compare two answers, for `check`; None: the built-in one", path=True
    )
    images: StrictBool = option(True, "whether the judge sees the pictures; False: it goes by the facts")
    check: StrictInt = option(
        100, "number of pairs on which the rater is tried: does it rate the better answer higher; 0: none", ge=0
    )
    check_pairs: StrictStr | None = option(
        None,
        "preference data with TRL's columns for `check`; None: the records' own answers against wrong ones",
        path=True,
    )

    def __post_init__(self) -> None:
        if not self.attributes or len(set(self.attributes)) != len(self.attributes):
            raise ConfigError(f"rate.attributes: expected one or more, each once, got {self.attributes}")
        if not self.lowest < self.highest:
            raise ConfigError(f"rate.highest: expected more than rate.lowest, {self.lowest}, got {self.highest}")

    @property
    def where(self) -> str:
        return "rate"
