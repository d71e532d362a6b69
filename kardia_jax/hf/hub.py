"""The Hugging Face Hub: a checkpoint from there, a directory to there.

    download("Qwen/Qwen2.5-0.5B-Instruct")        # the path of a local snapshot, safetensors and small files only
    push(pathlib.Path("out/my-kardia"), "me/my-kardia")

Every failure says what to do about it.
"""

import pathlib
import re

import huggingface_hub
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

from kardia_jax.hf.tables import HfError

ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
WANTED = (
    *("*.safetensors", "*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt"),
    *("README.md", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*"),
)
"""No pickles, no other framework's weights."""
FOLDERS = ("*/*",)
"""Left out: some repositories keep the weights a second time in a folder, in another format."""
HUB = "https://huggingface.co"
LOGIN = "log in with `hf auth login`, or set HF_TOKEN"


def local(source: str) -> pathlib.Path:
    """The path that ``source`` names, or a snapshot of the Hub model of that id; HfError where there is neither."""
    path = pathlib.Path(source).expanduser()
    if path.exists():
        return path
    if not ID.fullmatch(source):
        raise HfError(f"{source}: wanted a directory or a Hub id like owner/name, got neither. Check the path.")
    return download(source)


def download(repo: str) -> pathlib.Path:
    """A snapshot of a model on the Hub, through the Hub's cache. Raises HfError that says what to do."""
    # Every kind is caught: the HTTP client underneath raises its own, which change from release to release.
    try:
        return pathlib.Path(
            huggingface_hub.snapshot_download(repo, allow_patterns=list(WANTED), ignore_patterns=list(FOLDERS))
        )
    except Exception as error:
        raise HfError(f"{repo} on the Hub: {_meaning(repo, error)}") from error


def require_token(repo: str) -> str:
    """The token of this machine's user; HfError without one, or for a name that is no repository."""
    if not ID.fullmatch(repo):
        raise HfError(f"push: wanted a repository like owner/name, got {repo!r}.")
    token = huggingface_hub.get_token()
    if not token:
        raise HfError(f"push: wanted a Hugging Face token to write to {repo}, got none. To go on, {LOGIN}.")
    return token


def push(folder: pathlib.Path, repo: str) -> str:
    """Uploads a directory, into a new repository where there is none; returns its address."""
    api = huggingface_hub.HfApi(token=require_token(repo))
    try:
        api.create_repo(repo, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=str(folder), commit_message="Upload model")
    except Exception as error:
        kept = f"The model is complete in {folder}."
        raise HfError(f"push: {repo} on the Hub: {_meaning(repo, error)} {kept}") from error
    return f"{HUB}/{repo}"


def _meaning(repo: str, error: Exception) -> str:
    """What a failure means and what to do about it."""
    page = f"{HUB}/{repo}"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, GatedRepoError) or status == 403:
        return f"access refused. Accept the licence on {page} if it is gated, and {LOGIN} with the rights for it."
    if isinstance(error, RepositoryNotFoundError):
        return f"no such model, or one that your account may not see. Check the name; for a private one {LOGIN}."
    if status == 401:
        return f"not logged in, or with a token that has expired. To go on, {LOGIN}."
    if isinstance(error, ConnectionError):
        return "the Hub cannot be reached. Check the network, or give a folder that holds the downloaded files."
    return f"it failed ({type(error).__name__}: {error}). See {page}."
