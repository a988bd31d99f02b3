"""The whole run: stages in order, arms after the main one, done work skipped, killed work continued."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from mmdpo_trainers.config.run_config import RunConfig
from mmdpo_trainers.config.stages import STAGES, stage_folders
from mmdpo_trainers.data.left_out import left_out_line
from mmdpo_trainers.data.records import Moment
from mmdpo_trainers.errors import ConfigError, MmdpoError, RunFolderError
from mmdpo_trainers.files.atomic import read_json, write_atomic
from mmdpo_trainers.files.fingerprint import Fingerprint, content_hash
from mmdpo_trainers.methods import check_method, method_named, online_settings
from mmdpo_trainers.methods.ranking import with_attributes
from mmdpo_trainers.methods.selection import match_of
from mmdpo_trainers.processes import notices, ranks
from mmdpo_trainers.processes.progress import Progress
from mmdpo_trainers.report.benchmarks import benchmark_summary
from mmdpo_trainers.run import upload
from mmdpo_trainers.run.preflight import check_declaration, check_run
from mmdpo_trainers.run.tables import run_tables
from mmdpo_trainers.stages.benchmarks import benchmark_marks
from mmdpo_trainers.stages.context import StageContext, stage_module
from mmdpo_trainers.stages.folder import RunFolder

_ORDER = tuple(STAGES)
_OF_THE_STAGE = ("input", "batch_size", "check", "check_pairs", "comparison_template")
"""Settings of `rate` that change no rating of an answer sampled in training."""


def run_pipeline(
    config: RunConfig,
    *,
    until: str | None = None,
    restart: str | None = None,
    progress: Progress | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Do, or continue, a whole run and return the content of its `summary.json`.

    until: the last stage to run. restart: a stage (or `arms/<name>/<stage>`) to remove, with the later ones, before starting.
    progress: where work is shown (standard error by default); console: where the closing tables go (standard output).
    Raises MmdpoError where the run folder was made with other settings, naming what changed.
    """
    method = method_named(check_method(config).method)
    check_declaration(method)
    for name, value in (("until", until), ("restart", restart and restart.rsplit("/", 1)[-1])):
        if value is not None and value not in method.stages_of(config) and value not in ("before", "after"):
            known = ", ".join(method.stages_of(config))
            raise ConfigError(f"--{name}: there is no stage {value!r} in a run of {method.name}; its stages are {known}")
    progress = progress or Progress()
    config = config.with_absolute_paths()
    run = RunFolder(config.run_path)
    set_threads(config.threads)
    steps = [step for step in _steps(config) if until is None or _ORDER.index(step[0]) <= _ORDER.index(until)]
    contexts = [_context(config, run, progress, step) for step in steps]
    ranks.start()
    ranks.on_rank_0(lambda: check_run(contexts))
    ranks.on_rank_0(lambda: upload.check(contexts, config))
    with held(run), ranks.failing():
        if restart:
            ranks.on_rank_0(lambda: restart_from(run, restart, tuple(config.arms)))
        for number, context in enumerate(contexts, start=1):
            if context.stage == "report":
                ranks.on_rank_0(lambda: write_summary(run, config))
            run_stage(context, f"{number}/{len(contexts)} ", config=config)
        summary = ranks.on_rank_0(lambda: write_summary(run, config))
        uploaded = ranks.on_rank_0(lambda: upload.push(run, config, progress) if until is None else None)
    if not ranks.is_rank_0():
        return summary
    console = console or Console()
    tables = run_tables(summary)
    for table in tables:
        console.print(table)
    if until is not None and not tables:
        further = ", ".join(stage for stage in method.stages_of(config) if _ORDER.index(stage) > _ORDER.index(until))
        said = f"done up to {until}: there is nothing to compare yet; the same command without --until does {further}"
        console.print(said, markup=False, highlight=False, soft_wrap=True)
    report = run.path / "report.html"
    ending = f"report: {report}" if report.exists() else f"run folder: {run.path}"
    console.print(ending, markup=False, highlight=False, soft_wrap=True)
    if uploaded:
        console.print(f"uploaded to: {uploaded}", markup=False, highlight=False, soft_wrap=True)
    return summary


