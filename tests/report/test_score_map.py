"""Scores over parameters and seconds: the same tasks for all runs, after the stages that scored all of them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minglm.report.records import EvaluationRecord, StageEndRecord
from minglm.report.score_map import ScoredRun, draw_score_map, points, shared_tasks


def scored(stage, **scores):
    """Return the records of a stage of ten seconds."""
    common = {"group": "x", "low": 0.0, "high": 1.0, "pass_k": 1.0, "k": 1, "n": 1}
    common |= {"valid_calls": None, "switch_ok": 1.0, "length": 1.0, "by_problem": []}
    records = [
        EvaluationRecord(stage=stage, env=env, thinking=thinking, avg=avg * thinking, **common)
        for env, avg in scores.items()
        for thinking in (True, False)
    ]
    end = StageEndRecord(stage=stage, tokens=1, seconds=10.0, evaluation_seconds=99.0)
    return [*records, end]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_a_stage_counts_if_it_scored_all_tasks(scores):
    """Seconds of all stages add up, evaluations apart; scores without thinking, and parts of the tasks, are left out."""
    records = []
    for score in scores:
        records += scored("expert", a=1.0) + scored("unified", a=score, b=0.0, c=1.0)
    found = points(records, ["a", "b"])
    assert [point.seconds for point in found] == [20.0 * (i + 1) for i in range(len(scores))]
    assert [point.score for point in found] == [score / 2 for score in scores]


def test_runs_are_compared_on_what_all_of_them_scored(tmp_path):
    """Tasks of one run alone are left out; runs without a common task are refused by name."""
    one = ScoredRun("one", 10**6, scored("s", a=0.5, b=0.7))
    two = ScoredRun("two", 10**7, scored("s", b=0.9, c=0.2))
    assert shared_tasks([one, two]) == ["b"]
    picture = draw_score_map([one, two], tmp_path / "scores.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no task was scored by all of one, three"):
        shared_tasks([one, ScoredRun("three", 1, scored("s", c=0.2))])
    with pytest.raises(ValueError, match="four has no scores yet"):
        shared_tasks([one, ScoredRun("four", 1, [])])
    apart = ScoredRun("five", 1, scored("s", a=0.1) + scored("t", b=0.1))
    with pytest.raises(ValueError, match="five: no stage scored all of a, b"):
        draw_score_map([one, apart], tmp_path / "none.png")
