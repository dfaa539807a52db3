"""What screening is expected to draw: by hand, by the logs of the toy, and between its bounds."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minglm.config import RLConfig, load_config
from minglm.config.posttraining import CurriculumConfig, ExtremeTier
from minglm.plan.gpus import GPUS
from minglm.plan.layout import Layout
from minglm.plan.posttraining import plan_posttraining
from minglm.plan.screening import chance, screening_answers, searched_share
from minglm.recipe.stages import plan_stages
from minglm.report.records import ScreeningRecord, read_records, select


def test_chances_are_those_of_the_u():
    """By hand: the integral of C(n, r) p^r (1 - p)^(n - r) over the density 1 / (pi sqrt(p (1 - p)))."""
    assert [chance(right, 1) for right in range(2)] == pytest.approx([1 / 2, 1 / 2])
    assert [chance(right, 2) for right in range(3)] == pytest.approx([3 / 8, 1 / 4, 3 / 8])
    assert sum(chance(right, 10_000) for right in range(10_001)) == pytest.approx(1)


def test_the_papers_rule_searches_the_unsolved_and_a_rate_those_below_it():
    """0 of 8 right answers: 12,870 / 4^8; 0 or 1 of them: and 2 x 3,432 / 4^8."""
    literal = CurriculumConfig(extreme_tier=ExtremeTier.UNSOLVED)
    assert searched_share(literal) == pytest.approx(12_870 / 4**8)
    assert searched_share(CurriculumConfig()) == pytest.approx((12_870 + 2 * 3_432) / 4**8)


@given(
    pool=st.integers(1, 1000),
    screen=st.integers(1, 20),
    more=st.integers(0, 500),
    guard=st.integers(0, 50),
    tier=st.sampled_from(list(ExtremeTier)),
)
def test_an_expectation_lies_between_no_search_and_a_search_of_all(pool, screen, more, guard, tier):
    """Each environment is screened once, however often it is named; without a pool nothing is."""
    curriculum = CurriculumConfig(
        pool=pool, screen=screen, search=screen + more, guard_problems=guard, extreme_tier=tier
    )
    names = ("code", "arithmetic", "code")
    found = screening_answers(RLConfig(environments=names, curriculum=curriculum))
    least = 2 * (pool + guard) * screen
    assert least <= found <= least + 2 * pool * more
    assert (found > least) == bool(more)
    off = replace(curriculum, pool=0)
    assert screening_answers(RLConfig(environments=names, curriculum=off)) == 0


def test_the_toy_drew_what_is_expected():
    """Its problems are not searched, so the answers that three runs have logged are exact, but for the held-out ones."""
    rl = load_config("configs/toy.py").posttraining.reasoning.rl
    held_out = 2 * rl.curriculum.guard_problems * rl.curriculum.screen
    for seed in range(3):
        (record,) = select(read_records(f"figures/toy/seed{seed}.jsonl"), ScreeningRecord)
        assert record.answers + held_out == screening_answers(rl)


def test_both_tables_count_the_answers_before_the_first_step():
    """By hand, with a pool of ten problems that are all drawn once; the control is as long as the training alone."""
    nano = load_config("configs/nano.py")
    curriculum = CurriculumConfig(pool=10, screen=4, search=4, guard_problems=5)
    expert = nano.posttraining.reasoning
    expert = replace(expert, rl=replace(expert.rl, curriculum=curriculum))
    run = replace(nano, posttraining=replace(nano.posttraining, reasoning=expert))
    layout = Layout(1, 1, 1, 1, 1)
    plain, screened = (
        {stage.name: stage for stage in plan_posttraining(each, layout, GPUS["h100"])}
        for each in (nano, run)
    )
    trained = expert.rl.steps * expert.rl.prompts * expert.rl.samples
    for before, after in zip(plain["reasoning.rl"].tokens, screened["reasoning.rl"].tokens):
        assert after / before == pytest.approx((trained + 60) / trained)
    assert plain["reasoning.control"] == screened["reasoning.control"]
    mining = nano.posttraining.pathology_rl.mining
    mined = len(mining.kinds) * mining.pool * mining.answers
    ratio = plain["pathology_rl"].tokens[0] / plain["agent.rl"].tokens[0]
    assert ratio == pytest.approx((trained + mined) / trained)

    before, after = ({stage.name: stage for stage in plan_stages(each)} for each in (nano, run))
    each = before["reasoning.rl"].tokens / trained
    assert after["reasoning.rl"].tokens == before["reasoning.rl"].tokens + 60 * each
    assert after["reasoning.control"].tokens == before["reasoning.control"].tokens == trained * each
