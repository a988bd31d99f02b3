"""record_attention against eager attention maps: every kind of cache in `generate`, windows, other masks, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import _widen
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Gemma2Config,
    Gemma3TextConfig,
    GenerationConfig,
    LlamaConfig,
    MistralConfig,
    StaticCache,
)
from transformers.generation import utils as generation_utils

from mmdpo_kernels import patch_model, record_attention, recorder, unpatch_model
from mmdpo_kernels.recorder import steps

PROMPT, STEPS, LAYERS, SEGMENTS = 11, 7, 3, 3
COMMON: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
# A window that drops keys of the prompt, and one that fills up in the middle of generating.
CONFIGS: dict[str, Callable[[], Any]] = {
    "full": lambda: LlamaConfig(**COMMON),
    "sliding": lambda: MistralConfig(**COMMON, sliding_window=4),
    "sliding late": lambda: MistralConfig(**COMMON, sliding_window=14),
    "softcap, every other layer slides": lambda: Gemma2Config(
        **COMMON, head_dim=8, sliding_window=5, query_pre_attn_scalar=8, attn_logit_softcapping=2.0
    ),
    "one layer of three is full": lambda: Gemma3TextConfig(
        **COMMON, head_dim=8, sliding_window=4, layer_types=["sliding_attention", "sliding_attention", "full_attention"]
    ),
}
CACHES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "dynamic": lambda config: {},
    "dynamic, nothing dropped": lambda config: {"past_key_values": DynamicCache()},
    "static": lambda config: {"cache_implementation": "static"},
    "static, longer": lambda config: {"past_key_values": StaticCache(config=config, max_cache_len=40)},
    "none": lambda config: {"use_cache": False},
    "dynamic, prompt in pieces": lambda config: {"prefill_chunk_size": 3},
    "static, prompt in pieces": lambda config: {"prefill_chunk_size": 5, "cache_implementation": "static"},
}


def build(name: str) -> Any:
    model = AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation="eager").eval()
    _widen(model)
    return model


@pytest.fixture(scope="module")
def generated() -> dict[str, Any]:
    """Per model: the eager model's own generation with its maps, each over all tokens so far, since no key is ever dropped."""
    found = {}
    for name in CONFIGS:
        torch.manual_seed(0)
        model = build(name)
        inputs = prompts()
        out = model.generate(
            **inputs, **options(), past_key_values=DynamicCache(), output_attentions=True, return_dict_in_generate=True
        )
        maps = [torch.stack([layer[:, :, -1] for layer in step]) for step in out.attentions]  # each (layers, B, H, tokens)
        found[name] = SimpleNamespace(model=patch_model(model), inputs=inputs, sequences=out.sequences, maps=maps)
    return found


def prompts() -> dict[str, Tensor]:
    """Two prompts, the first with four tokens of padding before it."""
    ids = torch.randint(5, 50, (2, PROMPT), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :4] = ids[0, :4] = 0
    return {"input_ids": ids, "attention_mask": mask}


def options() -> dict[str, Any]:
    return {"max_new_tokens": STEPS, "do_sample": False, "pad_token_id": 0}


def segment_map() -> Tensor:
    """Segments in no order, with tokens of none between them, the last token in one."""
    found = torch.randint(-1, SEGMENTS, (2, PROMPT), generator=torch.Generator().manual_seed(2))
    found[:, -1] = 1
    return found


def masses(maps: Tensor, segments: Tensor) -> Tensor:
    """(..., B, H, tokens) and (B, tokens) -> (..., B, H, N)."""
    one_hot = torch.nn.functional.one_hot(segments + 1, SEGMENTS + 1)[..., 1:].to(maps.dtype)
    return maps[..., : segments.shape[1]] @ one_hot


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_step_of_generate_equals_the_eager_maps(generated: dict[str, Any], name: str, cache: str) -> None:
    case, segments = generated[name], segment_map()
    with record_attention(case.model, segments, None, layers=range(LAYERS), num_segments=SEGMENTS, reduce=None) as recording:
        sequences = case.model.generate(**case.inputs, **options(), **CACHES[cache](case.model.config))
    assert torch.equal(sequences, case.sequences)
    for layer, rows in recording.mass.items():
        assert rows.shape == (2, 4, STEPS, SEGMENTS)
        close(rows, torch.stack([masses(step[layer], segments) for step in case.maps], dim=2))