@contextlib.contextmanager
def held(run: RunFolder) -> Iterator[None]:
    """Hold the run: the first of this launch's processes does it for all."""
    ranks.start()
    with contextlib.ExitStack() as stack:
        if ranks.is_rank_0():
            with ranks.failing():
                stack.enter_context(run.lock())
                run.date()
                notices.keep_in(run.path)
        ranks.barrier()
        yield


def run_stage(context: StageContext, label: str = "", config: RunConfig | None = None) -> dict[str, Any]:
    """Run one stage, or continue it, or return the summary of the done one. The caller holds the run's lock.

    config: the whole run's settings, saved as its `config.yaml` once it is certain that the stage's files belong to them.
    With several processes all call this; the first one looks after the stage's folder, and does the stages that are not shared.
    """
    if not STAGES[context.stage].shared:
        return ranks.on_rank_0(lambda: _run_stage(context, label, config))
    if ranks.is_rank_0():
        # The others wait in front of their work, or for the summary where there is nothing to do.
        with ranks.failing():
            summary = _run_stage(context, label, config)
        ranks.on_rank_0(lambda: "done")
        return ranks.on_rank_0(lambda: summary)
    while ranks.on_rank_0(lambda: "") == "work":
        stage_module(context.stage).run(context)
    return ranks.on_rank_0(dict)


def _run_stage(context: StageContext, label: str, config: RunConfig | None) -> dict[str, Any]:
    run = context.run
    module = stage_module(context.stage)
    if STAGES[context.stage].model:
        context.keep_commit()
    fingerprint = stage_fingerprint(context, module.inputs(context))
    if context.stage == "report" and run.fingerprint_of(context.name) not in (None, fingerprint.digest):
        # A page is drawn from the other stages' files alone, so drawing it again loses nothing.
        run.remove(context.name)
    if run.stage_is_done(context.name, fingerprint):
        summary = run.summary(context.name)
        context.progress.print("; ".join(filter(None, [f"{label}{context.name}: done before", left_out_line(summary)])))
        return summary
    interrupted = (run.path / context.name / "state.json").exists()
    context.progress.print(f"{label}{context.name}: {'continuing' if interrupted else 'starting'}")
    run.begin_stage(context.name, fingerprint)
    with _saved_config(context, config), run.clock(context.name):
        if STAGES[context.stage].shared:
            ranks.on_rank_0(lambda: "work")
        summary = module.run(context)
    if line := left_out_line(summary):
        context.progress.print(f"{label}{context.name}: {line}")
    return run.finish_stage(context.name, fingerprint, summary)


