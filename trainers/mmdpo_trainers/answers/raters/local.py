"""A judge in a local model folder, through the same engines as the answers themselves; greedy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmdpo_trainers.answers.config_only import config_only
from mmdpo_trainers.answers.raters.judge import Keep, Question
from mmdpo_trainers.answers.raters.rating import Surroundings
from mmdpo_trainers.answers.raters.replies import Reply
from mmdpo_trainers.config.sections.rating import AskedConfig
from mmdpo_trainers.errors import DataError
from mmdpo_trainers.files.fingerprint import content_hash

if TYPE_CHECKING:
    from mmdpo_trainers.answers.vllm_engine import VllmEngine
    from mmdpo_trainers.models.loaded import LoadedModel


class LocalModel:
    """An `Asker` that loads the model with the first question: a continued stage may have none left."""

    def __init__(self, options: AskedConfig, surroundings: Surroundings) -> None:
        self._options, self._surroundings = options, surroundings
        self._folder = Path(str(options.judge))
        self._texts = config_only(self._folder, surroundings.date).texts
        self._loaded: LoadedModel | None = None
        self._engine: VllmEngine | None = None
        self.identity: Mapping[str, Any] = {"judge": content_hash(self._folder), "dtype": surroundings.dtype}

    def ask(self, questions: Sequence[Question], keep: Keep) -> None:
        for start in range(0, len(questions), self._options.batch_size):
            batch = []
            for question in questions[start : start + self._options.batch_size]:
                try:
                    # Answers may hold tokens of this model's chat format.
                    self._texts.check_prompt(question.id, question.text)
                except DataError as error:
                    keep(question.key, question.id, Reply(text=None, problem=str(error), reason="refused"))
                else:
                    batch.append(question)
            for question, answer in zip(batch, self._answers(batch), strict=True):
                keep(question.key, question.id, _reply(answer))

    def _answers(self, batch: Sequence[Question]) -> list[dict[str, Any]]:
        if not batch:
            return []
        options = self._options
        records = [{"id": each.id, "prompt": each.text, "images": list(each.images)} for each in batch]
        if options.engine == "vllm":
            from mmdpo_trainers.models.encode import load_images

            pictures = [load_images(record) for record in records]
            return self._vllm().generate_responses(records, max_new_tokens=options.max_new_tokens, pictures=pictures)
        from mmdpo_trainers.answers.transformers_engine import generate_responses
        from mmdpo_trainers.models.loading import load_model

        if self._loaded is None:
            around = self._surroundings
            self._loaded = load_model(self._folder, dtype=around.dtype, device=around.device, date=around.date)
        return generate_responses(self._loaded, records, max_new_tokens=options.max_new_tokens)

    def _vllm(self) -> VllmEngine:
        if self._engine is None:
            from mmdpo_trainers.answers.vllm_engine import VllmEngine

            around = self._surroundings
            self._engine = VllmEngine(
                self._folder,
                dtype=around.dtype,
                device=around.device,
                most_images=around.most_images,
                arguments=self._options.engine_args,
                date=around.date,
                section="rate",
            )
        return self._engine

    def close(self) -> None:
        self._loaded = None
        if self._engine is not None:
            self._engine.close()


def _reply(answer: Mapping[str, Any]) -> Reply:
    return Reply(text=answer["response"], cut=not answer["ended"], completion_tokens=answer["num_tokens"])
