"""``kardia eval``: a policy's held-out numbers as a table, a JSON file and every answer in full."""

from kardia_jax.config import Config
from kardia_jax.demo import write_summary
from kardia_jax.evaluate import evaluate, summarise, write_rows
from kardia_jax.model.sharding import make_mesh
from kardia_jax.observe.phases import PhaseTimer
from kardia_jax.observe.results import results_table, wide_console
from kardia_jax.policies import load_policy
from kardia_jax.scoring import make_grader


def evaluate_and_report(config: Config) -> None:
    """Evaluates ``model.source``; writes eval.json and answers.jsonl into ``run.dir``."""
    timer = PhaseTimer()
    with timer.phase("load"):
        policy = load_policy(config.model, config.run.seed, make_mesh(config.mesh))
    with timer.phase("evaluate"):
        evaluation = evaluate(config, policy, make_grader(config.judge, config.rewards))
    results = {"policy": summarise([evaluation], config.run.seed)}
    write_rows(evaluation, config.run.dir / "answers.jsonl")
    write_summary(config.run.dir / "eval.json", results, timer.take(), seeds=1)
    wide_console().print(results_table(results, f"{config.model.source}, mean [95 % interval over dialogues]"))
