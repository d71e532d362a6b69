"""How a value that cannot work is refused, and the one check that every config shares."""

import dataclasses
import re
import types
import typing
from typing import Any, Literal


class ConfigError(ValueError):
    """A value that cannot work: names the field, what was wanted, what came and what to do."""

    def __init__(self, name: str, wanted: str, came: object, fix: str = ""):
        super().__init__(f"{name}: wanted {wanted}, got {came!r}." + (f" {fix}" if fix else ""))


def require(condition: bool, name: str, wanted: str, came: object, fix: str = "") -> None:
    """Raises ConfigError unless the condition holds."""
    if not condition:
        raise ConfigError(name, wanted, came, fix)


def require_variable(name: str, came: str) -> None:
    """Raises ConfigError unless ``came`` can be the name of an environment variable.

    What came is not shown: whoever pastes a key in the place of its variable must not find it in a log.
    """
    fine = re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,63}", came) is not None
    fix = "Put it into a variable and give that variable's name."
    require(fine, name, "the name of an environment variable", "something else (hidden)", fix)


def check_choices(config: Any, prefix: str = "") -> None:
    """Refuses, anywhere in the tree, a value that is not among the choices its field lists.

    The command line checks this by itself; a config file in Python would not.
    """
    hints = typing.get_type_hints(type(config))
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            check_choices(value, f"{prefix}{item.name}.")
            continue
        choices = _choices(hints[item.name])
        given = value if isinstance(value, tuple) else (value,)
        for one in given:
            require(
                not choices or one in choices,
                prefix + item.name,
                f"one of {', '.join(map(str, choices))}",
                one,
            )


def _choices(hint: Any) -> tuple[Any, ...]:
    """The values of a Literal, alone or inside a tuple; empty for any other type."""
    if typing.get_origin(hint) is Literal:
        return typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        return _choices(typing.get_args(hint)[0])
    assert not isinstance(hint, types.UnionType) or not any(_choices(arm) for arm in typing.get_args(hint))
    return ()
