"""Lessons on reinforcement learning: their task is an environment like any other, and they run to the figure."""

import runpy
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minglm import lesson
from minglm.envs.base import assistant
from minglm.testing.envs import check_environment
from minglm.testing.strategies import seeds

LESSONS = Path(__file__).parent.parent / "lessons"


@pytest.mark.parametrize(("level", "told"), [(5, 3), (8, 1)])
def test_sums_are_an_environment(level, told):
    """Sums hold the contract of environments: an oracle is paid, nonsense and chance are not."""
    check_environment(lesson.Sums((level,), told))


@pytest.mark.parametrize(
    ("name", "kind", "given"),
    [
        ("14_agent", "Chase", ((2, 4),)),
        ("14_agent", "Reader", ((1, 4),)),
        ("16_distill", "Running", ("+-#", (6,), 3)),
        ("21_verified", "Choice", ((3, 7),)),
        ("22_unseen_tools", "ListedSearch", ()),
    ],
)
def test_tasks_of_lessons_are_environments(name, kind, given):
    """So do the tasks that a lesson defines for itself."""
    check_environment(runpy.run_path(str(LESSONS / f"{name}.py"))[kind](*given))


@given(seed=seeds, level=st.integers(3, 12), told=st.integers(1, 4))
def test_a_thought_repeats_the_terms_beside_the_sums(seed, level, told):
    """Every second digit of the oracle's thought is a term, the others are the sums, and the answer is the last of them."""
    environment = lesson.Sums((level,), told)
    task = environment.task(0, seed)
    prompt, message = environment.demonstrate(task)
    terms = list(map(int, prompt["content"].rstrip("=").split("+")))
    thought = message["reasoning_content"]
    assert list(map(int, thought[::2])) == terms[1:]
    sums = [sum(terms[: i + 1]) % lesson.MODULUS for i in range(len(terms))]
    assert list(map(int, thought[1::2])) == sums[1:]
    assert message["content"] == "".join(map(str, sums[-told:]))
    assert environment.judge(task, assistant(message["content"][::-1] + "0")).value == 0


@pytest.mark.parametrize("name", ["12_grpo", "13_curriculum", "21_verified", "22_unseen_tools"])
def test_a_lesson_runs_to_its_figure(name, capsys):
    """With the sizes of the smoke test a lesson trains every arm, reads its log and draws."""
    runpy.run_path(str(LESSONS / f"{name}.py"))["main"](["--smoke"])
    printed = capsys.readouterr().out
    assert "CPU-seconds; " in printed and f"{name}.png" in printed
    assert printed.count(": False") >= 3, "an untrained policy supports no claim"
