"""Preference training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import StrictFloat, StrictStr

from mmdpo_trainers.config.options import COLUMNS_WORDS, ColumnName, option
from mmdpo_trainers.config.values import Finite, Settings


@dataclass(kw_only=True)
class TrainConfig(Settings):
    """Preference training; everything of `PreferenceConfig` goes through `args`."""

    input: StrictStr | None = option(
        None, "your own preference data, in any layout of docs/your_data.md, in place of the pairs of this run", path=True
    )
    columns: dict[ColumnName, StrictStr] | None = option(None, f"of train.input: {COLUMNS_WORDS}")
    preset: StrictStr | None = option(
        None,
        "losses, rates and adapter of a paper or of its released code, which `args` may change one by one; None: the method's paper",
        when="for the released code's values, or those of another method",
    )
    args: Finite[dict[StrictStr, Any]] = option(
        help="fields of PreferenceConfig, such as learning_rate, beta, loss_type; of RewardConfig for a reward model, such as facts",
        factory=dict,
        result=lambda args: {
            name: value for name, value in args.items() if name != "push_to_hub" and not name.startswith("hub_")
        },
    )
    replay: StrictFloat = option(
        0.0,
        "single-image pairs mixed in, as a share of the selected pairs; they keep the single-image skill",
        ge=0,
        when="0.25 where answers about one picture alone get worse",
    )
    replay_source: StrictStr | None = option(
        None, "prompt records with answers (.jsonl) for the replay; None: augment/singles.jsonl", path=True
    )
    held_out: StrictFloat = option(
        0.0, "share of the selected pairs that is not trained on but evaluated on, as eval_* in the log", ge=0, lt=1
    )
    reference: Literal["adapter", "model"] = option("adapter", "reference model: the adapter switched off, or a second copy")

    def __post_init__(self) -> None:
        # YAML reads a bare `no` as False.
        self.args = {key: "no" if value is False and key.endswith("_strategy") else value for key, value in self.args.items()}