@pytest.mark.parametrize("cache", ["dynamic", "static", "dynamic, prompt in pieces", "none"])
@pytest.mark.parametrize("name", ["sliding", "one layer of three is full"])
def test_means_and_heat_maps_of_generate(generated: dict[str, Any], name: str, cache: str) -> None:
    case, segments = generated[name], segment_map()
    length = PROMPT + STEPS - 1
    padded = [torch.nn.functional.pad(step.mean(2), (0, length - step.shape[-1])) for step in case.maps]
    heat = torch.stack(padded).mean(0)  # (layers, B, tokens)
    for reduce in ("mean", "tokens"):
        with record_attention(
            case.model, segments, None, layers=range(LAYERS), num_segments=SEGMENTS, reduce=reduce
        ) as recording:
            case.model.generate(**case.inputs, **options(), **CACHES[cache](case.model.config))
        for layer, mass in recording.mass.items():
            close(mass, heat[layer] if reduce == "tokens" else masses(heat[layer][:, None], segments)[:, 0])
            assert recording.counts[layer].tolist() == [STEPS, STEPS]


@pytest.mark.parametrize("cache", ["dynamic", "static", "none"])
def test_end_tokens_of_the_call_end_the_counting(generated: dict[str, Any], cache: str) -> None:
    """Two calls in one recording, the first without an end token; the prompts themselves end with it."""
    case = generated["sliding"]
    end = int(case.sequences[1, PROMPT + 2])
    ids = case.inputs["input_ids"].clone()
    with record_attention(case.model, segment_map(), None, layers=[1]) as recording:
        case.model.generate(**case.inputs, **options())
        out = case.model.generate(**case.inputs, **options(), eos_token_id=[end, 49], **CACHES[cache](case.model.config))
    answers = out[:, ids.shape[1] :].tolist()
    lengths = [answer.index(end) + 1 if end in answer else len(answer) for answer in answers]
    assert min(lengths) < STEPS
    assert recording.counts[1].tolist() == [STEPS + length for length in lengths]
    ids[:, -1] = end
    with record_attention(case.model, segment_map(), None, layers=[1], eos_token_ids=[end]) as recording:
        case.model.generate(input_ids=ids, max_new_tokens=1, prefill_chunk_size=PROMPT - 1)
    assert recording.counts[1].tolist() == [1, 1]


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("covered", ["all tokens", "new tokens"])
def test_continuing_a_cache(generated: dict[str, Any], static: bool, covered: str) -> None:
    """`segments` may cover the tokens that the cache holds already, or begin after them; with `rows` they always begin after them."""
    case, cached = generated["one layer of three is full"], 6
    ids, segments = case.sequences[1:, : PROMPT + 4], segment_map()[1:]
    maps = unpatch_model(case.model)(input_ids=ids, output_attentions=True).attentions
    patch_model(case.model)

    def cache() -> Any:
        found = StaticCache(config=case.model.config, max_cache_len=30) if static else DynamicCache(config=case.model.config)
        with torch.no_grad():
            case.model(input_ids=ids[:, :cached], past_key_values=found)
        return found

    given = segments if covered == "all tokens" else segments[:, cached:]
    begun = cache()
    with record_attention(case.model, given, None, layers=[0, 2], num_segments=SEGMENTS, reduce=None) as recording:
        case.model.generate(input_ids=ids[:, :PROMPT], max_new_tokens=4, do_sample=False, past_key_values=begun, pad_token_id=0)
    whole = segments.clone()
    if covered == "new tokens":
        whole[:, :cached] = -1
    for layer, mass in recording.mass.items():
        close(mass, masses(maps[layer][:, :, PROMPT - 1 : PROMPT + 3], whole))
    rows = torch.arange(cached, PROMPT)[None] > 7
    if covered == "new tokens":
        begun = cache()
        with record_attention(case.model, given, rows, layers=[0, 2], num_segments=SEGMENTS, reduce=None) as recording:
            case.model(input_ids=ids[:, cached:PROMPT], past_key_values=begun)
        for layer, mass in recording.mass.items():
            close(mass, masses(maps[layer][:, :, 8:PROMPT], whole))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["sliding", "softcap, every other layer slides", "one layer of three is full"])
