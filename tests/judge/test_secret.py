"""Keys come from the environment and are never shown."""

import pytest

from kardia_jax.config import ConfigError
from kardia_jax.config.judge import EndpointConfig, JudgeConfig, RemoteConfig
from kardia_jax.config.serve import ServeConfig
from kardia_jax.judge.factory import make_judge
from kardia_jax.judge.secret import secret_of
from kardia_jax.rewards.rubric import load_rubric

RUBRIC = load_rubric("kardia_five")
ENDPOINT = JudgeConfig(kind="endpoint", endpoint=EndpointConfig(model="m", key_env="MY_KEY"))
REMOTE = JudgeConfig(kind="remote", remote=RemoteConfig(token_env="MY_KEY"))


def test_white_space_around_a_secret_is_not_part_of_it():
    assert secret_of("KEY", {"KEY": " sk-1\n"}) == "sk-1"
    assert secret_of("KEY", {}) == secret_of("KEY", {"KEY": " "}) == ""


@pytest.mark.parametrize("secret", ["sk-two words", "sk-two\nlines", "sk-ümlaut", "sk-\x7f"])
@pytest.mark.parametrize("config", [ENDPOINT, REMOTE], ids=["endpoint", "remote"])
def test_a_secret_that_no_header_can_carry_is_refused_by_its_variable_and_not_shown(secret, config, monkeypatch):
    # Sent as it is, a line break in it ends in a library's "Illegal header value b'Bearer sk-two\\nlines'".
    monkeypatch.setenv("MY_KEY", secret)
    with pytest.raises(ConfigError, match=r"MY_KEY: wanted printable ASCII without blanks") as refused:
        make_judge(config, RUBRIC)
    assert "sk-" not in str(refused.value)


@pytest.mark.parametrize(
    "make",
    [
        lambda: EndpointConfig(key_env="sk-pasted-by-mistake"),
        lambda: RemoteConfig(token_env="sk-pasted-by-mistake"),
        lambda: ServeConfig(token_env="sk-pasted-by-mistake"),
    ],
)
def test_a_secret_in_the_place_of_its_variable_is_not_shown(make):
    with pytest.raises(ConfigError, match=r"_env: wanted the name of an environment variable") as refused:
        make()
    assert "sk-" not in str(refused.value)
