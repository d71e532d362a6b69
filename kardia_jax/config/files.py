"""Config files: Python with ``get_config() -> Config``, and how one is made from another.

config = load_config(pathlib.Path(__file__).with_name("kardia_qwen2_5_7b.py"))
return dataclasses.replace(config, model=dataclasses.replace(config.model, source="models/qwen2.5-3b"))
"""

import importlib.util
import pathlib

from kardia_jax.config.errors import ConfigError
from kardia_jax.config.tree import Config


def load_config(path: pathlib.Path) -> Config:
    """Runs the file's ``get_config()``; raises ConfigError for a file that is missing, breaks or gives no config."""
    if not path.is_file():
        raise ConfigError("config file", "an existing Python file with get_config()", str(path))
    spec = importlib.util.spec_from_file_location("kardia_config", path)
    if spec is None or spec.loader is None:
        raise ConfigError("config file", "a .py file", str(path))
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        make = vars(module).get("get_config")
        config = make() if callable(make) else None
    except ConfigError:
        raise
    except Exception as error:  # the file is a program of the user's; whatever is wrong in it is theirs to read
        raise ConfigError(str(path), "a file that runs", f"{type(error).__name__}: {error}") from error
    if not isinstance(config, Config):
        raise ConfigError(str(path), "a function get_config() -> kardia_jax.config.Config", config)
    return config
