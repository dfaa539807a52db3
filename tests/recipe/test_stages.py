"""The plan of a run: stages in the paper's order, each with all that it needs, and times that add up."""

from dataclasses import replace

import pytest

from minglm.config import load_config
from minglm.envs.twelve import TWELVE
from minglm.recipe import stages as planning
from minglm.recipe.solutions import evaluation_texts
from minglm.recipe.stages import EvalPlan, StageKind
from minglm.report.records import Moment, StageEndRecord, StartRecord, read_records, select
from minglm.train.stages import phases


@pytest.fixture(scope="module")
def run():
    return load_config("configs/nano.py")


def test_stages_come_in_the_papers_order_and_each_starts_from_one_before_it(run):
    """Every stage is based on an earlier one; experts and the unified model on the last stage of mid-training."""
    stages = planning.plan_stages(run)
    names = [stage.name for stage in stages]
    assert names[:5] == [name for name, _ in run.stages.items()]
    from_the_base = (StageKind.COLD_START, StageKind.UNIFIED)
    assert [stage.base for stage in stages if stage.kind in from_the_base] == [names[4]] * 4
    for position, stage in enumerate(stages):
        assert stage.base is None if position == 0 else stage.base in names[:position]
    assert names[-1] == "pathology_rl"


def test_a_stage_carries_its_config(run):
    """The options of each stage are those of the config, whatever the stage is called."""
    post = run.posttraining
    configs = [
        *(config for _, config in run.stages.items()),
        *(config for _, expert in post.experts() for config in (expert.sft, expert.rl, expert.sft)),
        post.unified,
        post.general_rl,
        post.pathology_rl,
    ]
    assert [stage.config for stage in planning.plan_stages(run)] == configs


def test_a_stage_carries_its_evaluation_plan(run):
    """Text after pre-training, tasks from the base on, both modes from the unified model on, pathologies around RL."""
    plans = {stage.name: stage.evaluation for stage in planning.plan_stages(run)}
    learned = ("arithmetic", "code", "retail", "instructions")
    assert plans["general"] == EvalPlan(text=True)
    assert plans["long_agent"] == EvalPlan(text=True, environments=learned)
    for stage in ("agent.sft", "agent.rl", "agent.control"):
        assert plans[stage] == EvalPlan(environments=("retail",))
    both = EvalPlan(environments=learned, thinking=(True, False))
    assert plans["unified"] == both
    assert plans["general_rl"] == replace(both, brief=True, pathology=Moment.BEFORE)
    last = tuple(dict.fromkeys((*learned, *TWELVE)))  # Figure 1's, learned or not
    assert plans["pathology_rl"] == replace(
        both, environments=last, brief=True, pathology=Moment.AFTER
    )


def test_a_control_is_scored_once_on_each_task(run):
    """Names that are repeated, because RL trains on them more often, are no more evaluations."""
    expert = run.posttraining.reasoning
    expert = replace(expert, rl=replace(expert.rl, environments=("arithmetic",) * 3 + ("code",)))
    often = replace(run, posttraining=replace(run.posttraining, reasoning=expert))
    plans = {stage.name: stage.evaluation for stage in planning.plan_stages(often)}
    assert plans["reasoning.control"].environments == ("arithmetic", "code")


def test_every_stage_that_draws_tasks_draws_others(run):
    """Cold start, distillation and each stage of RL have seeds of their own, which change with the run's."""
    kinds = (StageKind.COLD_START, StageKind.CONTROL, StageKind.UNIFIED, StageKind.RL)
    stages = [stage for stage in planning.plan_stages(run) if stage.kind in kinds]
    groups = {
        stage.name if stage.kind == StageKind.RL else stage.kind: stage.seed for stage in stages
    }
    assert len(set(groups.values())) == len(groups) == 8
    others = planning.plan_stages(replace(run, seed=1))
    assert not {stage.seed for stage in stages} & {stage.seed for stage in others}


def test_tokens_of_the_first_stages_are_exact_and_minutes_scale_with_speed(run):
    """The tokens are those the phases train on; twice the speed is half the time."""
    stages = planning.plan_stages(run)
    assert [stage.tokens for stage in stages[:5]] == [phase.tokens for phase in phases(run)]
    slow = planning.expected_minutes(run, stages, 1e9, "cpu")
    fast = planning.expected_minutes(run, stages, 2e9, "cpu")
    assert fast == pytest.approx([minutes / 2 for minutes in slow])
    assert min(slow) > 0