def test_windowed_layers_of_a_whole_forward(
    generated: dict[str, Any], name: str, side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Teacher-forced rows under a window and padding: one call a layer, of the counted rows only."""
    case, calls = generated[name], []
    ids, mask = case.inputs["input_ids"], case.inputs["attention_mask"]
    if side == "right":
        ids, mask = ids.flip(1), mask.flip(1)
    rows = mask.bool() & torch.tensor([4, 5, 8, 10])[None].eq(torch.arange(PROMPT)[:, None]).any(1)
    maps = unpatch_model(case.model)(input_ids=ids, attention_mask=mask, output_attentions=True).attentions
    patch_model(case.model)
    original = recorder.plan.PreparedMass.__call__
    monkeypatch.setattr(
        recorder.plan.PreparedMass, "__call__", lambda self, q, k: (calls.append(q.shape), original(self, q, k))[1]
    )
    with record_attention(case.model, segment_map(), rows, layers=[0, 2], num_segments=SEGMENTS) as recording:
        case.model(input_ids=ids, attention_mask=mask)
    assert calls == [(2, 4, 4, 8)] * 2
    for layer, mass in recording.mass.items():
        counted = (maps[layer].mean(1) * rows[..., None]).sum(1) / rows.sum(1, keepdim=True)
        close(mass, masses(counted[:, None], segment_map())[:, 0])


@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_masks_that_are_no_trees_go_row_by_row(generated: dict[str, Any], kind: str) -> None:
    """Tokens 3 to 6, a picture, see one another both ways."""
    case = generated["full"]
    ids = case.inputs["input_ids"][1:]
    seen = torch.ones(PROMPT, PROMPT, dtype=torch.bool).tril()
    seen[3:7, 3:7] = True
    additive = torch.zeros(PROMPT, PROMPT).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]
    rows = torch.arange(PROMPT)[None].remainder(2) == 0
    maps = unpatch_model(case.model)(input_ids=ids, attention_mask=additive, output_attentions=True).attentions
    patch_model(case.model)
    mask = seen[None, None] if kind == "bool" else additive
    with record_attention(case.model, segment_map()[1:], rows, layers=[1], num_segments=SEGMENTS, reduce=None) as recording:
        case.model(input_ids=ids, attention_mask=mask)
    close(recording.mass[1], masses(maps[1][:, :, rows[0]], segment_map()[1:]))
    with (
        pytest.raises(ValueError, match="must hold 0 and the lowest number only"),
        record_attention(case.model, segment_map()[1:], rows, layers=[1]),
    ):
        case.model(input_ids=ids, attention_mask=additive.clamp(min=-3.0))


def test_layers_that_nobody_asked_for_pay_nothing() -> None:
    """Their tensors are not looked at: there are none here."""
    watching = recorder.AttentionRecorder(segment_map(), None, (1,), SEGMENTS, "mean", False)
    nothing: Any = None
    call = recorder.LayerCall(tree_end=None, mask=None, scale=None, softcap=None, window=None, backend="auto")
    for layer in (0, 2):
        watching.observe(layer, nothing, nothing, call)
    assert watching.mass == {}


@pytest.mark.parametrize("reentrant", [True, False])
def test_training_counts_checkpointed_rows_once(reentrant: bool) -> None:
    model = build("sliding")
    inputs, segments = prompts(), segment_map()
    rows = inputs["attention_mask"] == 1
    maps = model(**inputs, output_attentions=True).attentions
    patch_model(model).train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    with record_attention(model, segments, rows, layers=[0, 1], num_segments=SEGMENTS) as recording:
        for _ in range(2):
            model(**inputs, labels=inputs["input_ids"]).loss.backward()
    for layer, mass in recording.mass.items():
        assert recording.counts[layer].tolist() == (2 * rows.sum(1)).tolist()
        counted = (maps[layer].mean(1) * rows[..., None]).sum(1) / rows.sum(1, keepdim=True)
        close(mass, masses(counted[:, None], segments)[:, 0])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"num_beams": 2}, r"generate\(num_beams=2\) cannot be recorded"),
        ({"num_return_sequences": 3, "do_sample": True}, r"generate\(num_return_sequences=3\)"),
        ({"penalty_alpha": 0.6, "top_k": 4}, r"generate\(penalty_alpha=0.6\)"),
        ({"prompt_lookup_num_tokens": 2}, r"generate\(prompt_lookup_num_tokens=2\)"),
        ({"assistant_model": torch.nn.Identity()}, r"generate\(assistant_model=Identity\)"),
        ({"guidance_scale": 1.5}, r"generate\(guidance_scale=1.5\)"),
        ({"stop_strings": "."}, r"generate\(stop_strings='.'\) ends rows of a batch"),
        ({"stopping_criteria": [lambda ids, scores: False]}, "one prompt at a time, or use eos_token_id"),
        ({"cache_implementation": "paged"}, "cannot be recorded; use 'dynamic' or 'static'"),
    ],
)
def test_ways_to_generate_that_cannot_be_followed(generated: dict[str, Any], how: dict[str, Any], message: str) -> None:
    case = generated["full"]
    with pytest.raises(ValueError, match=message), record_attention(case.model, segment_map(), None, layers=[0]):
        case.model.generate(**case.inputs, **{**options(), **how})
    assert not {"generate", "forward"} & vars(case.model).keys()
    assert not case.model._forward_pre_hooks and not case.model.model._forward_pre_hooks


def test_criteria_that_end_one_prompt_are_followed(generated: dict[str, Any]) -> None:
    case = generated["full"]
    stop = [lambda ids, scores, **kwargs: torch.full((1,), ids.shape[1] >= PROMPT + 3)]
    with record_attention(case.model, segment_map()[:1], None, layers=[0]) as recording:
        case.model.generate(input_ids=case.inputs["input_ids"][1:], stopping_criteria=stop, **options())
    assert recording.counts[0].tolist() == [3]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (PROMPT - 1, "segments cover 10 tokens, the prompt has 11"),
        (PROMPT + 9, "segments cover 20 tokens and the model read 17, .*; seen: 7 forwards of at most 11"),
    ],
)
def test_segments_that_do_not_fit_the_prompt(generated: dict[str, Any], tokens: int, message: str) -> None:
    case = generated["full"]
    segments = torch.zeros(2, tokens, dtype=torch.int32)
    with pytest.raises(ValueError, match=message), record_attention(case.model, segments, None, layers=[0]):
        case.model.generate(**case.inputs, **options())


def test_a_part_of_the_model_called_by_itself(generated: dict[str, Any]) -> None:
    case = generated["full"]
    attention = case.model.model.layers[0].self_attn
    hidden = torch.randn(2, PROMPT, 32)
    turned = case.model.model.rotary_emb(hidden, torch.arange(PROMPT)[None])
    with (
        pytest.raises(ValueError, match="call the model that was given to it, not one of its parts"),
        record_attention(case.model, segment_map(), segment_map() >= 0, layers=[0]),
    ):
        attention(hidden, position_embeddings=turned, attention_mask=None)


def test_a_recording_says_at_its_end_what_it_saw(generated: dict[str, Any]) -> None:
    case, segments = generated["full"], segment_map()
    with (
        pytest.raises(ValueError, match="no forward of the recorded model was seen"),
        record_attention(case.model, segments, segments >= 0, layers=[0]),
    ):
        pass
    shorter = copy.deepcopy(case.model)
    shorter.model.layers = shorter.model.layers[:2]
    message = r"layers \[2\] were asked for and counted nothing; seen: 1 forwards of at most 11 tokens.*0: 1, 1: 1"
    with pytest.raises(ValueError, match=message), record_attention(shorter, segments, segments >= 0, layers=[0, 2]):
        shorter(**case.inputs)
    with pytest.raises(KeyError, match="mine"), record_attention(case.model, segments, segments >= 0, layers=[0]):
        raise KeyError("mine")


def test_a_cache_is_found_wherever_it_is_passed_and_missed_aloud(generated: dict[str, Any]) -> None:
    case, segments = generated["full"], segment_map()
    ids, cache = case.inputs["input_ids"], DynamicCache()
    with torch.no_grad(), record_attention(case.model, segments, None, layers=[0]) as recording:
        case.model.model(ids[:, :5], None, None, cache)
        case.model.model(ids[:, 5:], None, None, cache)
    assert recording.counts[0].tolist() == [1, 1]
    watching = recorder.AttentionRecorder(segments, None, (1,), SEGMENTS, "mean", False)
    watching.begin_generate(())
    watching.before_decoder(0, PROMPT)
    with pytest.raises(ValueError, match="read 1 tokens after 0 in its cache, 11 were read before it: expected one more in all"):
        watching.before_decoder(0, 1)


def test_layers_that_differ_share_nothing(generated: dict[str, Any]) -> None:
    """Every other layer slides: what is prepared for one kind must not serve the other; all at once gives what each gives alone."""
    case = generated["softcap, every other layer slides"]
    ids, mask = case.inputs["input_ids"], case.inputs["attention_mask"]
    patch_model(case.model)
    layers = range(case.model.config.num_hidden_layers)
    rows = mask.bool() & torch.tensor([4, 8, 10])[None].eq(torch.arange(PROMPT)[:, None]).any(1)

    def recorded(wanted: Any) -> dict[int, Any]:
        with record_attention(case.model, segment_map(), rows, layers=wanted, num_segments=SEGMENTS, reduce=None) as recording:
            case.model(input_ids=ids, attention_mask=mask)
        return recording.mass

    together = recorded(layers)
    for layer in layers:
        assert torch.equal(together[layer], recorded([layer])[layer])
    assert len({tuple(mass.sum((0, 1, 2)).tolist()) for mass in together.values()}) == len(layers)


@pytest.mark.parametrize("together", [1, 3, 100])
@pytest.mark.parametrize("reduce", [None, "mean", "tokens"])
def test_steps_that_wait_for_one_another_lose_nothing(
    generated: dict[str, Any], reduce: str | None, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decoding steps are taken several at a time; what is read while some wait has them, and a second prompt does not mix with them."""
    case, calls = generated["full"], []
    monkeypatch.setattr(steps, "_TOGETHER", together)
    original = steps.attention_mass
    monkeypatch.setattr(steps, "attention_mass", lambda q, *a, **k: (calls.append(q.shape[2]), original(q, *a, **k))[1])
    settings: dict[str, Any] = {"layers": [0, 2], "num_segments": SEGMENTS, "reduce": reduce}
    with record_attention(case.model, segment_map(), None, **settings) as recording:
        case.model.generate(**case.inputs, **options())
        once = recording.mass
        case.model.generate(**case.inputs, **options())
    assert sum(calls) == 2 * 2 * (STEPS - 1) and max(calls) == min(together, STEPS - 1)
    for layer, mass in recording.mass.items():
        if reduce is None:
            want = torch.stack([masses(step[layer], segment_map()) for step in case.maps], dim=2)
            close(once[layer], want)
            close(mass, torch.cat([want, want], dim=2))
        else:
            close(mass, once[layer])
            assert recording.counts[layer].tolist() == [2 * STEPS] * 2


@pytest.mark.parametrize("positional", [False, True])
def test_a_configuration_of_the_caller_stays_as_it_is_and_alone(
    generated: dict[str, Any], monkeypatch: pytest.MonkeyPatch, positional: bool
) -> None:
    """`generate` is not given an argument beside the caller's GenerationConfig, which transformers warns of on every run."""
    case = generated["full"]
    warned: list[str] = []
    monkeypatch.setattr(generation_utils.logger, "warning_once", lambda text, *args: warned.append(text))
    config = GenerationConfig(**options(), eos_token_id=None)
    before = config.to_dict()
    with record_attention(case.model, segment_map(), None, layers=[1]) as recording:
        if positional:
            sequences = case.model.generate(case.inputs["input_ids"], config, attention_mask=case.inputs["attention_mask"])
        else:
            sequences = case.model.generate(**case.inputs, generation_config=config)
    assert torch.equal(sequences, case.sequences)
    assert recording.counts[1].tolist() == [STEPS, STEPS]
    assert config.to_dict() == before
    assert not [text for text in warned if "generation_config" in text]
