"""`mmdpo check`: the checks on a user's own checkpoint."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from mmdpo_trainers.checks import CHECKS, CheckResult, run_checks
from mmdpo_trainers.errors import ConfigError, StageError
from mmdpo_trainers.models.families import FAMILIES
from mmdpo_trainers.models.loaded import LoadedModel
from mmdpo_trainers.models.loading import load_model


def check_command(
    model: str,
    *,
    revision: str | None = None,
    adapter: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    quantization: Any = None,
    only: str | None = None,
    as_json: bool = False,
) -> None:
    """Run the checks and print what they found.

    revision, quantization: as of `load_model`. only: names of `CHECKS` with commas between them; None: all. Raises StageError where a check
    failed, or the model cannot be used: the error says what its family has not.
    """
    names = list(CHECKS) if only is None else [name.strip() for name in only.split(",")]
    unknown = [name for name in names if name not in CHECKS]
    if unknown:
        raise ConfigError(f"--only {only}: expected names among {', '.join(CHECKS)}, got {unknown[0]!r}")
    loaded = load_model(model, revision=revision, adapter=adapter, device=device, dtype=dtype, quantization=quantization)
    # Progress goes to stderr, so that --json can be piped on.
    console = Console(stderr=True)
    found: list[CheckResult] = []
    with console.status("checking") as status:
        for name in names:
            status.update(f"checking {name}")
            found += run_checks(loaded, [name])
    if as_json:
        print(json.dumps({**about(loaded), "checks": [each.as_dict() for each in found]}, indent=2))
    else:
        Console().print(table(loaded, found))
    failed = [each.name for each in found if each.failed]
    if failed:
        raise StageError(
            f"model {loaded.path}: {len(failed)} of {len(found)} checks failed ({', '.join(failed)}); do not train it with this version, and "
            "report the table above" + ("" if loaded.dtype.itemsize > 2 else "; --dtype float32 tells rounding from faults")
        )


def about(loaded: LoadedModel) -> dict[str, Any]:
    """What was checked."""
    name, quantized = loaded.family.name, getattr(loaded.model.config, "quantization_config", None)
    return {
        "model": str(loaded.path),
        "family": name,
        "declared": name in FAMILIES,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "in_4_bits": bool(quantized),
        "device": str(loaded.device),
    }


def table(loaded: LoadedModel, results: Sequence[CheckResult]) -> Table:
    """A row a check."""
    what = about(loaded)
    known = "" if what["declared"] else " (no declaration, by transformers' conventions)"
    found = Table(
        title=f"{what['family']}{known}, {what['dtype']}{' and 4 bits' if what['in_4_bits'] else ''} on {what['device']}",
        title_justify="left",
    )
    found.add_column("check", no_wrap=True)
    found.add_column("verdict")
    for name in ("difference", "limit", "s"):
        found.add_column(name, justify="right", no_wrap=True)
    found.add_column("what was compared")
    for each in results:
        style = "red" if each.failed else None
        found.add_row(
            each.name, each.verdict, number(each.figure), number(each.limit), f"{each.seconds:.1f}", each.detail, style=style
        )
    return found


def number(value: float | None) -> str:
    """A difference or its limit."""
    return "-" if value is None else f"{value:.1e}" if value else "0"
