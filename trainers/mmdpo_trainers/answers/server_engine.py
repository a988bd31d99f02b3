"""Answers by servers of the model that run already, such as vLLM's: the same prompts, pictures and fields as `generate_responses`, without
recorded attention.

Each answer is on disk as it comes. The server makes the prompt's tokens: where it says which they are, the first prompt of each number of
pictures is compared with this project's own, as scoring and training read it.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from mmdpo_trainers.answers.chat_client import Answered, ChatClient, Refused, check_client, data_url
from mmdpo_trainers.answers.config_only import config_only
from mmdpo_trainers.answers.kept_answers import KeptAnswers
from mmdpo_trainers.answers.response import response_of, several_responses
from mmdpo_trainers.config.run_config import RunConfig
from mmdpo_trainers.config.sections.endpoints import ServerConfig
from mmdpo_trainers.data.conversation import Conversation, conversation_of
from mmdpo_trainers.data.records import IMAGE_TOKEN
from mmdpo_trainers.errors import ConfigError, StageError
from mmdpo_trainers.models.chat_format import chat_of, typed_parts
from mmdpo_trainers.models.encode import encode_prompts, refuse_images
from mmdpo_trainers.models.template_date import TemplateDate

logger = logging.getLogger(__name__)

Record = Mapping[str, Any]
Pictures = Callable[[Record], Sequence[Image.Image]]
"""A record's pictures as the model is to see them: made where they are sent, so that few are in memory."""

_NEVER, _COLDEST = -100.0, 0.01
"""Of vLLM: the lowest bias that it takes for a token, and the temperature that it takes in place of a lower one."""
_KEPT = "all answers so far are kept, and the same command continues"


def check_server(config: RunConfig) -> None:
    """Raise ConfigError where httpx2 is not there, or for settings that a server would not follow. Nothing is asked."""
    options = config.generate
    check_client(options.server, "generate.server")
    if options.do_sample and options.temperature < _COLDEST:
        raise ConfigError(
            f"generate.temperature: vLLM samples at {_COLDEST} or more, got {options.temperature}; raise it, or set generate.do_sample to false"
        )
    if config.quantization.load_in_4bit:
        raise ConfigError(
            "generate.engine: a server answers with the weights it was started with, and quantization trains the model in 4 bits; set "
            "generate.engine to transformers"
        )


