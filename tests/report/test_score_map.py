"""Scores over parameters and seconds: the same tasks for all runs, after the stages that scored all of them."""

import shutil

import pytest
from helpers.command import ROOT
from hypothesis import given
from hypothesis import strategies as st

from minglm.__main__ import main
from minglm.cli.figures import redraw
from minglm.report.records import EvaluationRecord, StageEndRecord, read_records
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
    """Seconds of all stages add up, evaluations and controls apart; parts of the tasks are left out."""
    records = []
    for score in scores:
        records += scored("expert", a=1.0) + scored("expert.control", a=1.0, b=1.0)
        records += scored("unified", a=score, b=0.0, c=1.0)
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


def test_tasks_that_only_the_finished_model_is_asked_are_left_out():
    """Each run keeps a point at its beginning and at its end; one task in common is not enough for that."""
    base, finished = scored("base", a=0.1, b=0.1), scored("finished", b=0.5, c=0.0)
    grown = ScoredRun("grown", 1, base + scored("expert", a=1.0) + finished)
    assert shared_tasks([grown]) == ["b"]
    assert [point.stage for point in points(grown.records, ["b"])] == ["base", "finished"]
    with pytest.raises(ValueError, match="no task was scored by all of apart"):
        shared_tasks([ScoredRun("apart", 1, scored("base", a=0.1) + scored("finished", b=0.1))])


def test_the_command_compares_run_folders_and_refuses_others(tmp_path, capsys):
    """The figure is where --scores says; what is no run, or no place for a figure, is one line with its remedy."""
    runs = [str(ROOT / "figures" / "scores" / name) for name in ("width24", "width96")]
    picture = tmp_path / "new" / "scores.png"
    assert main(["figures", "--scores", str(picture), *runs]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out == f"{picture}\n"
    (tmp_path / "file").write_bytes(b"\x00")
    for folder in ("nowhere", "file", ""):
        assert main(["figures", "--scores", str(picture), *runs, str(tmp_path / folder)]) == 2
        line = capsys.readouterr().err
        assert line.count("\n") == 1 and line.endswith("give the folder of a run\n")
    assert main(["figures", "--scores", str(tmp_path), *runs]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "is a folder; give a file" in line


def test_the_committed_scores_are_redrawn_from_their_logs(tmp_path):
    """`python -m minglm figures FOLDER` draws every run in a folder, and `figures/scores` is such a folder."""
    folder = shutil.copytree(ROOT / "figures" / "scores", tmp_path / "scores")
    picture = folder / "scores.png"
    picture.unlink()
    assert redraw([folder]) == [picture]
    for log in folder.glob("*/log.jsonl"):
        assert points(read_records(log), ["arithmetic", "code", "instructions", "retail"])
