"""The resolved config as it is saved beside every checkpoint, and read back.

>>> flat(SamplerConfig(temperature=0.5), "eval.sampler.")["eval.sampler.temperature"]
0.5
>>> from_json(to_json(Config())) == Config()
True
"""

import dataclasses
import json
import pathlib
import typing
from typing import Any

from kardia_jax.config.errors import require
from kardia_jax.config.tree import Config


def to_json(config: Any) -> str:
    """Every field by name, lists and strings for tuples and paths."""
    return json.dumps(dataclasses.asdict(config), indent=2, default=str) + "\n"


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted field to value, in order: {"run.seed": 0, ...}."""
    out: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        out |= flat(value, f"{prefix}{item.name}.") if dataclasses.is_dataclass(value) else {prefix + item.name: value}
    return out


def from_json(text: str) -> Config:
    """The config that ``to_json`` wrote; raises ConfigError for a field that this version does not know."""
    return _built(Config, json.loads(text), "")


def _built(kind: Any, values: dict[str, Any], prefix: str) -> Any:
    hints = typing.get_type_hints(kind)
    for name in values:
        require(name in hints, prefix + name, f"one of {', '.join(hints)}", values[name])
    return kind(**{name: _value(hints[name], value, f"{prefix}{name}.") for name, value in values.items()})


def _value(hint: Any, value: Any, prefix: str) -> Any:
    """JSON knows neither paths nor tuples nor our classes."""
    if dataclasses.is_dataclass(hint):
        return _built(hint, value, prefix)
    if value is not None and pathlib.Path in (hint, *typing.get_args(hint)):
        return pathlib.Path(value)
    return tuple(value) if isinstance(value, list) else value
