"""Who rates answers, and how the judge is asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import StrictBool, StrictFloat, StrictInt, StrictStr

from mmdpo_trainers.config.options import MATCH_WORDS, Match, option
from mmdpo_trainers.config.sections.endpoints import AccessConfig, check_key_env, check_url
from mmdpo_trainers.config.values import Finite, Settings
from mmdpo_trainers.errors import ConfigError

ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
"""What answers are rated on in arXiv 2402.10884, each from 0 to 4."""

Fact = Literal["answer", "caption", "options"]
"""A field of a record that a judge may be told."""


@dataclass(kw_only=True)
class EndpointConfig(AccessConfig):
    """A judge behind an OpenAI-compatible endpoint (`/chat/completions`)."""

    url: StrictStr = option("http://localhost:8000/v1", "base URL, up to and without /chat/completions", result=False)
    model: StrictStr = option("", "the model's name there")
    max_image_side: StrictInt = option(1024, "pictures are sent with their longer side at most this long, in pixels", ge=16)
    parameters: Finite[dict[StrictStr, Any]] = option(
        help="fields of the request's body beside model, messages and max_tokens, such as temperature, seed; null leaves a field out",
        factory=lambda: {"temperature": 0},
    )
    json_schema: StrictBool = option(
        False, "send the form of the reply as response_format: fewer malformed replies, where the server takes it"
    )

    def __post_init__(self) -> None:
        # It is rate's, or that of a judge of benchmarks.
        check_key_env(self.key_env, "endpoint.key_env")
        check_url(self.url, "endpoint.url", "endpoint.key_env")


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
        "preference data, in any layout of docs/your_data.md, for `check`; None: the records' own answers against wrong ones",
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
