import types

import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

from kardia_jax.hf import hub
from kardia_jax.hf.tables import HfError


def answer(kind, status):
    """The Hub's answer with this status; which HTTP client is underneath changes from release to release."""
    error = kind.__new__(kind)
    Exception.__init__(error, "no")
    error.response = types.SimpleNamespace(status_code=status)
    return error


FAILURES = [
    (
        answer(GatedRepoError, 403),
        r"owner/name on the Hub: access refused\. Accept the licence on https.*hf auth login",
    ),
    (answer(HfHubHTTPError, 403), "access refused"),
    (answer(GatedRepoError, 401), "access refused"),
    (answer(HfHubHTTPError, 401), "not logged in, or with a token that has expired"),
    (answer(RepositoryNotFoundError, 404), "no such model"),
    (ConnectionError("down"), "the Hub cannot be reached. Check the network"),
    (answer(HfHubHTTPError, 500), "it failed"),
]


def raising(error):
    def call(*args, **kwargs):
        raise error

    return call


@pytest.mark.parametrize(("error", "message"), FAILURES)
def test_a_failed_download_says_what_to_do(monkeypatch, error, message):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", raising(error))
    with pytest.raises(HfError, match=message):
        hub.local("owner/name")


def test_a_download_asks_for_safetensors_and_small_files_only(monkeypatch, tmp_path):
    asked = {}

    def snapshot(repo, **patterns):
        asked.update(patterns, repo=repo)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert hub.local("owner/name") == tmp_path
    kept = list(
        huggingface_hub.utils.filter_repo_objects(
            [
                *("model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json", "tokenizer.model"),
                *(
                    "pytorch_model.bin",
                    "tf_model.h5",
                    "original/model.safetensors",
                    "merges.txt",
                    "chat_template.jinja",
                ),
                *("LICENSE.txt", "modeling.py", "README.md", "figure.png"),
            ],
            allow_patterns=asked["allow_patterns"],
            ignore_patterns=asked["ignore_patterns"],
        )
    )
    assert kept == [
        *("model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json", "tokenizer.model"),
        *("merges.txt", "chat_template.jinja", "LICENSE.txt", "README.md"),
    ]


def test_a_local_path_goes_before_the_hub_and_a_typo_is_no_hub_id(tmp_path):
    assert hub.local(str(tmp_path)) == tmp_path
    with pytest.raises(HfError, match="wanted a directory or a Hub id like owner/name, got neither"):
        hub.local(str(tmp_path / "none"))


class FakeApi:
    """What the Hub was asked for."""

    calls: list[tuple[str, str]]

    def __init__(self, token):
        assert token == "secret"
        FakeApi.calls = []

    def create_repo(self, repo, exist_ok):
        assert exist_ok
        self.calls.append(("create", repo))

    def upload_folder(self, repo_id, folder_path, commit_message):
        assert commit_message
        self.calls.append((repo_id, folder_path))


def test_pushing_creates_the_repository_and_uploads_the_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "secret")
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    assert hub.push(tmp_path, "me/model") == "https://huggingface.co/me/model"
    assert FakeApi.calls == [("create", "me/model"), ("me/model", str(tmp_path))]


def test_a_failed_upload_says_where_the_model_is(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "secret")
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    monkeypatch.setattr(FakeApi, "upload_folder", raising(answer(HfHubHTTPError, 403)))
    with pytest.raises(HfError, match=rf"push: me/model on the Hub: access refused.*complete in {tmp_path}"):
        hub.push(tmp_path, "me/model")


@pytest.mark.parametrize(
    ("repo", "message"), [("me/model", "wanted a Hugging Face token.*hf auth login"), ("me", "got 'me'")]
)
def test_without_token_or_name_nothing_is_pushed(monkeypatch, repo, message):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(HfError, match=message):
        hub.require_token(repo)
