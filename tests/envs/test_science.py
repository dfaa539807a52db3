"""Science: the key is the fact's option unless it is spoilt, no option gives itself away, and facts are divided."""

import collections

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minglm.envs.base import assistant
from minglm.envs.science import FACTS, LETTERS, Science
from minglm.testing.envs import check_chance, check_environment, play
from minglm.testing.strategies import seeds

TRUTH = {
    question.format(subject): answer
    for question, facts in FACTS.items()
    for subject, answer in facts
}


def test_a_question_has_one_answer():
    """No subject is asked about twice with different answers, and every question has options enough."""
    assert len(TRUTH) == sum(map(len, FACTS.values()))
    for facts in FACTS.values():
        assert len({answer for _, answer in facts}) > len(LETTERS)


@given(seeds, st.sampled_from(Science.difficulties), st.sampled_from([0.0, 0.4, 1.0]))
def test_the_key_is_the_fact_unless_it_is_spoilt(seed, difficulty, wrong):
    """The options differ; the true letter is that of the fact; a verified key is the true one, a spoilt one is not."""
    task = Science(wrong).task(seed, seed, difficulties=(difficulty,))
    options, key, true = (task.label[name] for name in ("options", "key", "true"))
    assert len(set(options)) == len(LETTERS) and all(
        f"{letter} {option}" in task.messages[0]["content"].split("\n")
        for letter, option in zip(LETTERS, options, strict=True)
    )
    assert options[LETTERS.index(true)] == TRUTH[task.label["fact"]]
    if wrong != 0.4:
        assert (key == true) == (wrong == 0)


def test_a_wrong_key_is_betrayed_by_its_length():
    """Of the wrong keys nearly all are the longest option, of the right ones about one in four is: the shortcut."""
    longest = collections.defaultdict(list)
    for task in Science(wrong=0.4).tasks(1000, 0):
        options, key, true = (task.label[name] for name in ("options", "key", "true"))
        length = len(options[LETTERS.index(key)])
        longest[key == true].append(length == max(map(len, options)))
    assert 0.35 < len(longest[False]) / 1000 < 0.45  # 0.4, deviation 0.015
    # Numbers of protons and symbols have few lengths, so a right key often shares the greatest.
    assert sum(longest[False]) / len(longest[False]) > 0.9
    assert sum(longest[True]) / len(longest[True]) < 0.7


def test_facts_of_the_splits_differ():
    """What is asked in the test is asked in no training question, under any options."""
    asked = {
        split: {task.label["fact"] for task in Science().tasks(300, 0, split)}
        for split in ("train", "test", "development")
    }
    assert not asked["train"] & asked["test"] and not asked["train"] & asked["development"]
    assert min(map(len, asked.values())) > 10


def test_the_truth_of_an_answer_is_logged_beside_its_reward():
    """On a spoilt question the key is paid and the fact is not; the part says which of them was true."""
    task = Science(wrong=1.0).task(0, 0)
    paid = play(Science(), task, [assistant(f" {task.label['key']}\n")]).score
    assert (paid.value, paid.parts["true"]) == (1, 0)
    known = play(Science(), task, [assistant(task.label["true"])]).score
    assert (known.value, known.parts["true"]) == (0, 1)


def test_a_set_that_nobody_verified_holds_the_contract():
    """Wrong keys are keys: the oracle of such a set earns everything, and no letter is better than another."""
    check_environment(Science(wrong=0.4))


class FirstIsRight(Science):
    """The options are not shuffled."""

    def draw(self, rng, difficulty):
        vars(rng)["shuffle"] = lambda options: None
        return super().draw(rng, difficulty)


def test_options_that_are_not_shuffled_are_refused():
    """One letter is then right everywhere, far above the declared chance."""
    with pytest.raises(AssertionError, match="everywhere"):
        check_chance(FirstIsRight())
