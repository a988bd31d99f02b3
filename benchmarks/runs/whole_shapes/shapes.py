"""The table of shapes: every size of every model, at each scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

METHODS = ("dpo", "mdpo")


@dataclass(frozen=True, kw_only=True)
class Size:
    """Sizes of a model and of the records that it is trained on."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocabulary: int
    vision_layers: int
    vision_width: int
    vision_heads: int
    vision_mlp: int
    patch: int
    side: int
    """Of a picture, in pixels; a picture is a square."""
    ranks: tuple[int, int]
    """Of LoRA, for DPO and mDPO: as in the papers of MIA-DPO and mDPO, or width / 32 and / 64. On every linear of the language tower."""
    chosen: int
    rejected: int
    """Words of the responses, the end not counted."""
    extra: tuple[tuple[str, Any], ...] = ()
    """A family's own settings of its text model."""
    pictures: int = 5
    records: int = 8

    def rank(self, method: str) -> int:
        return self.ranks[METHODS.index(method)]

    @property
    def patches(self) -> int:
        """Patches of a picture."""
        return (self.side // self.patch) ** 2


def _qwen3_5(
    key_heads: int, value_heads: int, head_dim: int, rope: tuple[int, int, int], theta: float
) -> tuple[tuple[str, Any], ...]:
    """A state of `head_dim` x `head_dim` for each value head in three of four layers; a quarter of a head rotates in the fourth."""
    parameters = {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": 0.25}
    return (
        ("linear_num_key_heads", key_heads),
        ("linear_num_value_heads", value_heads),
        ("linear_key_head_dim", head_dim),
        ("linear_value_head_dim", head_dim),
        ("rope_parameters", {**parameters, "mrope_section": list(rope), "mrope_interleaved": True}),
    )


def _qwen2_5(rope: tuple[int, int, int]) -> tuple[tuple[str, Any], ...]:
    return (("rope_parameters", {"rope_type": "default", "rope_theta": 1e6, "mrope_section": list(rope)}),)


SHAPES: dict[str, dict[str, Size]] = {
    # 576 tokens a picture.
    "LLaVA-1.5-7B": {
        "cuda": Size(
            layers=32, width=4096, heads=32, kv_heads=32, head_dim=128, mlp=11008, vocabulary=32064,
            vision_layers=24, vision_width=1024, vision_heads=16, vision_mlp=4096, patch=14, side=336,
            ranks=(128, 64), chosen=100, rejected=40,
        ),
        "cpu": Size(
            layers=4, width=256, heads=4, kv_heads=4, head_dim=64, mlp=688, vocabulary=512,
            vision_layers=3, vision_width=64, vision_heads=2, vision_mlp=256, patch=14, side=168,
            ranks=(8, 4), chosen=50, rejected=20,
        ),
        "small": Size(
            layers=2, width=32, heads=2, kv_heads=2, head_dim=16, mlp=64, vocabulary=256,
            vision_layers=2, vision_width=32, vision_heads=2, vision_mlp=64, patch=14, side=28,
            ranks=(4, 2), chosen=4, rejected=3, pictures=2, records=4,
        ),
    },
    # 400 tokens a picture, as a photo of 640 x 480 has.
    "Qwen2.5-VL-7B": {
        "cuda": Size(
            layers=28, width=3584, heads=28, kv_heads=4, head_dim=128, mlp=18944, vocabulary=152064,
            vision_layers=32, vision_width=1280, vision_heads=16, vision_mlp=3420, patch=14, side=560,
            ranks=(128, 64), chosen=100, rejected=40, extra=_qwen2_5((16, 24, 24)),
        ),
        "cpu": Size(
            layers=4, width=256, heads=4, kv_heads=1, head_dim=64, mlp=1360, vocabulary=2048,
            vision_layers=4, vision_width=64, vision_heads=2, vision_mlp=176, patch=14, side=280,
            ranks=(8, 4), chosen=50, rejected=20, extra=_qwen2_5((8, 12, 12)),
        ),
        "small": Size(
            layers=2, width=32, heads=2, kv_heads=1, head_dim=16, mlp=64, vocabulary=256,
            vision_layers=2, vision_width=32, vision_heads=2, vision_mlp=64, patch=14, side=56,
            ranks=(4, 2), chosen=4, rejected=3, pictures=2, records=4, extra=_qwen2_5((2, 3, 3)),
        ),
    },
    # 400 tokens a picture; the sizes are those of transformers' own Qwen3_5Config, which is the 9B model's.
    "Qwen3.5-9B": {
        "cuda": Size(
            layers=32, width=4096, heads=16, kv_heads=4, head_dim=256, mlp=12288, vocabulary=248320,
            vision_layers=27, vision_width=1152, vision_heads=16, vision_mlp=4304, patch=16, side=640,
            ranks=(128, 64), chosen=100, rejected=40, extra=_qwen3_5(16, 32, 128, (11, 11, 10), 1e7),
        ),
        "cpu": Size(
            layers=4, width=256, heads=4, kv_heads=1, head_dim=64, mlp=768, vocabulary=4096,
            vision_layers=3, vision_width=64, vision_heads=2, vision_mlp=256, patch=16, side=320,
            ranks=(8, 4), chosen=50, rejected=20, extra=_qwen3_5(2, 4, 64, (3, 3, 2), 1e4),
        ),
        "small": Size(
            layers=4, width=32, heads=2, kv_heads=1, head_dim=32, mlp=64, vocabulary=1024,
            vision_layers=2, vision_width=32, vision_heads=2, vision_mlp=64, patch=16, side=64,
            ranks=(4, 2), chosen=4, rejected=3, pictures=2, records=4, extra=_qwen3_5(2, 4, 16, (2, 1, 1), 1e4),
        ),
    },
}  # fmt: skip
