"""Keys and tokens: read from the environment, sent in one header, and shown to nobody.

>>> secret_of("JUDGE_KEY", {"JUDGE_KEY": "sk-12 \\n"})
'sk-12'
>>> hide("you sent Bearer sk-12", "sk-12")
'you sent Bearer [secret]'
"""

from collections.abc import Mapping

from kardia_jax.config import ConfigError


def secret_of(variable: str, environment: Mapping[str, str]) -> str:
    """What the variable holds, without white space around it; empty where it is not set.

    Raises ConfigError for what no header can carry: a library that is handed it may repeat it in its error.
    """
    secret = environment.get(variable, "").strip()
    if not secret.isascii() or not secret.isprintable() or " " in secret:
        fix = "Is a line break in it, or a blank?"
        raise ConfigError(variable, "printable ASCII without blanks", "something else (hidden)", fix)
    return secret


def hide(text: str, secret: str) -> str:
    """The text without the secret, which some servers repeat to whoever sent a wrong one."""
    return text.replace(secret, "[secret]") if secret else text
