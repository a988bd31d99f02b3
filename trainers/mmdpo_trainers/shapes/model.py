"""The small LLaVA and its processor, before training: configuration, word-level tokenizer, chat template."""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from mmdpo_trainers.shapes import world

PATCH_SIZE = 12
PATCH_GRID = (world.IMAGE_SIZE // PATCH_SIZE, world.IMAGE_SIZE // PATCH_SIZE)
MAX_IMAGES = 9

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}ASSISTANT: {% else %}USER: {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}</s>{% else %} {% endif %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)

# Beyond the world's own words, the ones people use to point at a picture, so that a new phrasing is not all <unk>.
PROMPT_WORDS = (
    "in for the of at a an is it on or and to with from about that this its which what where does do how has have show "
    "shows shown image images picture pictures photo photograph photos frame panel inset cell one main single whole small "
    "smaller large larger centre center middle central centred centered inner inside within outer embedded pasted placed "
    "located positioned surrounded looking look regarding considering consider concerning focus focusing focused only based "
    "according given refer referring please answer question following tell me here there first second left right top bottom "
    "drawn colour color shape background "
)


@dataclass(frozen=True, kw_only=True)
class ShapesModelConfig:
    """Sizes of the model: 0.96 million parameters, 16 tokens a picture."""

    vision_hidden: int = 96
    vision_layers: int = 3
    vision_heads: int = 4
    text_hidden: int = 128
    text_mlp: int = 256
    text_layers: int = 4
    text_heads: int = 4
    initializer_range: float = 0.05


def build_processor() -> LlavaProcessor:
    """A `LlavaProcessor` with a word-level, lower-casing tokenizer (left padding) and CLIP's Pillow image processor."""
    specials = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
    words = ["user", "assistant", ":", ",", "?", ".", "'"] + [f"image{k}" for k in range(1, MAX_IMAGES + 1)]
    words += [*world.COLOURS, *world.SHAPES, *world.BACKGROUNDS, *PROMPT_WORDS.split()]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(specials + words))}
    core = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )
    side = world.IMAGE_SIZE
    image_processor = CLIPImageProcessor(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=CHAT_TEMPLATE,
    )


def build_model(processor: LlavaProcessor, config: ShapesModelConfig | None = None) -> LlavaForConditionalGeneration:
    """A LLaVA with random weights (seed torch first) that fits ``processor``."""
    config = config or ShapesModelConfig()
    tokenizer = processor.tokenizer
    ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    vision = CLIPVisionConfig(
        hidden_size=config.vision_hidden,
        intermediate_size=2 * config.vision_hidden,
        num_hidden_layers=config.vision_layers,
        num_attention_heads=config.vision_heads,
        image_size=world.IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=config.vision_hidden,
        initializer_range=config.initializer_range,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.text_hidden,
        intermediate_size=config.text_mlp,
        num_hidden_layers=config.text_layers,
        num_attention_heads=config.text_heads,
        num_key_value_heads=config.text_heads,
        max_position_embeddings=tokenizer.model_max_length,
        initializer_range=config.initializer_range,
        tie_word_embeddings=False,
        **ids,
    )
    llava = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=PATCH_GRID[0] * PATCH_GRID[1],
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(llava)
    model.generation_config.update(**ids, do_sample=False)
    return model
