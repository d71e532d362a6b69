import json
import pathlib
import subprocess
import sys

import huggingface_hub
import pytest

from kardia_jax import export, scoring, sft
from kardia_jax.cli import VERBS, main
from kardia_jax.config import Config, flat
from kardia_jax.hf.write import save_directory

FLAGS = ["--" + name.replace("_", "-") for name in flat(Config())]


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    """So that no message is wrapped inside a word that a test looks for."""
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("NO_COLOR", "1")


@pytest.fixture
def refused(capsys):
    """Runs a command that must fail with this exit code and gives what it said on stderr."""

    def run(*arguments: str, code: int = 2) -> str:
        assert main(arguments) == code
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        assert said.err.strip()
        return said.err

    return run


def test_help_by_any_name_lists_the_verbs(capsys):
    for arguments in ([], ["-h"], ["--help"], ["help"]):
        assert main(arguments) == 0
        said = capsys.readouterr().out
        assert all(f"\n  {verb} " in said for verb in VERBS)


@pytest.mark.parametrize("verb", ["demo", "sft", "grpo", "eval"])
def test_a_verbs_help_lists_every_field_with_its_default(verb, capsys):
    assert main([verb, "--help"]) == 0
    said = capsys.readouterr().out
    # A switch is followed by a comma and its opposite.
    assert [flag for flag in FLAGS if f"{flag} " not in said and f"{flag}, " not in said] == []
    assert "Completions per prompt (G)." in said
    assert "(default: 8)" in said
    assert ("--seeds " in said) == (verb == "demo")


@pytest.mark.parametrize(
    ("verb", "pieces"),
    [
        ("import", ("SOURCE", "TARGET", "--dtype {keep,float32,bfloat16,float16}", "--max-shard-size", "--overwrite")),
        ("export", ("SOURCE", "TARGET", "--dtype {keep,float32,bfloat16,float16}", "--max-shard-size", "--push")),
        ("verify", (" A ", " B", "--against {directory,transformers}", "--json", "--tolerance", "(default: 64)")),
        ("doctor", ("no arguments",)),
        ("bench", ("{step,sample,update,import}",)),
        ("plan", ("--devices", "--topology", "--chip", "--json", "--mesh.fsdp", "--grpo.group")),
    ],
)
def test_the_other_verbs_have_help_too(verb, pieces, capsys):
    for flag in ("-h", "--help"):
        assert main([verb, flag]) == 0
        said = capsys.readouterr().out
        assert all(piece in said for piece in pieces)


def test_help_shows_what_the_config_file_set(config_of, config_file, capsys):
    assert main(["grpo", config_file(config_of({"grpo.group": 77})), "--help"]) == 0
    assert "(default: 77)" in capsys.readouterr().out


def test_the_package_is_a_program():
    command = [sys.executable, "-m", "kardia_jax", "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: kardia VERB")


