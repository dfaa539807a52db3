"""Environments of reasoning-gym: the contract holds for its generators, and what would pay for nonsense is refused."""

import subprocess
import sys
import time
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minglm.config import load_config
from minglm.envs import ENVIRONMENTS
from minglm.envs.base import Environment, assistant
from minglm.envs.gym import ReasoningGym
from minglm.envs.gym_verifier import MEMORY
from minglm.recipe.inputs import check_environments
from minglm.recipe.solutions import evaluation_texts
from minglm.testing.envs import check_environment, check_lazy_answers, play

SUMS = "gym:chain_sum?max_terms=3&max_digits=1"


@pytest.mark.parametrize("name", ["gym:chain_sum", "gym:gcd?exact=true", "gym:leg_counting"])
def test_contract_holds(name):
    """Sums, divisors and legs are environments like our own."""
    check_environment(ENVIRONMENTS[name])


@settings(max_examples=10, deadline=None)
@given(index=st.integers(0, 10**6), seed=st.integers(0, 99))
def test_partial_credit_is_logged_and_not_paid(index, seed):
    """An answer among others earns nothing, though the generator's verifier gives a share; alone it earns all."""
    env = ENVIRONMENTS[SUMS]
    task = env.task(index, seed)
    answer = task.label["answer"]
    listed = play(env, task, [assistant(f"{answer}, or is it {answer}?")]).score
    assert listed.value == 0 and 0 < listed.parts["credit"] < 1
    right = play(env, task, [assistant(f" {answer}\n")]).score
    assert right.value == 1 and right.parts["credit"] == 1


def test_options_reach_the_generator():
    """Sums of at most three numbers of one digit; a name with other options is another environment."""
    for task in ENVIRONMENTS[SUMS].tasks(30, 0):
        numbers = [w for w in task.messages[-1]["content"].split() if w.isdigit()]
        assert len(numbers) <= 3 and all(len(number) == 1 for number in numbers)
    assert ENVIRONMENTS[SUMS] is ENVIRONMENTS[SUMS] is not ENVIRONMENTS["gym:chain_sum"]


def test_a_verifier_that_raises_finds_text_wrong():
    """What the verifier cannot read earns nothing, and is not the machine's fault."""
    env = ENVIRONMENTS["gym:prime_factorization"]
    task = env.task(0, 0)
    score = play(env, task, [assistant("two times three")]).score
    assert (score.value, score.status) == (0, "wrong")


@pytest.mark.parametrize(
    ("answer", "status"),
    [("1e999999999", "infrastructure"), ("2/0", "wrong"), ("\ud800\n", "wrong")],
)
def test_no_answer_keeps_a_verifier_busy_for_ever(answer, status):
    """A number without end leaves the statistics under its generator's name, what is no number is wrong; the next is judged."""
    env = ENVIRONMENTS["gym:coin_flip"]
    task = env.task(0, 0)
    begin = time.monotonic()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        score = play(env, task, [assistant(answer)]).score
    assert time.monotonic() - begin < 60
    assert (score.value, score.status) == (0, status)
    if status == "infrastructure":
        line = "gym:coin_flip: RuntimeError: the verifier of coin_flip took more than 5 seconds"
        assert score.detail.startswith(line) and warned
    assert play(env, task, [assistant(task.label["answer"])]).score.value == 1


def test_no_answer_takes_the_memory_of_the_machine():
    """What a verifier cannot have room for raises in its process, and is text that it cannot read."""
    asks = f"bytes({2 * MEMORY})"
    words = f"from minglm.envs.gym_verifier import bound_memory; {asks}; bound_memory(); {asks}"
    said = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True).stderr
    assert said.endswith("MemoryError\n") and said.count("File") == 1


def test_a_verifier_that_hangs_on_a_lazy_answer_is_refused(monkeypatch):
    """In one line, when its generator is asked for."""
    monkeypatch.setattr("minglm.envs.gym._lazy_answers", lambda entry: ["1e999999999"])
    with pytest.raises(
        ValueError, match=r"used: the verifier of coin_flip took more than 5 sec.*, '1e9"
    ):
        ReasoningGym("gym:coin_flip")


