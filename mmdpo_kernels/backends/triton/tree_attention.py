"""`tree_attention` in Triton."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from ..calls import TreeAttentionCall
from ..layout import empty_head_last, int32
from . import measured_tiles, runtime
from . import tree_attention_tiles as tiles
from .attention_device import COLUMNS
from .launch import Launch, aligned
from .runtime import DTYPE_NAMES, Specialization
from .tree_attention_kernels import forward_kernel, grad_key_kernel, grad_query_kernel, row_correction_kernel
from .tree_attention_tiles import Tiles, TreeAttentionTiles
from .tree_plan import key_plan, query_plan, segment_kinds, token_depths

LSE_GRADIENT = True

SEGMENTS_PER_PASS = COLUMNS.value


def unavailable_reason(device_type: str, dtype: torch.dtype, *, head_dim: int = 64, **features: object) -> str | None:
    """Why this backend cannot serve the call, or None."""
    reason = runtime.unavailable_reason(device_type, dtype)
    if reason is None and head_dim > tiles.WIDEST:
        return f"it takes head dims up to {tiles.WIDEST}, got {head_dim}"
    return reason


def forward(
    query: Tensor,  # (B, Hq, S, D)
    key: Tensor,  # (B, Hkv, S, D)
    value: Tensor,  # (B, Hkv, S, Dv)
    call: TreeAttentionCall,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> output (B, Hq, S, Dv), lse (B, Hq, S) and mass (B, Hq, S, N) in float32.

    More than 16 segments take one pass for every 16 of them.
    """
    batch, heads, length, _ = query.shape
    output = empty_head_last(query, value.shape[3])
    lse = query.new_empty(batch, heads, length, dtype=torch.float32)
    mass = query.new_empty(batch, heads, length, call.num_segments, dtype=torch.float32)
    for launch in _Launches(query, key, value, call).forward(output, lse, mass):
        launch.run()
    return output, lse, mass