def test_the_estimate_is_what_three_runs_took():
    """All stages of the toy together, at the 94 GFLOP/s of a core; within 1.5 times, for two of them shared two cores."""
    toy = load_config("configs/toy.py")
    stages = planning.plan_stages(toy)
    for seed in range(3):
        found = read_records(f"figures/toy/seed{seed}.jsonl")
        (start,) = select(found, StartRecord)
        ends = select(found, StageEndRecord)
        speed = 94e9 * start.versions["threads"]
        expected = 60 * sum(planning.expected_minutes(toy, stages, speed, "cpu"))
        assert len(ends) == len(stages)
        assert 1 / 1.5 < sum(end.seconds for end in ends) / expected < 1.5


def test_the_table_has_a_line_for_every_stage(run):
    """The line of a stage has its name, tokens and rate, below one heading."""
    stages = planning.plan_stages(run)
    _, heading, *lines = planning.table(run, stages, 1e9, "cpu").splitlines()
    assert {"tokens", "minutes", "length"} <= set(heading.split())
    for stage, line in zip(stages, lines):
        assert line.startswith(stage.name)
        assert f"{stage.tokens:,}" in line
        assert f"{stage.learning_rate:g}" in line


@pytest.mark.parametrize("tokens", [32, 64, 65])
def test_a_row_longer_than_a_step_is_said(run, tokens):
    """The table has a line for each stage whose step is one row and has more tokens than the config asks for."""
    long_agent = replace(run.stages.long_agent, sequence_length=64)
    optimizer = replace(run.optimizer, batch_tokens_start=tokens, batch_tokens_end=tokens)
    run = replace(run, stages=replace(run.stages, long_agent=long_agent), optimizer=optimizer)
    stages = planning.plan_stages(run)
    (stage,) = [stage for stage in stages if stage.name == "long_agent"]
    said = planning.long_row(stage)
    if tokens < 64:
        assert said is not None
        assert "64" in said and "32" in said
        assert said in planning.table(run, stages, 1e9, "cpu").splitlines()
    else:
        assert said is None


@pytest.mark.parametrize("weight", [0.5, 1.0, 2.0])
def test_experts_answer_in_proportion_to_tokens(weight):
    """Each environment brings about as many tokens, times its expert's `distilled`; the shortest gets all prompts."""
    post = load_config("configs/toy.py").posttraining
    experts = {
        "agent": replace(post.agent, distilled=weight),
        "chat": replace(post.chat, distilled=1.0),
    }
    post = replace(post, **experts, prompts_per_environment=10_000)
    prompts = planning.prompts_for(post)
    tokens = {name: count * planning.conversation_tokens([name]) for name, count in prompts.items()}
    assert max(prompts.values()) == 10_000
    assert set(prompts) == {"arithmetic", "code", "search:short", "retail", "instructions"}
    whole = tokens["arithmetic"]
    for name in ("search:short", "retail"):
        assert tokens[name] == pytest.approx(weight * whole, rel=0.02)  # prompts are whole numbers
    assert all(tokens[name] == pytest.approx(whole, rel=0.02) for name in ("code", "instructions"))


def test_the_asked_difficulties_reach_tests_costs_and_refusals(run):
    """Test prompts that data must not contain are those of the asked difficulties; one that is unknown is refused."""
    asking = replace(run, posttraining=replace(run.posttraining, asked=("arithmetic:9",)))
    assert all(
        text.count("+") + text.count("-") == 9
        for text in evaluation_texts(asking)["tasks:arithmetic"]
    )
    plans = [
        {stage.name: stage.tokens for stage in planning.plan_stages(each)} for each in (run, asking)
    ]
    assert plans[1]["reasoning.rl"] > plans[0]["reasoning.rl"]
    assert plans[1]["reasoning.sft"] == plans[0]["reasoning.sft"]
    wrong = replace(run, posttraining=replace(run.posttraining, asked=("arithmetic:99",)))
    with pytest.raises(ValueError, match=r"arithmetic:99: arithmetic has the difficulties"):
        planning.plan_stages(wrong)
