"""Small random checkpoints with real processors, and small pictures: what the tests run the real code path on."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>", "<image>")
QWEN_SPECIAL_TOKENS = (
    *("<unk>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
)

WORDS = """
USER ASSISTANT user assistant . , : ; ? ! ( ) ' " - / + = _ # % < > [ ]
Image In in image picture the a an is are of what which where how many colour color shape object this that it there and or on at
to for with shown centre center embedded inside left right top bottom above below small large big yes no none both not answer
choose option letter from given only one word red green blue yellow purple orange black white grey cyan circle square triangle
star cross ring cat dog car bird fish two three four five six seven eight nine ten zero
"""

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for content in message['content'] if content['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] if content['type'] == 'text' %}{{ content['text'] + ' ' }}{% endfor %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)

QWEN_CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nanswer with one word .<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_tiny_llava(
    folder: str | Path,
    *,
    layers: int = 3,
    heads: int = 4,
    kv_heads: int = 2,
    image_size: int = 48,
    patch: int = 12,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    hidden: int = 32,
    chat_template: bool = True,
) -> Path:
    """Write a random LLaVA and its processor to `folder` and return it.

    A picture gives (image_size // patch)² tokens. Weights are wider than the usual initialisation (0.2) so that attention and
    next-token distributions are far from uniform, as a trained model's are.
    """
    folder = Path(folder)
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": image_size}, crop_size={"height": image_size, "width": image_size}
        ),
        tokenizer=_tokenizer(),
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE if chat_template else None,
    )
    vocabulary = len(processor.tokenizer)
    ids = {name: processor.tokenizer.convert_tokens_to_ids(name) for name in SPECIAL_TOKENS}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=image_size,
            patch_size=patch,
        ),
        text_config=LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            max_position_embeddings=4096,
            initializer_range=0.2,
            bos_token_id=ids["<s>"],
            eos_token_id=ids["</s>"],
            pad_token_id=ids["<pad>"],
        ),
        image_token_index=ids["<image>"],
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=(image_size // patch) ** 2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
        _widen(model)
    model.generation_config.update(bos_token_id=ids["<s>"], eos_token_id=ids["</s>"], pad_token_id=ids["<pad>"])
    model.to(dtype).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def make_tiny_qwen(
    folder: str | Path,
    *,
    layers: int = 3,
    heads: int = 4,
    kv_heads: int = 2,
    patch: int = 6,
    min_pixels: int = 24 * 24,
    max_pixels: int = 96 * 96,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    hidden: int = 32,
    sliding_window: int | None = None,
) -> Path:
    """Write a random Qwen2.5-VL to `folder`, with the files of a published one, and return it.

    Two patches by two make an image token, so a picture of H x W pixels gives about (H / 2 patch) (W / 2 patch) of them. The first
    vision block attends in windows of two by two tokens. sliding_window: of all text layers but the first.
    """
    folder = Path(folder)
    tokenizer = _tokenizer(QWEN_SPECIAL_TOKENS, bos=None, eos="<|im_end|>", pad="<|endoftext|>")
    tokenizer.chat_template = QWEN_CHAT_TEMPLATE
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in QWEN_SPECIAL_TOKENS}
    axis = max(1, hidden // heads // 8)
    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": 2,
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_heads": 2,
            "patch_size": patch,
            "window_size": 4 * patch,
            "fullatt_block_indexes": [1],
            "out_hidden_size": hidden,
        },
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "max_position_embeddings": 4096,
            "use_sliding_window": sliding_window is not None,
            "sliding_window": sliding_window,
            "max_window_layers": 1,
            # Time, height and width share the rotary frequencies of a head.
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [hidden // heads // 2 - 2 * axis, axis, axis],
            },
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(config)
        _widen(model)
    model.generation_config.update(eos_token_id=[ids["<|im_end|>"], ids["<|endoftext|>"]], pad_token_id=ids["<|endoftext|>"])
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"shortest_edge": min_pixels, "longest_edge": max_pixels}
    Qwen2VLImageProcessorPil(patch_size=patch, merge_size=2, size=size).save_pretrained(folder)
    return folder


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


def _widen(model: PreTrainedModel) -> None:
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3 if "vis" in name else 0.2)


def _tokenizer(
    special: tuple[str, ...] = SPECIAL_TOKENS, *, bos: str | None = "<s>", eos: str = "</s>", pad: str = "<pad>"
) -> PreTrainedTokenizerFast:
    words = [*special, *dict.fromkeys([*WORDS.split(), "\n", *map(str, range(10)), *map(chr, range(65, 91))])]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    # Letters, digits one by one, line ends and single signs: "Image12" is three tokens, so every index is in the vocabulary.
    pieces = Regex(r"[A-Za-z]+|[0-9]|\n|[^A-Za-z0-9\s]|[ \t]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pieces, "isolated"), pre_tokenizers.Split(Regex(r"[ \t]+"), "removed")]
    )
    if bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, words.index(bos))])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        unk_token="<unk>",
        pad_token=pad,
        additional_special_tokens=[name for name in special if name not in ("<unk>", bos, eos, pad)],
        model_input_names=["input_ids", "attention_mask"],
    )