@pytest.mark.parametrize(
    ("arguments", "pieces"),
    [
        (
            ("frob",),
            (
                "verb: wanted one of demo, sft, grpo, eval, import, export, verify, doctor, bench, ",
                "judge, plan, got 'frob'",
                "kardia VERB --help",
            ),
        ),
        (("grpo", "--grpo.grp", "3"), ("--grpo.grp", "--grpo.group", "kardia grpo --help")),
        (("grpo", "--grpo.loss.name", "ppo"), ("--grpo.loss.name", "'ppo'", "'cispo', 'gspo'")),
        (("grpo", "--grpo.group", "many"), ("--grpo.group", "'many'", "Completions per prompt")),
        (("grpo", "--grpo.group", "0"), ("grpo.group: wanted at least 2",)),
        (("sft", "--sft.batch", "6", "--sft.micro-batches", "4"), ("sft.micro_batches", "got 4", "a divisor of 6")),
        (("eval", "--eval.batch", "0"), ("eval.batch: wanted at least 1, got 0",)),
        (
            ("grpo", "--grpo.loss.name", "cispo", "--grpo.loss.importance", "sequence"),
            ("grpo.loss.importance: wanted auto or token with name cispo, got 'sequence'", "use name gspo"),
        ),
        (("grpo", "--grpo.sampler.temperature", "0"), ("grpo.sampler.temperature: wanted more than 0", "set grpo.")),
        (
            ("sft", "--model.lora.rank", "4", "--model.lora.targets", "q_proj", "qkv"),
            ("model.lora.targets: wanted one of all-linear, q_proj, k_proj, v_proj, o_proj, gate_proj", "got 'qkv'"),
        ),
        (
            ("sft", "--model.lora.rank", "4", "--model.lora.targets", "lm_head"),
            ("got 'lm_head'. Adapters on the embedding or the LM head are not supported.",),
        ),
        (("sft", "--model.lora.base", "bfloat16"), ("model.lora.base: wanted float32 without an adapter",)),
        (("sft", "--model.lora.targets", "q_proj"), ("model.lora.rank: wanted at least 1 with settings for an",)),
        (("sft", "--model.lora.rank", "4", "--model.adapter", "a"), ("model.lora.rank: wanted 0 with model.adapter",)),
        (("grpo", "nowhere.py"), ("config file: wanted an existing Python file with get_config(), got 'nowhere.py'",)),
        (("demo",), ("demo: wanted a config file first, got None", "kardia demo configs/demo.py")),
        (("demo", "--seeds", "3"), ("demo: wanted a config file first, got '--seeds 3'",)),
        (("export",), ("SOURCE", "TARGET")),
        (("export", "nowhere", "out"), ("source: wanted a run folder with verb.json and config.json, or a model dir",)),
        (("import",), ("SOURCE", "TARGET")),
        (("import", "a/b/c", "out"), ("a/b/c: wanted a directory or a Hub id like owner/name, got neither",)),
        (("verify",), ("A",)),
        (("verify", "nowhere"), ("verify: wanted two directories, or one with --against transformers",)),
        (("verify", "a", "b", "--against", "transformers"), ("got 'two, and transformers'",)),
        (("verify", "nowhere", "out"), ("nowhere: wanted a directory of a Hugging Face model",)),
        (("verify", "a", "b", "--prompts", "11"), ("prompts: wanted 1 to 10, got 11",)),
        (("export", "a", "b", "--dtype", "float8"), ("--dtype", "'float8'", "'bfloat16'")),
        (("doctor", "now"), ("now", "kardia doctor --help")),
    ],
)
def test_a_mistake_on_the_command_line_is_explained(arguments, pieces, refused):
    said = refused(*arguments)
    assert [piece for piece in pieces if piece not in said] == []


@pytest.mark.parametrize(
    ("name", "text", "wanted"),
    [
        ("empty.py", "", "empty.py: wanted a function get_config() -> kardia_jax.config.Config, got None"),
        ("other.py", "def get_config(): return 3", "wanted a function get_config() -> kardia_jax.config.Config, got 3"),
        ("config.yaml", "run: 1", "config file: wanted a .py file"),
        (
            "impossible.py",
            "from kardia_jax.config import *\ndef get_config(): return Config(sft=SftConfig(batch=0))",
            "sft.batch: wanted at least 1, got 0",
        ),
    ],
)
def test_a_config_file_that_gives_no_config_is_explained(name, text, wanted, refused, tmp_path):
    (tmp_path / name).write_text(text, "utf-8")
    assert wanted in refused("grpo", str(tmp_path / name))