REFUSED = {
    "gym:chess": "gym:chess: reasoning-gym has no such generator; it has ",
    "gym:chain_sum?terms=3": r"gym:chain_sum\?terms=3: .*unexpected keyword argument 'terms'",
    "gym:chain_sum?min_terms=9&max_terms=2": "gym:chain_sum.*: max_terms must be >= min_terms",
    "gym:composite": "gym:composite: Must specify at least one dataset",
    # the verifiers that evaluate text would run a policy's code in the trainer
    "gym:countdown": "its verifier runs the answer as Python code; with exact=true",
    "gym:n_queens": "its verifier runs the answer as Python code",
    "gym:string_insertion": "its verifier runs the answer as Python code",
    "gym:puzzle24": "its verifier runs the answer as Python code",
    "gym:simple_integration": "its verifier runs the answer as Python code",
    # what pays for nonsense
    "gym:complex_arithmetic": "the answer 'nan' earns full marks",
    "gym:gsm_symbolic": "the answer '.* or .*' earns full marks",
    "gym:game_of_life_halting": "the answer 'None' earns full marks",
    # nothing to reproduce, nothing to reward
    "gym:list_functions": "the same seed gives another entry",
    "gym:graph_color": "its own answer does not earn full marks",
    "chess": "chess: must be some of arithmetic, .* or gym:GENERATOR of reasoning-gym",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_used_is_refused(name):
    """In one line, when it is asked for."""
    with pytest.raises(ValueError, match=REFUSED[name]) as error:
        ENVIRONMENTS[name]
    assert "\n" not in str(error.value)


def test_exact_answers_need_no_verifier():
    """A generator with an unsound verifier can be used with its own answers alone."""
    env = ENVIRONMENTS["gym:spell_backward?exact=true"]
    assert env.exact
    task = env.task(1, 2)
    answer = task.label["answer"]
    assert play(env, task, [assistant(answer)]).score.value == 1
    assert play(env, task, [assistant(f"{answer} or {answer}0")]).score.value == 0


class Lenient(ReasoningGym):
    """Broken: it takes the verifier's word for an answer of any credit."""

    def full_marks(self, text, entry):
        return self.credit(text, entry) > 0


def test_the_audit_finds_a_lenient_verifier(monkeypatch):
    """A listing of candidates is named; without the audit the contract finds it."""
    with pytest.raises(ValueError, match="' earns full marks"):
        Lenient("gym:chain_sum")
    monkeypatch.setattr(Lenient, "audit", lambda self: None)
    with pytest.raises(AssertionError, match="earns"):
        check_lazy_answers(Lenient("gym:chain_sum"))


def test_without_the_package(monkeypatch):
    """One line that says what to install."""
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", None)
    with pytest.raises(ValueError, match=r"needs reasoning-gym: pip install 'minglm\[gym\]'"):
        ReasoningGym("gym:gcd")


class Handful(Environment):
    """One problem, which belongs to one split only."""

    name = "handful"

    def draw(self, rng, difficulty):
        return [{"role": "user", "content": "1+1"}], "2"


def test_a_split_without_a_problem_is_found():
    """A line, not a loop without an end."""
    found = []
    for split in ("train", "test", "development"):
        try:
            found.append(Handful().task(0, 0, split).label)
        except ValueError as error:
            assert f"handful has no problem in the split {split}" in str(error)
    assert found == ["2"]


def test_a_run_may_name_a_generator():
    """Its phase of RL deals it, its held-out questions stay out of the data, and a wrong name names the field."""
    overrides = ["--posttraining.general_rl.environments", SUMS, "--evaluation.problems", "3"]
    run = load_config("configs/nano.py", overrides)
    check_environments(run)
    assert len(evaluation_texts(run)[f"tasks:{SUMS}"]) == 3
    wrong = load_config("configs/nano.py", [*overrides[:1], "gym:chess"])
    with pytest.raises(ValueError, match=r"general_rl\.environments: gym:chess: "):
        check_environments(wrong)