def backward(
    grad_output: Tensor | None,
    grad_lse: Tensor | None,
    grad_mass: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    call: TreeAttentionCall,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> gradients of query, key, value. No sum depends on the order in which programs run.

    A gradient of mass needs mass again, which another forward pass finds: cheaper than to keep it for those who only look at it.
    """
    if call.num_segments == 0:
        grad_mass = None
    mass = None if grad_mass is None else forward(query, key, value, call)[2]
    if mass is None:
        call = call._replace(num_segments=0)
    grads = (empty_head_last(query, query.shape[3]), empty_head_last(key, key.shape[3]), empty_head_last(value, value.shape[3]))
    launches = _Launches(query, key, value, call)
    for launch in launches.backward(grad_output, grad_lse, grad_mass, output, lse, mass, *grads):
        launch.run()
    return grads


@dataclass(frozen=True)
class _Launches:
    """Those of one call."""

    query: Tensor
    key: Tensor
    value: Tensor
    call: TreeAttentionCall
    capability: tuple[int, int] | None = None
    """Of the GPU to launch for; None: the one that holds the query."""

    def forward(self, output: Tensor, lse: Tensor, mass: Tensor) -> Iterator[Launch]:
        """The launches that write output, lse and mass."""
        tile = self._tiles().forward
        programs = triton.cdiv(self.query.shape[2], tile.block_m) * self.query.shape[1]
        own: dict[str, Any] = {"output": output, "lse": lse, "mass": None, "kinds": None}
        plan = query_plan
        if self.call.segments is not None and self.call.num_segments:
            own |= {"mass": mass, "kinds": segment_kinds(self.call.segments, tile.block_n)}
            plan = partial(query_plan, segments=self.call.segments)
        for first in range(0, max(self.call.num_segments, 1), SEGMENTS_PER_PASS):
            yield self._launch(forward_kernel, programs, tile, plan, {**own, "first_segment": first})

    def backward(
        self,
        grad_output: Tensor | None,
        grad_lse: Tensor | None,
        grad_mass: Tensor | None,
        output: Tensor,
        lse: Tensor,
        mass: Tensor | None,
        grad_query: Tensor,
        grad_key: Tensor,
        grad_value: Tensor,
    ) -> Iterator[Launch]:
        """The launches that write the three gradients, in the order in which they have to run."""
        batch, heads, length, _ = self.query.shape
        if grad_output is not None and grad_output.stride(-1) != 1:
            grad_output = grad_output.contiguous()
        upstream = {
            "grad_output": grad_output,
            "grad_mass": None if grad_mass is None else grad_mass.contiguous(),
            **_strides(grad_output=grad_output),
        }
        correction = torch.empty_like(lse)
        widths = self._constants(tiles.CORRECTION)
        yield Launch(
            kernel=row_correction_kernel,
            programs=triton.cdiv(length, tiles.CORRECTION.block_m) * batch * heads,
            arguments={
                **upstream,
                "output": output,
                "grad_lse": None if grad_lse is None else grad_lse.contiguous(),
                "mass": mass,
                "correction": correction,
                **_strides(output=output),
                "heads": heads,
                "length": length,
                "num_segments": self.call.num_segments,
            },
            constants={name: widths[name] for name in ("VALUE_DIM", "BLOCK_V", "BLOCK_M")},
            num_warps=tiles.CORRECTION.num_warps,
            num_stages=tiles.CORRECTION.num_stages,
        )
        known = {**upstream, "lse": lse, "correction": correction, "scale": float(self.call.scale)}
        passes = triton.cdiv(self.call.num_segments, SEGMENTS_PER_PASS)
        chosen = self._tiles(grad_output)
        tile = chosen.grad_key
        programs = triton.cdiv(length, tile.block_n) * self.key.shape[1]
        own = {**known, "grad_key": grad_key, "grad_value": grad_value}
        yield self._launch(grad_key_kernel, programs, tile, key_plan, own, PASSES=passes)
        tile = chosen.grad_query
        programs = triton.cdiv(length, tile.block_m) * heads
        yield self._launch(grad_query_kernel, programs, tile, query_plan, {**known, "grad_query": grad_query}, PASSES=passes)

    def _tiles(self, upstream: Tensor | None = None) -> TreeAttentionTiles:
        """The table's, or what a sweep has found faster; for tensors of other alignment than the sweep's, the table's."""
        width = max(self.query.shape[3], self.value.shape[3])
        capability = self.capability or runtime.capability(self.query.device)
        given = (self.call.reach, self.call.window, self.call.softcap, self.call.num_segments or None)
        features = {name for name, value in zip(tiles.FEATURES, given, strict=True) if value is not None}
        chosen = tiles.choose(width, self.query.dtype, capability, features)
        kind = self._kind(capability)
        if kind is None or tiles.overridden() or not aligned(self.query, self.key, self.value, upstream):
            return chosen
        return replace(chosen, **measured_tiles.fastest(kind, self.query.device))

    def _kind(self, capability: tuple[int, int]) -> str | None:
        """Which of the calls that candidates are compiled and timed for this one is, or None."""
        if capability[0] != 9 or self.query.dtype == torch.float32 or not self.query.shape[3] == self.value.shape[3] == 128:
            return None
        if any(each is not None for each in (self.call.reach, self.call.window, self.call.softcap)):
            return None
        if self.call.num_segments:
            return "tree mass"
        return "causal" if self.call.tree_end is None else "tree"

    def _launch(
        self, kernel: Any, programs: int, tile: Tiles, plan: Callable[..., Tensor], own: dict[str, Any], **constants: int
    ) -> Launch:
        """programs: of one batch row. own: arguments that not all kernels have."""
        if tile.descriptors and not _describable(self.query, self.key, self.value, own.get("grad_output")):
            tile = replace(tile, descriptors=False, specialize=False)
        tree_end, reach, window = self.call.tree_end, self.call.reach, self.call.window
        planned = any(each is not None for each in (tree_end, reach, window, own.get("kinds")))
        blocks = plan(tree_end, self.query, window, tile.block_m, tile.block_n, reach) if planned else None
        if self.call.softcap is not None:
            inner, outer = self.call.scale / self.call.softcap, self.call.softcap
        elif self.call.scale > 0:  # then it can wait for the exponential
            inner, outer = None, self.call.scale
        else:
            inner, outer = self.call.scale, 1.0
        return Launch(
            kernel=kernel,
            programs=programs * self.query.shape[0],
            arguments={
                "query": self.query,
                "key": self.key,
                "value": self.value,
                **_strides(query=self.query, key=self.key, value=self.value),
                "tree_end": int32(self.call.tree_end),
                "reach": int32(self.call.reach),
                "depth": None if self.call.tree_end is None or self.call.window is None else token_depths(self.call.tree_end),
                "plan": blocks,
                "plan_b": None if blocks is None else blocks.stride(0),
                "segments": int32(self.call.segments) if self.call.num_segments else None,
                "heads": self.query.shape[1],
                "length": self.query.shape[2],
                "window": self.call.window,
                "inner": inner,
                "outer": float(outer),
                "num_segments": self.call.num_segments,
                **own,
            },
            constants=self._constants(tile) | constants,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            descriptors=tile.descriptors,
        )

    def _constants(self, tile: Tiles) -> dict[str, int | bool]:
        dim, value_dim = self.query.shape[3], self.value.shape[3]
        return {
            "GROUP": self.query.shape[1] // self.key.shape[1],
            "SOFTCAP": self.call.softcap is not None,
            "DIM": dim,
            "VALUE_DIM": value_dim,
            "BLOCK_D": _padded(dim),
            "BLOCK_V": _padded(value_dim),
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "DESCRIPTORS": tile.descriptors,
            "SPECIALIZE": tile.specialize,
            "OVERLAP": tile.overlap,
        }


def _describable(*tensors: Tensor | None) -> bool:
    """Whether tensor descriptors can stand for them: addresses and strides of whole 16 bytes."""
    return all(
        each.data_ptr() % 16 == 0 and all(stride * each.element_size() % 16 == 0 for stride in each.stride()[:-1])
        for each in tensors
        if each is not None
    )


def _padded(dim: int) -> int:
    """Width of a tile of head vectors: tensor cores take 16 or more, Triton powers of two."""
    return max(16, triton.next_power_of_2(dim))


def _strides(**tensors: Tensor | None) -> dict[str, int | None]:
    """Strides over batch, heads and tokens by the names that the kernels use."""
    return {
        f"{name}_{axis}": None if tensor is None else tensor.stride(index)
        for name, tensor in tensors.items()
        for index, axis in enumerate("bhs")
    }


REPRESENTATIVE = ("bf16 128 tree mass", "bf16 128 tree reach mass")
"""The three kernels with most to hold, at the models' head dim; their tiles with a reach are not all the same."""


def specializations(target: int) -> list[Specialization]:
    """What calls of every kind compile on a GPU of compute capability target / 10: each entry of the tile table, each set of features."""
    forms: list[Specialization] = []
    for label, dtype, dim, features in _shipped():
        for launch in _example(dtype, dim, divmod(target, 10), **features):
            name = launch.kernel.__name__.removesuffix("_kernel")
            forms.append(launch.describe(f"tree_attention {name} {label}"))
    return runtime.distinct(forms)


def candidates(target: int) -> list[Specialization]:
    """`tree_attention_tiles.CANDIDATES` as `specializations` has the shipped forms, once for each kind of call that they serve."""
    forms: list[Specialization] = []
    for name, several in tiles.CANDIDATES.items():
        for tile, calls in several.items():
            for call in calls:
                with tiles.override(tile):
                    features: dict[str, Any] = {"tree": call != "causal", "num_segments": 4 if "mass" in call else 0}
                    launches = list(_example(torch.bfloat16, 128, divmod(target, 10), **features))
                label = f"tree_attention {name} bf16 128 {call}, {tile.words}"
                forms += [each.describe(label) for each in launches if each.kernel.__name__ == f"{name}_kernel"]
    return forms


_GIVEN: dict[str, dict[str, Any]] = {
    "reach": {"reach": True},
    "window": {"window": 1024},
    "softcap": {"softcap": 30.0},
    "mass": {"num_segments": 4},
}
_DIMS = (64, 96, 128, 256)
"""One of each column of the table, and one that is padded to it."""


def _shipped() -> Iterator[tuple[str, torch.dtype, int, dict[str, Any]]]:
    """Label, dtype, head dim and features; in half precision every set of these."""
    for dim in (32, *_DIMS):
        yield f"bf16 {dim} causal", torch.bfloat16, dim, {}
    sets = runtime.feature_sets(tiles.FEATURES)
    half = itertools.product([torch.bfloat16], _DIMS, sets)
    few = [names for names in sets if len(names) in (0, 1, len(tiles.FEATURES))]
    single = itertools.product([torch.float32], (64, 128), few)
    for dtype, dim, names in (*half, *single):
        features = {name: value for each in names for name, value in _GIVEN[each].items()}
        yield f"{DTYPE_NAMES[dtype]} {dim} {' '.join(('tree', *names))}", dtype, dim, {"tree": True, **features}


def _example(
    dtype: torch.dtype,
    dim: int,
    capability: tuple[int, int],
    tree: bool = False,
    reach: bool = False,
    num_segments: int = 0,
    softcap: float | None = None,
    window: int | None = None,
) -> Iterator[Launch]:
    """Forward and backward of a call without data, as a model with grouped heads makes it."""
    batch, heads, kv_heads, length = 2, 32, 8, 4096

    def ids() -> Tensor:
        return torch.empty(batch, length, dtype=torch.int32, device="meta")

    def rows(*shape: int) -> Tensor:
        return torch.empty(batch, heads, length, *shape, device="meta")

    query, key = (torch.empty(batch, length, h, dim, dtype=dtype, device="meta").transpose(1, 2) for h in (heads, kv_heads))
    segments = ids() if num_segments else None
    trees = [ids() if given else None for given in (tree, reach)]
    call = TreeAttentionCall(trees[0], segments, num_segments, dim**-0.5, softcap, window, trees[1])
    launches = _Launches(query, key, key, call, capability)
    lse, mass = rows(), rows(num_segments)
    yield from launches.forward(query, lse, mass)
    yield from launches.backward(query, None, mass if num_segments else None, query, lse, mass, query, key, key)
