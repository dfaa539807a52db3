"""Scores: bits per byte and acceptance against sums written out, and tasks against models that are told what to say."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.scripted import ScriptedGenerator, byte_tokenizer, oracle, said, word_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from minglm.chat import render
from minglm.config import EvaluationConfig
from minglm.envs import ENVIRONMENTS
from minglm.envs.arithmetic import Arithmetic
from minglm.envs.base import Score, assistant
from minglm.eval import tasks as eval_tasks
from minglm.eval import text
from minglm.eval.text import bits_per_byte, mtp_acceptance
from minglm.inference import Engine
from minglm.inference.client import EngineGenerator
from minglm.model.glm import GLM, Output
from minglm.testing.model import tiny_model
from minglm.testing.strategies import seeds

TEXTS = (
    "the order is cancelled in the shop, 38+7=45;",
    "两个 words é",
    "a",
    "return pending get_order " * 4,
)


def documents_of(tokenizer, texts=TEXTS):
    """Return documents as they are in the held-out shards: ids, and the end of the text."""
    return [np.array([*tokenizer.encode(text), tokenizer.end]) for text in texts]


def spans(documents, length):
    """Return what is scored: rows of at most `length` tokens, those of one or two left out."""
    cut = [d[at : at + length] for d in documents for at in range(0, len(d), length)]
    return [span for span in cut if len(span) > 2]


@pytest.fixture(scope="module")
def uniform():
    """Return a model that finds every token equally likely."""
    model = GLM(tiny_model(1, vocab_size=330).config)
    torch.nn.init.zeros_(model.lm_head.weight)
    return model


@given(
    texts=st.lists(st.text(min_size=3, max_size=40), min_size=1, max_size=5),
    length=st.integers(3, 70),
    limit=st.sampled_from([1, 60, 10**6]),
)
def test_bits_of_a_uniform_model(uniform, texts, length, limit):
    """log2 of the vocabulary for each predicted token, over the bytes of their text; a special token has no bytes."""
    tokenizer = word_tokenizer()
    rows = spans(documents_of(tokenizer, texts), length)[: max(1, limit // length)]
    if not rows:
        return
    targets = [token for row in rows for token in row[1:].tolist()]
    size = len(tokenizer.bytes([t for t in targets if t != tokenizer.end]))
    found = bits_per_byte(uniform, tokenizer, documents_of(tokenizer, texts), length, limit)
    bits = math.log2(330) * len(targets)
    # float32 logarithms, summed over at most 200 tokens
    assert found == pytest.approx(bits / max(1, size), rel=1e-5)


@settings(max_examples=10)
@given(seed=seeds, length=st.sampled_from([5, 16, 64]))
def test_bits_of_any_model(seed, length):
    """The sum of -log2 p of each token after the first of a row, from a plain forward pass of that row alone."""
    tokenizer = word_tokenizer()
    model = tiny_model(seed, vocab_size=330)
    nats = 0.0
    size = 0
    for row in spans(documents_of(tokenizer), length):
        with torch.no_grad():
            logp_SV = model(torch.tensor(row[None]))[0].log_softmax(-1)
        for s, target in enumerate(row[1:]):
            nats -= logp_SV[s, target].item()
        size += len(tokenizer.bytes([t for t in row[1:] if t != tokenizer.end]))
    found = bits_per_byte(model, tokenizer, documents_of(tokenizer), length, 10**6)
    bits = nats / math.log(2)
    assert found == pytest.approx(bits / size, rel=1e-4)  # float32 logits of size 10


def test_bits_do_not_depend_on_the_passes(monkeypatch, uniform):
    """Rows are scored a few at a time, and the result is that of all at once."""
    tokenizer = word_tokenizer()
    sizes = []
    hidden = GLM.hidden
    monkeypatch.setattr(
        GLM,
        "hidden",
        lambda self, tokens, *a: sizes.append(len(tokens)) or hidden(self, tokens, *a),
    )
    many = documents_of(tokenizer, TEXTS * 5)
    found = bits_per_byte(uniform, tokenizer, many, 1024, 10**6)
    assert sizes == [8, 7], "8192 tokens in a pass"
    once = bits_per_byte(uniform, tokenizer, documents_of(tokenizer), 64, 10**6)
    assert found == pytest.approx(once, rel=1e-5)
    sizes.clear()
    monkeypatch.setattr(text, "TOKENS_PER_PASS", 63)
    assert bits_per_byte(uniform, tokenizer, many, 64, 10**6) == pytest.approx(once, rel=1e-5)
    assert set(sizes) == {1}, "a row that is longer than a pass is alone in it"


@settings(max_examples=10)
@given(seed=seeds, length=st.sampled_from([3, 7, 20]), sharp=st.sampled_from([0.1, 1.0, 5.0]))
def test_acceptance_is_the_overlap(seed, length, sharp):
    """Mean of sum_v min(p, q) over positions whose token two ahead is in their row: trunk at t+1, MTP layer at t."""
    documents = [d % 24 for d in documents_of(byte_tokenizer())]

    def hidden(tokens_BS, positions_BS, documents_BS, mtp):
        # Both are functions of the tokens, so that the reference below finds the same numbers.
        sums_BS = tokens_BS.double().cumsum(1)
        outs = []
        for factor in (7, 3):
            code_BS = sums_BS * factor + seed % 1000
            waves_BSD = torch.sin(code_BS[..., None] * torch.arange(1, 25))
            outs.append((sharp * waves_BSD).float())
        return Output(*outs)

    stub = SimpleNamespace(
        hidden=hidden,
        lm_head=lambda x: x,
        device=torch.device("cpu"),
        mtp=True,
    )
    overlap = []
    for row in spans(documents, length):
        out = hidden(torch.tensor(row[None]), None, None, True)
        p_SV = out.hidden_BSD[0].softmax(-1)
        q_SV = out.mtp_hidden_BSD[0].softmax(-1)
        for t in range(len(row) - 2):
            overlap.append(torch.minimum(p_SV[t + 1], q_SV[t]).sum().item())
    found = mtp_acceptance(stub, documents, length, 10**6)
    assert 0 <= found <= 1 + 1e-6
    assert found == pytest.approx(np.mean(overlap), rel=1e-4)  # float32


@settings(max_examples=8)
@given(seed=seeds)
def test_acceptance_of_a_model(uniform, seed):
    """Between 0 and 1 for any model; 1 where trunk and MTP layer agree; 0 where they never do."""
    documents = documents_of(word_tokenizer())
    model = tiny_model(seed, vocab_size=330)
    assert 0 <= mtp_acceptance(model, documents, 16, 10**6) <= 1 + 1e-5
    assert mtp_acceptance(uniform, documents, 16, 10**6) == pytest.approx(1, abs=1e-5)
    with torch.no_grad():  # final states: all ones in the trunk, all minus ones in the MTP layer
        for norm, value in ((model.model.norm, 1.0), (model.mtp.shared_head["norm"], -1.0)):
            norm.register_forward_hook(
                lambda module, inputs, out, value=value: torch.full_like(out, value)
            )
        model.lm_head.weight.zero_()
        # One always says 3, the other always 8.
        model.lm_head.weight[3] = 9.0
        model.lm_head.weight[8] = -9.0
    assert mtp_acceptance(model, documents, 16, 10**6) == pytest.approx(0, abs=1e-5)


CONFIG = EvaluationConfig(problems=4, samples=2, max_new_tokens=200)


@pytest.mark.parametrize("name", ["arithmetic", "retail", "instructions"])
@pytest.mark.parametrize("thinking", [True, False])
def test_a_perfect_model_scores_one(name, thinking):
    """Every number of the record, for a model that plays like the oracle."""
    environment = ENVIRONMENTS[name]
    tokenizer = byte_tokenizer()
    problems = environment.tasks(4, eval_tasks.TEST_SEED, "test")
    engine = ScriptedGenerator(tokenizer, oracle(tokenizer, environment, problems, thinking))
    record, played = eval_tasks.tasks(engine, tokenizer, environment, CONFIG, thinking)
    assert len(played) == 8
    assert [t.task for t in played[::2]] == problems
    valid = 1.0 if name == "retail" else None
    expected = {
        "env": name,
        "group": environment.group,
        "thinking": thinking,
        "avg": 1.0,
        "pass_k": 1.0,
        "k": 2,
    }
    expected |= {"n": 4, "valid_calls": valid, "switch_ok": 1.0, "high": 1.0}
    assert record | expected == record
    assert 0 < record["low"] < 1, "four problems leave room for doubt"
    assert record["length"] == engine.tokens / 8


def test_scores_count_right_answers():
    """Two problems of four solved, one of them in one answer of two: avg@2 is 3/8, pass@2 is 1/2."""
    environment = ENVIRONMENTS["arithmetic"]
    tokenizer = byte_tokenizer()
    problems = environment.tasks(4, eval_tasks.TEST_SEED, "test")
    asked = {
        render(tokenizer, t.messages, (), True, generation_prompt=True).text: t for t in problems
    }
    times = {}

    def script(prompt):
        task = asked[prompt]
        times[task.id] = times.get(task.id, 0) + 1
        second_time = times[task.id] == 2
        right = task == problems[0] or (task == problems[2] and second_time)
        return (
            said(tokenizer, assistant(task.label if right else "no", "so"))
            if task != problems[3]
            else "<|user|>"
        )

    record, played = eval_tasks.tasks(
        ScriptedGenerator(tokenizer, script), tokenizer, environment, CONFIG, True
    )
    assert (record["avg"], record["pass_k"], record["switch_ok"]) == (0.375, 0.5, 0.75)
    assert record["low"] < 0.375 < record["high"]
    assert record["valid_calls"] is None
    assert [t.score.status for t in played] == ["ok"] * 2 + ["wrong"] * 3 + ["ok"] + ["format"] * 2


def test_failures_of_the_environment_leave_the_statistics():
    """Two samples of three problems fail, all of the fourth: the rest is scored, and the failures are counted."""
    environment = Arithmetic()
    tokenizer = byte_tokenizer()
    problems = environment.tasks(4, eval_tasks.TEST_SEED, "test")
    script = oracle(tokenizer, environment, problems)
    times = dict.fromkeys([t.id for t in problems], 0)

    def judge(task, message):
        times[task.id] += 1
        if task == problems[3] or times[task.id] == 2:
            raise OSError("the grader is gone")
        return Score(1.0, "ok")

    environment.judge = judge
    generator = ScriptedGenerator(tokenizer, script)
    record, played = eval_tasks.tasks(generator, tokenizer, environment, CONFIG)
    assert (record["avg"], record["pass_k"], record["n"], record["infrastructure"]) == (1, 1, 3, 5)
    assert len(played) == 8
    environment.judge = lambda task, message: 1 / 0
    with pytest.raises(ValueError, match=r"every environment failed: .*ZeroDivisionError"):
        eval_tasks.tasks(generator, tokenizer, environment, CONFIG)


def test_valid_calls_are_those_without_a_fault():
    """Half of the calls name a tool that does not exist."""
    environment = ENVIRONMENTS["retail"]
    tokenizer = byte_tokenizer()
    turns = [0]

    def script(prompt):
        turns[0] += 1
        message = assistant(
            "", "so", [("get_order" if turns[0] % 2 else "eat_order", {"order_id": 1})]
        )
        return said(tokenizer, message)

    record, _ = eval_tasks.tasks(
        ScriptedGenerator(tokenizer, script), tokenizer, environment, CONFIG, True
    )
    assert record["avg"] == 0
    assert record["valid_calls"] == pytest.approx(0.5, abs=0.1)


def test_the_same_seed_gives_the_same_record():
    """Two evaluations agree in every number; another seed samples other answers to the same problems."""
    tokenizer = byte_tokenizer()
    environment = ENVIRONMENTS["arithmetic"]
    engine = EngineGenerator(Engine(tiny_model(3, vocab_size=292), tokenizer))
    config = EvaluationConfig(problems=3, samples=2, max_new_tokens=6, temperature=1.0)
    runs = [
        eval_tasks.tasks(engine, tokenizer, environment, config, True, seed) for seed in (0, 0, 1)
    ]
    assert runs[0][0] == runs[1][0]
    assert [t.texts for t in runs[0][1]] == [t.texts for t in runs[1][1]]
    assert [t.task for t in runs[0][1]] == [t.task for t in runs[2][1]]
    assert [t.texts for t in runs[0][1]] != [t.texts for t in runs[2][1]]
    train = {t.id for t in environment.tasks(200, 0)}
    assert not train & {t.task.id for t in runs[0][1]}, "problems are held out"