class ServerEngine:
    """Servers of the model in `folder`, of which only what is no weight is read here.

    kept: the folder for answers that have come and are in no stage's file yet. date: as in `load_model`.
    """

    def __init__(self, folder: Path, options: ServerConfig, *, kept: Path, date: TemplateDate | None = None) -> None:
        self.config_only = config_only(folder, date)
        self._options = options
        self._client = ChatClient(options.urls, options, who="the server", settings="generate.server", url_setting="urls")
        self._kept = KeptAnswers(kept)
        self._model = ""
        self._lock = threading.Lock()
        self._checked: set[int] = set()
        self._said: set[str] = set()
        family = self.config_only.family
        if family.other_in_vllm is not None:
            self._say(
                f"family {family.name!r}: vLLM gives {family.other_in_vllm} (docs/generation.md); where the server is one, set generate.engine "
                "to transformers"
            )

    def generate_responses(
        self,
        records: Sequence[Record],
        *,
        max_new_tokens: int,
        do_sample: bool,
        temperature: float,
        top_p: float,
        seeds: Sequence[int],
        pictures: Pictures,
        num_answers: int = 1,
        advance: Callable[[int], None] = lambda count: None,
    ) -> list[dict[str, Any]]:
        """Answer a batch; returns per record what `response_of` does, or with `num_answers` above 1 `several_responses`.

        Where the server gives no log-probabilities or no token ids, `perplexity` is None, and where no token ids, `response_ids` are those of
        the text. seeds: one a record, where the answers are sampled. advance: told of answers that are there.
        """
        warped = {"temperature": temperature, "top_p": top_p} if do_sample else {"temperature": 0.0, "top_p": 1.0}
        common = {"max_tokens": max_new_tokens, **warped, **({"n": num_answers} if num_answers > 1 else {})}
        self._kept.settle()
        missing = [place for place, record in enumerate(records) if record["id"] not in self._kept]
        advance(len(records) - len(missing))
        if missing:
            self._begin()

        def answer(place: int) -> None:
            record, seeded = records[place], {"seed": seeds[place]} if do_sample else {}
            answers = self._ask(record, pictures(record), {**common, **seeded}, num_answers)
            self._kept.add(record["id"], several_responses(answers) if num_answers > 1 else answers[0])

        self._client.each(missing, answer, lambda: advance(1))
        return [self._kept.take(record["id"]) for record in records]

    def close(self) -> None:
        self._client.close()
        self._kept.close()

    def _begin(self) -> None:
        """Find out the model's name there, and have back who was left out."""
        if self._model:
            self._client.look_again()
            return
        asked = self._options.model
        for url, names in self._client.names().items():
            if names is None and not asked:
                raise StageError(f"generate.server.model: {url} does not say what it serves; give the model's name there")
            expected = asked or self._model
            if names is not None and (expected not in names if expected else len(names) != 1):
                raise StageError(
                    f"generate.server.model: expected {repr(expected) if expected else 'one model'} at {url}, which serves "
                    f"{', '.join(names) or 'none'}; give the name of {self.config_only.path.name} there, or mend generate.server.urls"
                )
            self._model = expected or str(names[0] if names else "")

    def _ask(self, record: Record, row: Sequence[Image.Image], settings: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
        body = {**self._body(record, row), **settings, **self._options.parameters}
        found = self._client.ask({name: value for name, value in body.items() if value is not None}, _read)
        if isinstance(found, Refused):
            refuse_images(self.config_only, [record], [row])
            raise StageError(
                f"record {record['id']}: the server {found.problem}; mend what the server was started with (--max-model-len, "
                f"--limit-mm-per-prompt), or generate.server.parameters; {_KEPT}"
            )
        if not isinstance(found, Answered):
            raise StageError(f"record {record['id']}: {found.what}; {_KEPT} with any of generate.server.urls")
        completion = found.value
        with self._lock:
            if len(row) not in self._checked:
                self._check_prompt(record, row, completion)
        choices = sorted(completion["choices"], key=lambda choice: choice.get("index", 0))
        if len(choices) != count:
            raise StageError(
                f"record {record['id']}: expected {count} answers of the server, got {len(choices)}; it does not follow `n`"
            )
        return [self._response(record, choice, settings["max_tokens"]) for choice in choices]

    def _body(self, record: Record, row: Sequence[Image.Image]) -> dict[str, Any]:
        described, conversation = self.config_only, conversation_of(record)
        image_token, bias = described.image_token_id, {}
        if image_token < described.model.config.get_text_config().vocab_size:
            # A generated image token would ask for a picture when the answer is scored.
            bias = {"logit_bias": {str(image_token): _NEVER}}
        rendered = described.texts.rendered(record["id"], conversation)
        images = iter([{"type": "image_url", "image_url": {"url": data_url(picture)}} for picture in row])
        if self._options.prompts == "rendered":
            prompt: dict[str, Any] = {"messages": [{"role": "user", "content": [{"type": "text", "text": rendered}, *images]}]}
        else:
            prompt = self._conversation(conversation, images)
        return {
            "model": self._model,
            **prompt,
            # What the tokenizer puts in front of a text, chat templates do not.
            "add_special_tokens": bool(described.texts.opening(rendered)),
            # Those of transformers alone: the server's own would have the tokenizer's among them, and settings of generation_config.json.
            "stop_token_ids": sorted(described.end_ids),
            "ignore_eos": True,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            **bias,
            "logprobs": True,
            "top_logprobs": 1,
            "return_token_ids": True,
        }

    def _conversation(self, conversation: Conversation, images: Any) -> dict[str, Any]:
        """The conversation for the server's chat template, pictures in their places."""
        chat = chat_of(self.config_only.processor, self.config_only.date)
        messages = []
        for turn in conversation.turns:
            content: Any = turn.text
            if IMAGE_TOKEN in turn.text:
                parts = (None if chat is None else next(chat.contents(turn.text), None)) or typed_parts(turn.text)
                content = [next(images) if part["type"] == "image" else part for part in parts]
            messages.append({"role": turn.role, "content": content, **turn.extras})
        date = self.config_only.date
        arguments = {**json.loads(date.arguments or "{}"), **json.loads(conversation.arguments or "{}")}
        return {
            "messages": messages,
            **({"tools": json.loads(conversation.tools)} if conversation.tools else {}),
            **({"chat_template_kwargs": arguments} if arguments else {}),
            **({"continue_final_message": True, "add_generation_prompt": False} if conversation.continues else {}),
        }

    def _check_prompt(self, record: Record, row: Sequence[Image.Image], completion: Mapping[str, Any]) -> None:
        expected = encode_prompts(self.config_only, [record], padding_side="left", pictures=[row]).inputs["input_ids"][0].tolist()
        found = completion.get("prompt_token_ids")
        if found is None:
            counted = (completion.get("usage") or {}).get("prompt_tokens")
            beside = (
                f"it counts {counted} tokens in the first, transformers {len(expected)}" if counted else "nor how many they are"
            )
            self._say(
                f"the server does not say which tokens it makes of a prompt ({beside}), so that they cannot be compared with this project's"
            )
        elif found != expected:
            same = next((i for i, both in enumerate(zip(found, expected, strict=False)) if both[0] != both[1]), None)
            where = min(len(found), len(expected)) if same is None else same
            remedy = (
                "set generate.server.prompts to rendered, and start the server with a chat template that leaves a prompt as it is "
                "(docs/generation.md)"
                if self._options.prompts == "messages"
                else "start the server with a chat template that leaves a prompt as it is (docs/generation.md)"
            )
            raise StageError(
                f"record {record['id']}: the server reads the prompt as {len(found)} tokens, transformers as {len(expected)}, and they differ "
                f"from token {where} on; {remedy}, or set generate.engine to transformers"
            )
        self._checked.add(len(row))

    def _response(self, record: Record, choice: Mapping[str, Any], max_new_tokens: int) -> dict[str, Any]:
        ids, reason = choice.get("token_ids"), choice.get("finish_reason")
        steps = (choice.get("logprobs") or {}).get("content")
        if reason not in ("stop", "length") or (
            ids is not None and reason == "stop" and ids[-1:] and ids[-1] not in self.config_only.end_ids
        ):
            raise StageError(
                f"record {record['id']}: expected the server's answer to end with an end token of generation_config.json or at its longest, got "
                f"finish_reason {reason!r} and {ids and ids[-1]} as the last token; {_KEPT}"
            )
        if ids is None:
            return self._of_text(record, choice["message"].get("content") or "", reason == "stop")
        if reason == "length" and len(ids) < max_new_tokens:
            raise StageError(
                f"record {record['id']}: the server cut the answer after {len(ids)} of {max_new_tokens} tokens, because prompt and answer are "
                f"longer than its --max-model-len; start it with a larger one, or lower generate.max_new_tokens; {_KEPT}"
            )
        if steps is None or len(steps) != len(ids):
            self._say(
                "the server gives no log-probabilities of its answers; `score` measures their perplexity by a pass of its own"
            )
            return {**response_of(self.config_only, ids, [0.0] * len(ids)), "perplexity": None}
        # The likeliest token's, and that of the token taken, where it is another.
        logps = [max([step["logprob"], *(top["logprob"] for top in step.get("top_logprobs") or ())]) for step in steps]
        return response_of(self.config_only, ids, logps)

    def _of_text(self, record: Record, text: str, ended: bool) -> dict[str, Any]:
        self._say(
            "the server gives no token ids; those of answers are of their texts, and `score` measures the perplexity by a pass of its own"
        )
        ids = self.config_only.texts.answer(record["id"], "the answer", text)
        return {"response": text.strip(), "response_ids": ids, "num_tokens": len(ids), "ended": ended, "perplexity": None}

    def _say(self, what: str) -> None:
        """Warn once."""
        if what.split(" (")[0] not in self._said:
            self._said.add(what.split(" (")[0])
            logger.warning("%s", what)


def _read(completion: Any) -> dict[str, Any]:
    """The completion as it came. ValueError and the like where it is none."""
    choices = completion["choices"]
    if not choices or not all(isinstance(choice["message"]["content"], str | None) for choice in choices):
        raise TypeError
    return dict(completion)
