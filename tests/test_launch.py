"""Launch scripts: they parse, their tools accept them, and every `kardia` line in them is one that the CLI takes."""

import json
import pathlib
import re
import shutil
import subprocess
import sys

import jsonschema
import pytest
import yaml

from kardia_jax.cli import VERBS, read_config
from kardia_jax.config import Config

ROOT = pathlib.Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
FILES = sorted(path for path in LAUNCH.rglob("*") if path.is_file())
SCRIPTS = [path for path in FILES if path.suffix in (".sh", ".sbatch")]
SCHEMAS = pathlib.Path(__file__).with_name("launch_schemas")
BIN = pathlib.Path(sys.executable).parent
GIVEN = {
    '"$@"': "grpo configs/demo.py",
    '"127.0.0.1:$port"': "127.0.0.1:8476",
    '"$(head -n1 <<< "$SKYPILOT_NODE_IPS"):8476"': "10.0.0.2:8476",
    '"$processes"': "4",
    '"$SKYPILOT_NUM_NODES"': "4",
    '"$1"': "3",
    '"$SKYPILOT_NODE_RANK"': "3",
    '"${@:2}"': "grpo configs/demo.py",
}
"""What the shell puts in, by example."""


def tool(name: str) -> str:
    """A linter from the test extra, beside this Python."""
    found = shutil.which(name, path=str(BIN)) or shutil.which(name)
    assert found is not None, f"{name}: pip install -e '.[test]'"
    return found


def command_lines(path: pathlib.Path) -> list[str]:
    """Every `kardia ...` of a file, its continued lines joined and its variables filled in."""
    text = path.read_text("utf-8")
    code = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#")).replace("\\\n", " ")
    if path.suffix == ".sh" and "docker run" in code:  # the image's entry point is kardia
        code = re.sub(r'"\$IMAGE" ("\$@"[^)]*)\)', r"\nkardia \1\n", code)
    if path.suffix == ".yaml" and "replicatedJobs" in code:
        container = the_container(yaml.safe_load(text))
        return [" ".join(container["command"] + container["args"])]
    lines = re.findall(r"(?:^|\s)(kardia (?:\"\$|[a-z]+ ).*)$", code, re.MULTILINE)
    for variable, value in GIVEN.items():
        lines = [line.replace(variable, value) for line in lines]
    return [re.split(r"\s+(?:\|\||&|>)", line)[0] for line in lines]


def the_container(jobset: dict) -> dict:
    return jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]


def test_there_is_a_script_for_each_kind_of_machine():
    names = {str(path.relative_to(LAUNCH)) for path in FILES}
    assert names == {
        *("local.sh", "slurm.sbatch", "tpu_pod.sh", "gke_jobset.yaml", "skypilot.yaml", "docker/Dockerfile"),
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_short_and_with_its_own_command_in_a_comment(path):
    text = path.read_text("utf-8")
    assert len(text.splitlines()) < 60
    assert f"launch/{path.relative_to(LAUNCH)}" in text


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_has_nothing_to_say(path):
    done = subprocess.run([tool("shellcheck"), str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "set -euo pipefail" in path.read_text("utf-8")


def test_the_linter_of_dockerfiles_has_nothing_to_say():
    # DL3013 wants pinned versions of what pip installs: those are pyproject.toml's, as everywhere.
    done = subprocess.run(
        [tool("hadolint"), "--ignore", "DL3013", str(LAUNCH / "docker/Dockerfile")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", ["gke_jobset", "skypilot"])
def test_the_yaml_has_only_fields_that_exist(name):
    schema = json.loads((SCHEMAS / f"{name}.json").read_text("utf-8"))
    document = yaml.safe_load((LAUNCH / f"{name}.yaml").read_text("utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(document, schema)


@pytest.mark.parametrize(
    ("name", "place", "value"),
    [
        ("gke_jobset", ("spec", "failurePolicy", "maxRestart"), 3),
        ("gke_jobset", ("spec", "replicatedJobs", 0, "replicas"), "1"),
        ("skypilot", ("resources", "accelerator"), "H100:8"),
        ("skypilot", ("num_nodes",), "2"),
    ],
)
def test_a_field_that_does_not_exist_is_noticed(name, place, value):
    schema = json.loads((SCHEMAS / f"{name}.json").read_text("utf-8"))
    document = yaml.safe_load((LAUNCH / f"{name}.yaml").read_text("utf-8"))
    inner = document
    for step in place[:-1]:
        inner = inner[step]
    inner[place[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, schema)


@pytest.mark.parametrize("path", [path for path in FILES if path.name != "Dockerfile"], ids=lambda path: path.name)
def test_every_kardia_line_is_one_that_the_command_line_takes(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    lines = command_lines(path)
    assert len(lines) == 1, lines
    verb, *arguments = lines[0].split()[1:]
    assert verb in VERBS
    config = read_config(verb, arguments)
    assert isinstance(config, Config)
    assert config.run.auto_resume, "a job that is started again must go on"
    # Nobody is left to find out by himself that there are others.
    assert config.hosts.cluster != "auto" or config.hosts.coordinator


def test_the_image_starts_kardia_itself_and_has_the_extras_that_exist():
    text = (LAUNCH / "docker/Dockerfile").read_text("utf-8")
    assert 'ENTRYPOINT ["kardia"]' in text
    extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE)
    for named in ("cuda12", "cuda13", "tpu", "track", "judge"):
        assert named in extras
        assert named in text


def test_all_processes_of_the_job_set_are_those_of_the_slice():
    jobset = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text("utf-8"))
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    rows, columns = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    chips = the_container(jobset)["resources"]["limits"]["google.com/tpu"]
    assert job["parallelism"] == job["completions"] == rows * columns // chips
    assert [mount["name"] for mount in the_container(jobset)["volumeMounts"]] == [one["name"] for one in pod["volumes"]]