def stage_fingerprint(context: StageContext, inputs: list[Path]) -> Fingerprint:
    """What the stage's result depends on: its configuration, the seed, its inputs by content, and the model if it has one."""
    parts: dict[str, Any] = {"seed": context.seed}
    at_default = set()
    for section in _sections(context):
        options = getattr(context.config, section)
        defaults = _values(type(options)())
        for key, value in _values(options).items():
            parts[f"{section}.{key}"] = value
            if value == defaults[key]:
                at_default.add(f"{section}.{key}")
    if context.stage == "augment" and context.config.data.source != "shapes":
        # Without the held-out pictures in training, an evaluation that held some out would be of pictures trained on.
        parts["holds_out"] = context.config.holds_out
    if (context.stage == "train" and context.options.replay) or (
        context.stage == "score" and context.options.layer in ("all", "best")
    ):
        # By which wrong answers of replayed records are drawn, and layers compared.
        parts["select.match"] = match_of(context.config.select)
    if context.stage == "train" and online_settings(context.config).alpha:
        parts |= {f"online.{key}": value for key, value in _values(online_settings(context.config)).items()}
        rating = {key: value for key, value in _values(context.config.rate).items() if key not in _OF_THE_STAGE}
        parts |= {f"rate.{key}": value for key, value in rating.items()}
    if context.stage == "report":
        parts["name"] = context.config.name
    if context.stage == "evaluate" and context.asked_attributes:
        parts["asked"] = with_attributes("", context.asked_attributes, context.config.rank)
    if context.stage == "evaluate" and context.options.benchmarks:
        parts["benchmark_files"] = benchmark_marks(context.options)
    if context.stage == "pairs" and context.further_views:
        parts["further_views"] = list(context.further_views)
    if context.method.file is not None:
        parts["method"] = content_hash(context.method.file)
    if STAGES[context.stage].model:
        parts["model"] = context.model_mark
        parts["dtype"] = context.config.dtype
        if context.config.quantization.load_in_4bit:
            parts |= {f"quantization.{key}": value for key, value in _values(context.config.quantization).items()}
        parts["chat_template_kwargs"] = context.config.chat_template_kwargs
        if not context.config.chat_template_kwargs:
            at_default.add("chat_template_kwargs")
    for path in inputs:
        inside = path.absolute().is_relative_to(context.run.path)
        name = path.absolute().relative_to(context.run.path).as_posix() if inside else path.name
        if not inside and not path.exists():
            raise RunFolderError(f"{path} does not exist, and is none of the run's own files: mend its path, or leave it out")
        parts[f"input {name}"] = content_hash(path)
    return Fingerprint(json.loads(json.dumps(parts)), frozenset(at_default))


def _sections(context: StageContext) -> tuple[str, ...]:
    """Sections of the configuration that a stage's result depends on."""
    made = ("data", "augment") if context.stage == "evaluate" and context.method.evaluation_prompts == "augmented" else ()
    return *made, *STAGES[context.stage].also, context.stage


def _values(options: Any) -> dict[str, Any]:
    """The values of a section that can change what a stage writes, or what of them can."""
    values = {}
    for each in dataclasses.fields(options):
        counts, value = each.metadata.get("result", True), getattr(options, each.name)
        if counts:
            values[each.name] = counts(value) if callable(counts) else value
    return values


def set_threads(threads: int | None) -> None:
    """CPU threads of PyTorch; None leaves its own default."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


Step = tuple[str, Moment | None, str | None]


def _steps(config: RunConfig) -> Iterator[Step]:
    """(stage, moment, arm) in order. Stages before one with an input of the user's own are not needed."""
    method = method_named(config.method)
    names = method.stages_of(config)
    made = names[: names.index("evaluate")]
    # What an optional stage is given is its own affair: the others do not read what it writes in place of what they read without it.
    given = [n for n, stage in enumerate(made) if stage not in method.optional and getattr(getattr(config, stage), "input", None)]
    first = max(given, default=0)
    main: list[Step] = [(stage, None, None) for n, stage in enumerate(made) if n >= first or stage in method.optional]
    yield from main
    yield "evaluate", "before", None
    yield "evaluate", "after", None
    for arm in config.arms:
        own = config.for_arm(arm)
        # What an arm trains on of the user's own needs no stage of it before.
        yield from ((stage, None, arm) for stage in made if STAGES[stage].arm and (stage == "train" or not own.train.input))
        yield "evaluate", "after", arm
    yield "report", None, None


def _context(config: RunConfig, run: RunFolder, progress: Progress, step: Step) -> StageContext:
    stage, moment, arm = step
    return StageContext(run=run, config=config.for_arm(arm), stage=stage, moment=moment, arm=arm, progress=progress)


