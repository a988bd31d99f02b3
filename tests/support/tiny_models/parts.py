"""What the tiny checkpoints share: words, tokenizer, weights, the files of a published folder, pictures."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image, ImageDraw
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

WORDS = """
USER ASSISTANT user assistant . , : ; ? ! ( ) ' " - / + = _ # % < > [ ]
Image In in image picture the a an is are of what which where how many colour color shape object this that it there and or on at
to for with shown centre center embedded inside left right top bottom above below small large big yes no none both not answer
choose option letter from given only one word red green blue yellow purple orange black white grey cyan circle square triangle
star cross ring cat dog car bird fish two three four five six seven eight nine ten zero
"""

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>", "<image>")


def make_tokenizer(
    special: tuple[str, ...] = SPECIAL_TOKENS,
    *,
    bos: str | None = "<s>",
    eos: str = "</s>",
    pad: str = "<pad>",
    adds_bos: bool | None = None,
    words: tuple[str, ...] = (),
    last: tuple[str, ...] = (),
    named: dict[str, str] | None = None,
    padding_side: str | None = None,
) -> PreTrainedTokenizerFast:
    """A word tokenizer over WORDS: `special` tokens first, a family's own `words` and the special tokens `last` at the end.

    named: attribute -> special token, for the processors that ask the tokenizer for a token by name (`tokenizer.boi_token`).
    adds_bos: whether encoding starts with `bos`, by default where there is one.
    """
    every = [*special, *dict.fromkeys([*WORDS.split(), "\n", *map(str, range(10)), *map(chr, range(65, 91)), *words]), *last]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(every)}, unk_token="<unk>"))
    # Letters, digits one by one, line ends and single signs: "Image12" is three tokens, so every index is in the vocabulary.
    pieces = Regex(r"[A-Za-z]+|[0-9]|\n|[^A-Za-z0-9\s]|[ \t]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pieces, "isolated"), pre_tokenizers.Split(Regex(r"[ \t]+"), "removed")]
    )
    if bos is not None and adds_bos is not False:
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, every.index(bos))])
    options: dict[str, Any] = {} if padding_side is None else {"padding_side": padding_side}
    others = [name for name in (*special, *last) if name not in ("<unk>", bos, eos, pad)]
    if named is None:
        options["additional_special_tokens"] = others
    else:
        # Named ones take the argument's place, so the rest become special here.
        tokenizer.add_special_tokens(others)
        options["extra_special_tokens"] = named
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        unk_token="<unk>",
        pad_token=pad,
        model_input_names=["input_ids", "attention_mask"],
        **options,
    )


def make_byte_tokenizer(name: str, special: tuple[str, ...], *, eos: str, pad: str) -> PreTrainedTokenizerFast:
    """A tokenizer of a class of transformers that merges bytes, to the words of WORDS."""
    tokenizer_class = getattr(transformers, name)
    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain.train_from_iterator(
        [f"{word} {word}" for word in WORDS.split()],
        trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False),
    )
    trained = json.loads(plain.to_str())["model"]
    return tokenizer_class(
        vocab=trained["vocab"],
        merges=[tuple(pair) for pair in trained["merges"]],
        bos_token=None,
        unk_token=None,
        eos_token=eos,
        pad_token=pad,
        extra_special_tokens=list(special),
    )


def token_ids(tokenizer: PreTrainedTokenizerFast, *names: str) -> dict[str, int]:
    """Special token -> id."""
    return {name: int(tokenizer.convert_tokens_to_ids(name)) for name in names}  # type: ignore[arg-type]


def widen(model: PreTrainedModel) -> None:
    """Draw the weights wider than an initialisation is, so that attention and next-token distributions are far from uniform."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3 if "vis" in name else 0.2)


def random_model(model_class: type[PreTrainedModel], config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """A widened model of this config, the same for the same seed; the caller's random state stays."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
        widen(model)
    return model


def save_model(folder: Path, model: Any, dtype: torch.dtype, **generation: Any) -> None:
    """config.json, generation_config.json and the weights."""
    model.generation_config.update(**generation)
    model.to(dtype).save_pretrained(folder)


def save_processor(
    folder: Path,
    processor_class: str,
    tokenizer: PreTrainedTokenizerFast,
    image_processor: Any,
    chat_template: str | None,
    **values: Any,
) -> None:
    """The processor's files one by one, as published folders have them.

    Made from its parts: some processors cannot be built here, for want of a video processor and so of torchvision.
    """
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    image_processor.save_pretrained(folder)
    (folder / "processor_config.json").write_text(
        json.dumps({"processor_class": processor_class, **values}, indent=2) + "\n", encoding="utf-8"
    )


def sample_pictures(n: int, seed: int = 0, *, size: int = 48) -> list[Image.Image]:
    """`n` different RGB pictures of `size` × `size` pixels, the same for the same seed."""
    draw_random = random.Random(seed)
    pictures = []
    for _ in range(n):
        picture = Image.new("RGB", (size, size), _colour(draw_random))
        pen = ImageDraw.Draw(picture)
        for _ in range(3):
            x, y = draw_random.randrange(size // 2), draw_random.randrange(size // 2)
            corner = (x + draw_random.randint(size // 6, size // 2), y + draw_random.randint(size // 6, size // 2))
            shape = pen.ellipse if draw_random.random() < 0.5 else pen.rectangle
            shape(((x, y), corner), fill=_colour(draw_random))
        pictures.append(picture)
    return pictures


def _colour(draw_random: random.Random) -> tuple[int, int, int]:
    return draw_random.randrange(256), draw_random.randrange(256), draw_random.randrange(256)
