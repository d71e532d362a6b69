"""Address and token: where a server may listen, and what it says where it may not."""

import socket

import pytest

from kardia_jax.cli import main
from kardia_jax.config import ConfigError, ServeConfig
from kardia_jax.serve.server import address, bound, read_token


def test_beyond_loopback_a_token_is_required_and_the_message_says_how(monkeypatch, capsys):
    monkeypatch.delenv("KARDIA_JUDGE_TOKEN", raising=False)
    for host in ("0.0.0.0", "::", "192.0.2.7", "judge.example.org"):
        with pytest.raises(ConfigError, match="export KARDIA_JUDGE_TOKEN="):
            read_token(ServeConfig(host=host))
    assert main(["judge", "serve", "--host", "0.0.0.0"]) == 2
    assert "export KARDIA_JUDGE_TOKEN=" in capsys.readouterr().err


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.9.9.9"])
def test_on_loopback_a_token_is_a_choice(host, monkeypatch):
    monkeypatch.delenv("KARDIA_JUDGE_TOKEN", raising=False)
    assert read_token(ServeConfig(host=host)) is None
    monkeypatch.setenv("KARDIA_JUDGE_TOKEN", "abc")
    assert read_token(ServeConfig(host=host)) == "abc"


@pytest.mark.parametrize("token", ["two words", "line\nbreak", "ümlaut"])
def test_a_token_that_no_header_can_carry_is_refused_and_not_shown(token, monkeypatch):
    monkeypatch.setenv("KARDIA_JUDGE_TOKEN", token)
    with pytest.raises(ConfigError) as refused:
        read_token(ServeConfig())
    assert token not in str(refused.value)


def test_an_address_that_is_taken_or_is_not_ours_says_which_and_what_to_do():
    with bound(ServeConfig(port=0)) as first:
        port = first.getsockname()[1]
        assert address(first) == f"http://127.0.0.1:{port}"
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}.*--port"), bound(ServeConfig(port=port)):
            pass
    with pytest.raises(ConfigError, match=r"192\.0\.2\.7"), bound(ServeConfig(host="192.0.2.7", port=0)):
        pass


def test_ipv6_loopback_is_an_address_like_any_other():
    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    try:
        with bound(ServeConfig(host="::1", port=0)) as listener:
            assert address(listener).startswith("http://[::1]:")
    except ConfigError:
        pytest.skip("no IPv6 loopback here")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"port": 70000}, "port"),
        ({"max_batch": 0}, "max_batch"),
        ({"max_batch": 10, "max_waiting": 5}, "max_waiting"),
        ({"drain_seconds": 0.0}, "drain_seconds"),
        ({"max_body_mb": float("inf")}, "max_body_mb"),
        ({"token_env": ""}, "token_env"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        ServeConfig(**settings)


def test_the_command_lists_its_fields_and_refuses_a_kind_that_is_none(capsys):
    assert main(["judge", "serve", "--help"]) == 0
    said = capsys.readouterr().out
    assert "--judge.remote.urls" in said
    assert "--max-batch" in said
    assert main(["judge", "--help"]) == 0
    assert "probe" in capsys.readouterr().out
    assert main(["judge", "sing"]) == 2
    assert "one of serve, probe, show" in capsys.readouterr().err