def restart_from(run: RunFolder, name: str, arms: tuple[str, ...] = ()) -> None:
    """Remove a stage and those that depend on it. `name`: a stage, `evaluate/after`, `arms/<arm>/<stage>`."""
    *prefix, stage = name.removesuffix("/before").removesuffix("/after").split("/")
    if stage not in STAGES or (prefix and (len(prefix) != 2 or prefix[0] != "arms")):
        raise ConfigError(f"--restart: {name!r} is not a stage; expected {', '.join(STAGES)} or arms/NAME/STAGE")
    later = _ORDER[_ORDER.index(stage) :]
    known = {*arms, *(path.name for path in (run.path / "arms").glob("*"))}
    if prefix and prefix[1] not in known:
        raise ConfigError(f"--restart: there is no arm {prefix[1]!r}; this run has {', '.join(sorted(known)) or 'none'}")
    if prefix:
        folders = [f"{name.rsplit('/' + stage, 1)[0]}/{each}" for each in later if STAGES[each].arm]
    else:
        # Evaluation prompts are made by pairs, or with augment's settings; the model before training depends on nothing later.
        whole = stage in ("augment", "pairs", "evaluate") and not name.endswith("/after")
        folders = [each if each != "evaluate" or whole else "evaluate/after" for each in later if each != "report"]
        folders += [f"arms/{arm}/{each}" for arm in sorted(known) for each in later if STAGES[each].arm]
    for folder in ["report", *folders]:
        run.remove(folder)
    for file in ("report.html", "summary.json"):
        (run.path / file).unlink(missing_ok=True)


@contextlib.contextmanager
def _saved_config(context: StageContext, config: RunConfig | None) -> Iterator[None]:
    """Save `config` with the run; where the stage fails with nothing written, what was saved before comes back."""
    path = context.run.path / "config.yaml"
    before = path.read_bytes() if path.exists() else None
    if config is not None:
        save_config(context.run, config)
    try:
        yield
    except BaseException:
        if config is not None and not context.run.holds_output(context.name):
            # On a full disk it cannot come back; the error is to be about that.
            with contextlib.suppress(MmdpoError, OSError):
                path.unlink(missing_ok=True) if before is None else write_atomic(path, before)
        raise


def save_config(run: RunFolder, config: RunConfig) -> None:
    """Write the resolved configuration as `config.yaml`, which stage commands on this folder start from."""
    import yaml

    values = json.loads(json.dumps({**config.to_dict(), "run_dir": None}))
    for section in (values["augment"]["num_images"], values["select"]["thresholds"]):
        for name, table in section.items():
            section[name] = {int(count): value for count, value in table.items()}
    write_atomic(run.path / "config.yaml", yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def write_summary(run: RunFolder, config: RunConfig) -> dict[str, Any]:
    """Write and return the run's `summary.json`, from the summaries of the stages that are done."""
    summary: dict[str, Any] = {"name": config.name, "seed": config.seed, "model": config.model, "method": config.method}
    summary |= method_named(config.method).summary(run.path, tuple(config.arms))
    evaluations = {"before": "evaluate/before", "after": "evaluate/after"}
    evaluations |= {arm: f"arms/{arm}/evaluate/after" for arm in config.arms}
    if benchmarks := benchmark_summary({who: run.path / folder for who, folder in evaluations.items()}):
        summary["benchmarks"] = benchmarks
    names = stage_folders(tuple(config.arms))
    # Of evaluation prompts, which are made beside their answers.
    losses = {name: read_json(run.path / name / "summary.json", missing={}).get("lost") for name in ("evaluate", *names)}
    described = summary.get("benchmarks", {}).get("benchmarks", {})
    losses |= {f"benchmark {key}": each.get("lost") for key, each in described.items()}
    summary["lost"] = {name: found for name, found in losses.items() if found}
    seconds = {name: round(run.seconds(name), 2) for name in names if (run.path / name / "state.json").exists()}
    summary["seconds"] = {**seconds, "total": round(sum(seconds.values()), 2)}
    write_atomic(run.path / "summary.json", summary)
    return summary