def test_overrides_come_after_the_file(config_of, config_file, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(sft, "train_sft", lambda config, policy: seen.append(config))
    monkeypatch.setattr(export, "export_final", lambda *args: None)
    path = config_file(config_of({"sft.batch": 5}))
    assert main(["sft", path, "--run.seed", "4", "--data.train_limit", "2", "--eval.turns", "last"]) == 0
    assert seen == [config_of({"sft.batch": 5, "run.seed": 4, "data.train_limit": 2, "eval.turns": "last"})]


def lines(*rows) -> str:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


@pytest.fixture
def good(world):
    return json.loads((world / "train.jsonl").read_text("utf-8").splitlines()[0])


def refused_data(refused, config_of, config_file, source: pathlib.Path, *more: str) -> str:
    path = config_file(config_of({"data.source": str(source)}))
    said = refused("sft", path, *more)
    assert not config_of().run.dir.exists()
    return said


def test_a_missing_data_file(refused, config_of, config_file, tmp_path):
    said = refused_data(refused, config_of, config_file, tmp_path / "none.jsonl")
    assert "data.source: wanted mini, a .jsonl or .parquet file" in said
    assert "none.jsonl': file not found. Check the path." in said


def test_a_folder_without_the_split(refused, config_of, config_file, tmp_path):
    said = refused_data(refused, config_of, config_file, tmp_path)
    assert "data.source: wanted either train.jsonl or train.parquet" in said


@pytest.mark.parametrize(
    ("change", "pieces"),
    [
        ("", ("data.source: wanted at least one row in the train split", "is empty")),
        ("{broken", ("rows.jsonl:2: row: wanted one JSON object per line, got", "1 rows before it were good")),
        ({"emotion": "hapy"}, ("rows.jsonl:2: emotion: wanted one of the 32 labels, got 'hapy'", "data.bad_rows")),
        ({"emotion": "lonley"}, ("got 'lonley'. Did you mean 'lonely'?",)),
        ({"messages": []}, ("rows.jsonl:2: messages: wanted at least one assistant turn",)),
        ({"situation": " "}, ("rows.jsonl:2: situation: wanted a text that is not empty",)),
    ],
)
def test_data_that_cannot_be_used(change, pieces, good, refused, config_of, config_file, tmp_path):
    file = tmp_path / "rows.jsonl"
    second = change if isinstance(change, str) else {**good, **change}
    file.write_text(lines(good, second) if change else "", "utf-8")
    said = refused_data(refused, config_of, config_file, file)
    assert [piece for piece in pieces if piece not in said] == []


def test_all_rows_bad_is_an_error_even_where_bad_rows_are_skipped(refused, config_of, config_file, tmp_path, good):
    (tmp_path / "rows.jsonl").write_text(lines({**good, "emotion": "blue"}), "utf-8")
    said = refused_data(refused, config_of, config_file, tmp_path / "rows.jsonl", "--data.bad-rows", "skip")
    assert "data.source: all 1 rows of" in said
    assert "emotion: wanted one of the 32 labels, got 'blue'" in said


@pytest.mark.parametrize("verb", ["sft", "grpo", "eval"])
def test_a_prompt_over_the_budget(verb, refused, config_of, config_file):
    said = refused(verb, config_file(config_of({"data.max_prompt_tokens": 40})))
    assert "jsonl:1: the prompt of assistant turn 0 has 68 tokens, wanted at most data.max_prompt_tokens = 40" in said
    assert "Raise data.max_prompt_tokens, or set data.long_prompts to skip." in said


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"model.source": "gpt"}, "model.source: wanted a local directory or one of tiny-qwen2"),
        ({"model.source": "out/hf"}, "model.source: wanted a local Hugging Face directory, got 'out/hf'"),
        ({"model.tokenizer": "out/hf"}, "model.tokenizer: wanted mini or a directory with tokenizer.json"),
        ({"data.system_prompt": pathlib.Path("no.txt")}, "data.system_prompt: wanted a UTF-8 text file, got 'no.txt'"),
        ({"data.max_prompt_tokens": 2048}, "data.max_prompt_tokens: wanted at most the model's 2048 positions"),
        ({"run.resume": True}, "run.resume: wanted a complete checkpoint in"),
        ({"run.trackers": ("tensorboard",)}, "trackers: tensorboard needs the package tensorboardX"),
    ],
)
def test_a_run_that_cannot_start(fields, wanted, refused, config_of, config_file, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    assert wanted in refused("grpo", config_file(config_of(fields)))


@pytest.mark.usefixtures("every_text_counts")
def test_a_judge_that_always_fails_stops_the_run_with_code_1(refused, config_of, config_file, monkeypatch, grader_of):
    monkeypatch.setattr(scoring, "make_grader", lambda judge, weights: grader_of(silent=range(8)))
    said = refused("grpo", config_file(config_of()), code=1)
    assert "kardia grpo: stopped: judge.max_failure_share: 8 of 8 verdicts are missing (100%), allowed are 50%." in said
    assert "8 x too busy" in said
    assert "The state after step 0 is saved in" in said
    assert "go on with --run.resume" in said
    assert not (config_of().run.dir / "hf").exists()


def test_the_way_of_a_policy(config_of, config_file, refused, capsys, tmp_path):
    """Warm start, refusal of a used folder, export, evaluation, and a resume that finds nothing left to do."""
    path, folder, target = config_file(config_of()), config_of().run.dir, tmp_path / "out"
    assert main(["sft", path]) == 0
    assert "sft 4/4" in capsys.readouterr().out
    weights = (folder / "hf" / "model.safetensors").read_bytes()
    said = refused("sft", path)
    assert f"run.dir: wanted a folder without checkpoints, got {folder / 'checkpoints'} with step 4" in said
    assert "--run.resume, or choose another --run.dir" in said
    assert main(["export", str(folder), str(target)]) == 0
    assert (target / "model.safetensors").read_bytes() == weights
    assert "wanted an empty or new folder, got one in use" in refused("export", str(folder), str(target))
    assert main(["eval", path, "--model.source", str(target), "--run.dir", str(tmp_path / "eval")]) == 0
    assert "format_rate" in capsys.readouterr().out
    report = json.loads((tmp_path / "eval" / "eval.json").read_text("utf-8"))
    assert report["policy"]["format_rate"]["mean"] == 0.0
    assert len((tmp_path / "eval" / "answers.jsonl").read_text("utf-8").splitlines()) == 5 * 4
    assert main(["sft", path, "--run.resume"]) == 0
    assert (folder / "hf" / "model.safetensors").read_bytes() == weights
    said = refused("sft", path, "--run.resume", "--sft.batch", "2")
    assert "sft.batch: wanted 3 as in the checkpoint, got 2" in said


def test_the_way_of_a_checkpoint(checkpoint_dir, refused, capsys, tmp_path):
    """Import, export of a directory, comparison, and what is refused on the way with exit code 2."""
    inside, target = str(tmp_path / "in"), str(tmp_path / "out")
    assert main(["import", str(checkpoint_dir), inside, "--dtype", "bfloat16"]) == 0
    assert main(["export", inside, target, "--max-shard-size", "10KB"]) == 0
    assert "exported to" in capsys.readouterr().out
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()
    assert "# out" in (tmp_path / "out" / "README.md").read_text("utf-8")
    assert main(["verify", inside, target, "--json", "--new-tokens", "4", "--prompts", "2"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["agree"] is True
    assert report["tensors"]["equal"] == report["tensors"]["compared"] > 10
    assert main(["verify", str(checkpoint_dir), target, "--new-tokens", "4", "--prompts", "2"]) == 1
    assert "NOT the same" in capsys.readouterr().out
    assert "got one in use" in refused("import", str(checkpoint_dir), inside)
    assert "does not hold the source" in refused("export", inside, inside, "--overwrite")
    assert "apart from the source" in refused("export", inside, inside + "/out")
    assert "max_shard_size: wanted a size such as 5GB" in refused(
        "export", inside, target + "2", "--max-shard-size", "5"
    )
    assert not (tmp_path / "out2").exists()


def test_nothing_is_begun_without_a_token_and_a_model_is_pushed_with_one(
    checkpoint_dir, refused, monkeypatch, tmp_path
):
    asked = []

    class Api:
        def __init__(self, token):
            asked.append(token)

        def create_repo(self, repo, exist_ok):
            asked.append(repo)

        def upload_folder(self, repo_id, folder_path, commit_message):
            asked.append(sorted(path.name for path in pathlib.Path(folder_path).iterdir()))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    command = ("export", str(checkpoint_dir), str(tmp_path / "out"), "--push", "me/model")
    assert "push: wanted a Hugging Face token to write to me/model" in refused(*command)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "secret")
    assert main(command) == 0
    assert asked[:2] == ["secret", "me/model"]
    assert {"model.safetensors", "config.json", "README.md", "tokenizer.json"} <= set(asked[2])


@pytest.fixture
def checkpoint_dir(fresh_policy, tmp_path):
    """A tiny model as somebody might bring it."""
    policy = fresh_policy()
    save_directory(tmp_path / "brought", policy.params, policy.spec, policy.tokenizer, policy.end_ids, "")
    (tmp_path / "brought" / "README.md").unlink()
    return tmp_path / "brought"


def test_the_scripts_are_the_verbs():
    for script, verb in (("from_hf", "import"), ("to_hf", "export"), ("verify", "verify")):
        path = pathlib.Path(__file__).parents[2] / "convert" / f"{script}.py"
        done = subprocess.run([sys.executable, str(path), "--help"], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert f"usage: kardia {verb}" in done.stdout


def test_an_interrupt_says_how_to_go_on(refused, config_of, config_file, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(sft, "train_sft", interrupt)
    assert "--run.resume" in refused("sft", config_file(config_of()), code=130)


def test_a_bug_keeps_its_trace(config_of, config_file, monkeypatch):
    def bug(*args):
        raise ValueError("nobody wrote this for a person")

    monkeypatch.setattr(sft, "train_sft", bug)
    with pytest.raises(ValueError, match="nobody wrote this"):
        main(["sft", config_file(config_of())])


def test_the_doctor_names_libraries_devices_and_shapes(capsys):
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    for piece in ("python ", "jax ", "devices", "attention    xla", "disk", "tokenizer", "demo-qwen3: ", "[track]"):
        assert piece in said
