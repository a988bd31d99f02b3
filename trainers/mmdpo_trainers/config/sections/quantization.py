"""The base model in 4 bits (QLoRA)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from pydantic import StrictBool, StrictStr

from mmdpo_trainers.config.options import option
from mmdpo_trainers.config.values import Settings
from mmdpo_trainers.errors import ConfigError


@dataclass(kw_only=True)
class QuantizationConfig(Settings):
    """How the base model's weights are quantised while it is loaded: names of transformers' `BitsAndBytesConfig`, values of the QLoRA paper
    (arXiv 2305.14314). Vision tower, projector, embeddings and head always stay whole."""

    load_in_4bit: StrictBool = option(
        False, "quantise the linear layers of the language tower to 4 bits; adapters are trained on them"
    )
    load_in_8bit: StrictBool = option(False, "only false: LLM.int8 rounds a sequence by what else is in its batch")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = option(
        "nf4", "the 16 values of a weight: normal-distributed (nf4) or a 4-bit float"
    )
    bnb_4bit_use_double_quant: StrictBool = option(True, "quantise the scales of the weights' blocks too")
    bnb_4bit_compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "number type of the products with quantised weights; auto: the model's own"
    )
    llm_int8_skip_modules: list[StrictStr] = option(
        help="modules of the language tower that stay whole too, by name or the end of one", factory=list
    )

    def __post_init__(self) -> None:
        if self.load_in_8bit:
            raise ConfigError(
                "quantization.load_in_8bit: expected false, got true: LLM.int8 takes whole columns of a batch out of its rounding, so a "
                "sequence's log-probabilities depend on what it is packed with; set load_in_4bit"
            )
        given = [name for name, value in vars(self).items() if value != _DEFAULTS[name]]
        if given and not self.load_in_4bit:
            raise ConfigError(f"quantization.{given[0]}: it does nothing without quantization.load_in_4bit: true; set that too")


_DEFAULTS = {
    each.name: each.default_factory() if each.default_factory is not dataclasses.MISSING else each.default
    for each in dataclasses.fields(QuantizationConfig)
}
