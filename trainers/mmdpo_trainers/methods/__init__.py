"""The methods, one declaration a file: which stages a run has, what it trains with, how it is evaluated and what its page shows.

Imported by training, report, stages, run and cli, which name no method; imports data and what is below it. Declarations are found, not
listed: a file here that holds a `METHOD` is one, and so is a file of the user's own, which `method:` gives the path of.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import importlib.util
import pkgutil
from pathlib import Path
from typing import Any

from mmdpo_trainers.config.run_config import RunConfig
from mmdpo_trainers.config.sections.online import OnlineConfig
from mmdpo_trainers.errors import ConfigError
from mmdpo_trainers.methods.method import Method

__all__ = ["METHODS", "Method", "check_method", "method_named", "online_settings", "preset_args", "presets"]


ONLINE = "online"
"""Of a preset what is no field of PreferenceConfig: values of the section `online`."""


def _found() -> dict[str, Method]:
    modules = (importlib.import_module(f"{__name__}.{each.name}") for each in pkgutil.iter_modules(__path__))
    declared = [module.METHOD for module in modules if hasattr(module, "METHOD")]
    # Runs are of the default method unless they say otherwise, so that one comes first where methods are listed.
    default = RunConfig().method
    return {method.name: method for method in sorted(declared, key=lambda method: (method.name != default, method.name))}


def method_named(name: str) -> Method:
    """The method that `method:` of a configuration means: a name, or the path of a .py file with a `METHOD`.

    Raises ConfigError naming the nearest method, or what the file lacks.
    """
    if name in METHODS:
        return METHODS[name]
    if name.endswith(".py"):
        return _of_file(Path(name))
    near = difflib.get_close_matches(name, METHODS, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    known = ", ".join(METHODS)
    raise ConfigError(f"method must be one of {known}, or a .py file that declares one, got the text {name!r}{hint}")


@functools.cache
def _of_file(path: Path) -> Method:
    if not path.is_file():
        raise ConfigError(f"method: {path} does not exist; expected one of {', '.join(METHODS)}, or a .py file that declares one")
    spec = importlib.util.spec_from_file_location(f"mmdpo_method_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"method: {path} cannot be imported ({type(error).__name__}: {error}); mend it") from error
    method = getattr(module, "METHOD", None)
    if not isinstance(method, Method):
        raise ConfigError(f"method: {path} declares none: expected METHOD, a mmdpo_trainers.methods.Method, got {method!r}")
    return dataclasses.replace(method, file=path)


def check_method(config: RunConfig, where: str = "configuration") -> RunConfig:
    """The same configuration. ConfigError, opened by `where`, for a method, a preset or arms that there cannot be."""
    try:
        method = method_named(config.method)
        _check_preset(config)
        for name, overrides in config.arms.items():
            if name == method.name:
                raise ConfigError(f"arms: {name!r} is the name of the main arm; call this one something else")
            for section in overrides:
                if section not in method.arm_sections:
                    own = " and ".join(method.arm_sections)
                    raise ConfigError(f"arms.{name}: {section!r} cannot differ between arms; an arm overrides {own}")
            _check_preset(config.for_arm(name))
    except ConfigError as error:
        raise error if str(error).startswith(where) else ConfigError(f"{where}: {error}") from None
    return config


def presets(method: Method) -> dict[str, dict[str, Any]]:
    """Every preset that a run of this method may name: those of all methods that have its trainer, and the method's own."""
    alike = (each for each in (*METHODS.values(), method) if each.trainer == method.trainer)
    return {name: dict(values) for each in alike for name, values in each.presets.items()}


def _check_preset(config: RunConfig) -> None:
    known, given = presets(method_named(config.method)), config.train.preset
    if given is not None and given not in known:
        near = difflib.get_close_matches(given, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"train.preset must be one of {', '.join(known)} or null, got the text {given!r}{hint}")


def preset_args(config: RunConfig) -> dict[str, Any]:
    """A run's `train.args` over those of its preset."""
    preset = {name: value for name, value in _preset(config).items() if name != ONLINE}
    return {**preset, **config.train.args}


def online_settings(config: RunConfig) -> OnlineConfig:
    """A run's section `online`, with the preset's values in place of those that are not given; alpha 0 where neither says one."""
    preset = {name: value for name, value in _preset(config).get(ONLINE, {}).items() if getattr(config.online, name) is None}
    settings = dataclasses.replace(config.online, **preset)
    return dataclasses.replace(
        settings, alpha=settings.alpha or 0.0, use=settings.use or "pair", without_pair=settings.without_pair or "offline"
    )


def _preset(config: RunConfig) -> dict[str, Any]:
    _check_preset(config)
    method = method_named(config.method)
    return presets(method)[config.train.preset or method.default_preset]


METHODS: dict[str, Method] = _found()
"""Name -> method, of those that come with the package."""
