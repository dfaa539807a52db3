"""Evaluation of a sharded model with an engine over HTTP: the scores of one process, and no rank holds all weights."""

import contextlib
import io
import shutil
from pathlib import Path

import pytest
import torch
from helpers.nano_run import CONFIG, OVERRIDES, records
from helpers.serving import running
from helpers.world import run_ranks

from minglm.config import load_config
from minglm.inference import Engine
from minglm.model.glm import GLM
from minglm.parallel.world import World
from minglm.recipe import context as context_module
from minglm.recipe.context import RunContext
from minglm.recipe.evaluation import evaluate
from minglm.recipe.run import RecipeRunner

STAGES = ("long_agent", "pathology_rl")  # text and tasks; tasks and pathologies
WORDS = [*OVERRIDES, "--evaluation.problems", "1", "--evaluation.max_new_tokens", "8"]


def measured(out, *words):
    """Evaluate a model that has learned nothing, as after some stages. Return the runner."""
    run = load_config(CONFIG, [*WORDS, *words])
    runner = RecipeRunner(run, out, World(torch.device("cpu")), quiet=True)
    for stage in runner.stages:
        if stage.name in STAGES:
            evaluate(runner.context, stage, runner.context.load_model(None))
    return runner


def no_copy(*arguments):
    """Refuse to gather all weights."""
    raise AssertionError("a rank holds all weights")


def measured_by_ranks(out, url):
    """Evaluate on ranks that divide the experts."""
    RunContext.whole = no_copy
    measured(out, "--parallel.ep", "2", "--rollout_engine", url)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Return the runner of one process that has evaluated."""
    return measured(tmp_path_factory.mktemp("runs") / "alone")


def test_the_engine_answers_and_the_sharded_model_reads(alone, tmp_path):
    """Scores, answers, pathologies, bits per byte, needles and acceptance are those of one process."""
    out = tmp_path / "two"
    shutil.copytree(alone.out / "data", out / "data")
    tokenizer = alone.context.tokenizer
    model = GLM(alone.run.model, seed=99).eval()  # it gets other weights
    engine = Engine(model, tokenizer)

    def load(path):
        engine.update_weights(GLM.from_pretrained(Path(path)).state_dict())

    limit = alone.run.model.max_position_embeddings
    with running(engine, tokenizer, limit, load_weights=load) as (http, _, _):
        run_ranks(measured_by_ranks, 2, out, str(http.base_url))
    ours, wanted = records(out), records(alone.out)
    assert [record["kind"] for record in ours] == [record["kind"] for record in wanted]
    assert {"evaluation", "pathology", "bits_per_byte", "mtp_acceptance"} <= {
        record["kind"] for record in ours
    }
    for found, expected in zip(ours, wanted, strict=True):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            if isinstance(value, float):
                assert found[name] == pytest.approx(value, abs=1e-4), (expected["kind"], name)
            elif name != "bits":  # a list of such floats
                assert found[name] == value, (expected["kind"], name)


def measured_without_room(out):
    """Evaluate on ranks, the first of which has no room for a copy. Return what the rank prints."""
    context_module.free_bytes = lambda device: 1e12 * torch.distributed.get_rank()
    with contextlib.redirect_stderr(io.StringIO()) as said:
        measured(out, "--parallel.ep", "2")
    return said.getvalue().splitlines()


def test_scores_that_need_too_much_memory_are_left_out(alone, tmp_path):
    """The run goes on, with what can be measured, and says what it left out and what to do."""
    out = tmp_path / "two"
    shutil.copytree(alone.out / "data", out / "data")
    first, second = run_ranks(measured_without_room, 2, out)
    assert not records(out, "evaluation") and records(out, "bits_per_byte")
    assert "minglm: long_agent: no task is scored" in first[0] and "--rollout_engine" in first[0]
    assert len(first) == 2 and not second  # one rank speaks, once a stage
