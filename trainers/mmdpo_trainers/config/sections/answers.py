"""How the model answers prompts, and how its attention is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import StrictBool, StrictFloat, StrictInt, StrictStr

from mmdpo_trainers.config.options import Count, option
from mmdpo_trainers.config.sections.endpoints import ServerConfig
from mmdpo_trainers.config.values import Finite, Settings

_HOW_VLLM_RUNS = frozenset(
    {
        *(
            "gpu_memory_utilization",
            "max_model_len",
            "max_num_seqs",
            "max_num_batched_tokens",
            "kv_cache_memory_bytes",
            "block_size",
        ),
        *("tensor_parallel_size", "pipeline_parallel_size", "distributed_executor_backend", "disable_custom_all_reduce"),
        *("enforce_eager", "compilation_config", "enable_prefix_caching", "enable_chunked_prefill", "num_gpu_blocks_override"),
        *(
            "swap_space",
            "cpu_offload_gb",
            "max_parallel_loading_workers",
            "mm_processor_cache_gb",
            "disable_log_stats",
            "use_tqdm_on_load",
        ),
    }
)
"""Arguments of vllm.LLM for memory, speed and lengths. An answer that max_model_len would cut is an error."""


def changing_answers(arguments: dict[str, Any]) -> dict[str, Any]:
    """Those arguments of vllm.LLM that may change answers: all that are not known to leave them alone, such as quantization."""
    return {name: value for name, value in arguments.items() if name not in _HOW_VLLM_RUNS}


def _changing_replies(server: Any) -> dict[str, Any]:
    """Which of a server's settings may change answers: not where it is, nor how often and fast it is asked."""
    return {"prompts": server.prompts, "parameters": server.parameters}


@dataclass(kw_only=True)
class GenerateConfig(Settings):
    """The model's own answers to the prompts."""

    input: StrictStr | None = option(None, "your own prompts .jsonl in place of augment/prompts.jsonl", path=True)
    # Not chosen by what is installed: one configuration means one way to its answers on every machine.
    engine: Literal["transformers", "vllm", "server"] = option(
        "transformers",
        "what generates: transformers, or vllm, which is faster and leaves attention to be measured by score; server: servers of the model that "
        "run already, such as vLLM's",
    )
    server: ServerConfig = option(
        help="`engine: server` only: where they are and how they are asked", factory=ServerConfig, result=_changing_replies
    )
    engine_args: Finite[dict[StrictStr, Any]] = option(
        help="`engine: vllm` only: arguments of vllm.LLM, such as gpu_memory_utilization, max_model_len",
        factory=dict,
        result=changing_answers,
    )
    batch_size: StrictInt = option(
        16,
        "prompts generated together, with num_answers rows each",
        ge=1,
        when="higher, as memory allows; it changes no answer but by rounding",
    )
    max_new_tokens: StrictInt = option(
        64,
        "longest answer, in tokens",
        ge=1,
        when="as long as the answers of your data; a longer answer is cut there",
    )
    num_answers: StrictInt = option(
        1,
        "answers to each prompt, which are then to be rated; above 1 they are sampled, and no attention is recorded",
        ge=1,
        when="more answers leave more pairs, and take as much longer",
    )
    do_sample: StrictBool = option(False, "sample the answers; False: greedy")
    temperature: StrictFloat = option(
        1.0,
        "sampling temperature",
        gt=0,
        when="higher where the answers to a prompt are all alike",
    )
    top_p: StrictFloat = option(1.0, "nucleus sampling: smallest set of tokens with this probability", gt=0, le=1)
    noise: Literal["none", "paper", "official_code"] = option(
        "none",
        "noise on the pictures the answers are given to; training sees clean ones",
        when="none asks for the answers that the model really gives; paper makes more of them wrong",
    )
    record_attention: StrictBool = option(
        True,
        "`engine: transformers` only: record attention ratios while generating (with noise: on the noisy pictures, as MIA-DPO's "
        "code), so that score needs no pass",
    )


@dataclass(kw_only=True)
class ScoreConfig(Settings):
    """Attention ratio of each answer: how much of the attention on pictures goes to the asked-about one."""

    input: StrictStr | None = option(None, "your own responses .jsonl in place of generate/responses.jsonl", path=True)
    batch_size: StrictInt = option(16, "prompts scored together", ge=1)
    layer: Count | Literal["all", "best"] | None = option(
        None,
        "decoder layer, 0-based; None: the middle one (16 of 32); all: record every layer in the same pass, say at which the ratio tells right "
        "answers from wrong ones, and go by the middle one; best: the same, and go by the layer that does it best",
        when="`mmdpo calibrate` finds the layer that tells right answers from wrong ones, or says that none does",
    )
    best_by: Literal["all", "format"] = option(
        "all", "`layer: best` only: one layer for all formats, or each format its own where it has answers enough to choose by"
    )
    statistic: Literal["mass", "mean"] = option("mass", "attention summed over a picture's tokens, or averaged (official code)")
    regions: Literal["box", "official_code"] = option("box", "grid and pip: the exact box, or the official code's rectangle")
    drop_first_row: StrictBool = option(
        False, "leave out the row that predicts the first answer token, as the official code does"
    )

    @property
    def recording(self) -> dict[str, Any]:
        """What recorded attention depends on; `statistic` is applied afterwards, and a layer chosen."""
        return {"layer": self.layer, "regions": self.regions, "drop_first_row": self.drop_first_row}
