"""vLLM's server, as `engine: server` uses it, over a small model: what it makes of a request, for `JudgeServer` to send.

It renders messages by the model's chat template (or leaves one text as it is, as a server with such a template), opens `data:` URLs, and gives
what vLLM's `/chat/completions` gives with the fields that the request asks for. What vLLM itself would answer is not shown by it.
"""

from __future__ import annotations

import base64
import io
import json
import threading
from pathlib import Path
from typing import Any

import vllm_double
from judge_server import Asked, Said
from PIL import Image

TAKEN = {
    *(
        "model",
        "messages",
        "max_tokens",
        "n",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "seed",
        "logit_bias",
        "logprobs",
        "top_logprobs",
    ),
    *("repetition_penalty", "presence_penalty", "frequency_penalty", "stop_token_ids", "ignore_eos", "add_special_tokens"),
    *("return_token_ids", "tools", "chat_template_kwargs", "continue_final_message", "add_generation_prompt"),
}
"""Fields of a request that this stand-in knows; another one is refused."""


class ModelServer:
    """Answers of the model in a folder. as_it_is: its chat template leaves one text as it is. longest: `--max-model-len`."""

    def __init__(self, folder: Path, *, as_it_is: bool = False, longest: int | None = None) -> None:
        self.engine = vllm_double.LLM(str(folder), limit_mm_per_prompt={"image": 8}, max_model_len=longest)
        self.as_it_is, self._lock = as_it_is, threading.Lock()
        self.pictures: list[Image.Image] = []

    def __call__(self, asked: Asked) -> Said:
        body = asked.body
        if unknown := body.keys() - TAKEN:
            return Said(400, f"unknown fields {sorted(unknown)}".encode())
        pictures: list[Image.Image] = []
        messages = [{**message, "content": self._content(message["content"], pictures)} for message in body["messages"]]
        tokenizer = self.engine.loaded.tokenizer
        text = messages[0]["content"][0]["text"] if self.as_it_is else self._rendered(messages, body)
        ids = list(tokenizer(text, add_special_tokens=body["add_special_tokens"]).input_ids)
        params = vllm_double.SamplingParams(
            temperature=body["temperature"], top_p=body["top_p"], n=body.get("n", 1), seed=body.get("seed"), max_tokens=body["max_tokens"],
            stop_token_ids=body.get("stop_token_ids"), ignore_eos=body.get("ignore_eos", False), logprobs=1,
            logit_bias={int(token): bias for token, bias in body.get("logit_bias", {}).items()},
        )  # fmt: skip
        prompt: dict[str, Any] = {"prompt_token_ids": ids, **({"multi_modal_data": {"image": pictures}} if pictures else {})}
        with self._lock:
            self.pictures += pictures
            try:
                [output] = self.engine.generate([prompt], [params])
            except ValueError as error:
                return Said(400, json.dumps({"error": {"message": str(error)}}).encode())
        return Said(body=json.dumps(self._completion(body, output)).encode())

    def _rendered(self, messages: list[dict[str, Any]], body: dict[str, Any]) -> str:
        given = {"add_generation_prompt": True, **(body.get("chat_template_kwargs") or {})}
        given |= {name: body[name] for name in ("tools", "continue_final_message", "add_generation_prompt") if name in body}
        loaded = self.engine.loaded
        return str(loaded.processor.apply_chat_template(messages, tokenize=False, **given))

    @staticmethod
    def _content(content: Any, pictures: list[Image.Image]) -> list[dict[str, Any]]:
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        found = []
        for part in parts:
            if part["type"] == "image_url":
                kind, _, data = part["image_url"]["url"].partition(",")
                assert kind == "data:image/png;base64"
                pictures.append(Image.open(io.BytesIO(base64.b64decode(data))))
                found.append({"type": "image"})
            else:
                found.append(part)
        return found

    def _completion(self, body: dict[str, Any], output: vllm_double.RequestOutput) -> dict[str, Any]:
        tokenizer, choices = self.engine.loaded.tokenizer, []
        for each in output.outputs:
            steps = []
            for token, step in zip(each.token_ids, each.logprobs or (), strict=True):
                best = {"token": "", "logprob": max(top.logprob for top in step.values())}
                steps.append({"token": "", "logprob": step[token].logprob, "top_logprobs": [best]})
            choices.append(
                {
                    "index": each.index,
                    "message": {"role": "assistant", "content": tokenizer.decode(each.token_ids, skip_special_tokens=True)},
                    "finish_reason": each.finish_reason,
                    "logprobs": {"content": steps} if body.get("logprobs") else None,
                    "token_ids": each.token_ids if body.get("return_token_ids") else None,
                }
            )
        return {
            "choices": choices,
            "prompt_token_ids": output.prompt_token_ids if body.get("return_token_ids") else None,
            "usage": {
                "prompt_tokens": len(output.prompt_token_ids),
                "completion_tokens": sum(len(each.token_ids) for each in output.outputs),
            },
        }
