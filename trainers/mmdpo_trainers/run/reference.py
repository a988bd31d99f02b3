"""reference: the reference model's log-probabilities of a run's pairs, computed once and kept beside them. No stage of a run.

The train stage does the same before its first step; done beforehand it can be on another device, and all arms share the file.
"""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

from mmdpo_trainers.errors import StageError
from mmdpo_trainers.processes import ranks
from mmdpo_trainers.stages.context import StageContext
from mmdpo_trainers.stages.train import make_trainer
from mmdpo_trainers.training.reference.cache import remove_cache


def run(context: StageContext, *, refresh: bool = False) -> dict[str, Any]:
    """Fill the cache that training with these settings reads, and return a summary.

    context: of the train stage. refresh: throw away what the cache holds first.

    Raises StageError where no loss of the run compares with a reference; StaleCacheError where the cache is another reference's.
    """
    args = {**context.options.args, "precompute_ref_log_probs": True}
    options = dataclasses.replace(context.options, args=args)
    context = dataclasses.replace(context, config=dataclasses.replace(context.config, train=options))
    trainer, _ = make_trainer(context, [])
    with contextlib.suppress(OSError):
        # The trainer makes the folder that training would write to.
        context.folder.rmdir()
    if not trainer.args.needs_reference:
        raise StageError(f"no loss of {', '.join(trainer.args.loss_type)} compares with a reference; there is nothing to compute")
    path = Path(str(trainer.args.reference_cache))
    if refresh:
        ranks.on_rank_0(lambda: remove_cache(path))
    done = trainer.precompute_reference()
    return {
        "file": str(path),
        "records": sum(each.records for each in done),
        "computed": sum(each.computed for each in done),
        "cached": sum(each.cached for each in done),
        "left_out": len(trainer.left_out),
        "tokens": sum(each.tokens for each in done),
        "seconds": round(sum(each.seconds for each in done), 2),
    }
