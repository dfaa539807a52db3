"""The table a run starts with: stages in the paper's order, each on the weights of the right one, times that add up."""

from dataclasses import replace

import pytest

from minglm.config import load_config
from minglm.recipe import stages as agenda
from minglm.train.stages import phases


@pytest.fixture(scope="module")
def run():
    return load_config("configs/nano.py")


def test_stages_come_in_the_papers_order_and_each_starts_from_one_before_it(run):
    """Every stage is based on an earlier one; experts and the unified model on the last stage of mid-training."""
    stages = agenda.plan_stages(run)
    names = [stage.name for stage in stages]
    assert names[:5] == [name for name, _ in run.stages.items()]
    assert [s.base for s in stages if s.name.endswith(".sft") or s.name == "unified"] == [
        names[4]
    ] * 4
    for position, stage in enumerate(stages):
        assert stage.base is None if position == 0 else stage.base in names[:position]
    assert names[-1] == "pathology_rl"


def test_tokens_of_the_first_stages_are_exact_and_minutes_scale_with_speed(run):
    """The tokens are those the phases train on; twice the speed is half the time."""
    stages = agenda.plan_stages(run)
    assert [stage.tokens for stage in stages[:5]] == [phase.tokens for phase in phases(run)]
    slow, fast = (agenda.expected_minutes(run, stages, speed) for speed in (1e9, 2e9))
    assert fast == pytest.approx([minutes / 2 for minutes in slow])
    assert min(slow) > 0


def test_the_table_has_a_line_for_every_stage(run):
    """Name, tokens and rate of each stage stand in its line, below one heading."""
    stages = agenda.plan_stages(run)
    _, heading, *lines = agenda.table(run, stages, 1e9).splitlines()
    assert {"tokens", "minutes", "length"} <= set(heading.split())
    for stage, line in zip(stages, lines, strict=True):
        assert (
            line.startswith(stage.name)
            and f"{stage.tokens:,}" in line
            and f"{stage.learning_rate:g}" in line
        )


@pytest.mark.parametrize("weight", [0.5, 1.0, 2.0])
def test_experts_answer_in_proportion_to_tokens(weight):
    """Each environment brings about as many tokens, times its expert's `distilled`; the shortest gets all prompts."""
    post = load_config("configs/toy.py").posttraining
    experts = {
        "agent": replace(post.agent, distilled=weight),
        "chat": replace(post.chat, distilled=1.0),
    }
    post = replace(post, **experts, prompts_per_environment=10_000)
    prompts = agenda.prompts_for(post)
    tokens = {name: count * agenda.conversation_tokens([name]) for name, count in prompts.items()}
    assert max(prompts.values()) == 10_000 and set(prompts) == {
        "arithmetic",
        "code",
        "retail",
        "instructions",
    }
    whole = tokens["arithmetic"]
    assert tokens["retail"] == pytest.approx(weight * whole, rel=0.02)  # prompts are whole numbers
    assert all(tokens[name] == pytest.approx(whole, rel=0.02) for name in ("code", "instructions"))
