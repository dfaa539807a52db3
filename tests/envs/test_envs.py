"""Environments: each holds the contract, broken ones are refused, and the scores say what the task says."""

# A message is a mapping for those who read it, and a dict where a test changes one.
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportArgumentType=false

import asyncio
import collections
import dataclasses
import json
import random
import re
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minglm.config import Split
from minglm.envs import ENVIRONMENTS, Environments
from minglm.envs import code as code_module
from minglm.envs.arithmetic import Arithmetic
from minglm.envs.base import (
    Misconfigured,
    SingleTurnEpisode,
    assistant,
    fingerprint,
    message_fault,
    run_without_waiting,
    split_of,
    user,
    verdict,
)
from minglm.envs.code import Code, cases, meaning
from minglm.envs.instructions import CHECKS, VALUE, WORDS, Instructions, split_words
from minglm.envs.pathology import PathologyPrompts
from minglm.envs.sandbox.pool import Verdict
from minglm.envs.worlds.retail import OUTCOME, TOOLS, Retail, outcomes_told
from minglm.testing import strategies
from minglm.testing.envs import check_environment, play_all
from minglm.testing.envs import play as play_messages
from minglm.testing.strategies import seeds


@pytest.mark.parametrize("env", ENVIRONMENTS.values(), ids=ENVIRONMENTS)
def test_contract_holds(env):
    """Every environment of the project keeps the contract it offers to others."""
    check_environment(env)


class Forgetful(Arithmetic):
    """A task depends on how many were drawn before."""

    drawn = 0

    def task(self, index, seed, split="train", difficulties=None):
        self.drawn += 1
        return super().task(index + self.drawn, seed, split, difficulties)


class OneSplit(Arithmetic):
    """All splits are the same tasks."""

    def task(self, index, seed, split="train", difficulties=None):
        return super().task(index, seed, "train", difficulties)


class SeedSplit(Arithmetic):
    """Train and test differ by the seed only, so that short tasks occur in both."""

    def task(self, index, seed, split="train", difficulties=None):
        if split == "test":
            return super().task(index, seed + 12345, "train", difficulties)
        return super().task(index, seed, split, difficulties)


class SplitByWords(Arithmetic):
    """Train and test share no text, and every result that a text can ask for."""

    def problem(self, messages, label):
        return [label]

    def task(self, index, seed, split="train", difficulties=None):
        return Arithmetic().task(index, seed, split, difficulties)


class CarelessOracle(Arithmetic):
    """The oracle is wrong where the result is large."""

    def oracle(self, task, conversation, rng):
        message = super().oracle(task, conversation, rng)
        return message | {"content": str(min(7, int(message["content"])))}


class AlwaysThinks(Arithmetic):
    """The oracle cannot be told not to think."""

    def demonstrate(self, task, thinking=True, seed=0):
        return super().demonstrate(task, True, seed)


class Lenient(Arithmetic):
    """The answer may stand anywhere, so listing all answers pays."""

    def judge(self, task, message):
        return verdict(task.label in message["content"].split())


class Fragile(Arithmetic):
    """The grader assumes a number; its exception would count as the machine's fault."""

    def judge(self, task, message):
        return verdict(int(message["content"]) == int(task.label))


class Forgiving(Arithmetic):
    """Malformed messages are graded by their content."""

    def episode(self, task):
        class Deaf(SingleTurnEpisode):
            async def step(self, message):
                self.message = message
                self.done = True
                return []

        return Deaf(self, task)


class Parity(Arithmetic):
    """Even or odd: half of the reward is there for the guessing, and not declared."""

    def oracle(self, task, conversation, rng):
        return super().oracle(task, conversation, rng) | {
            "content": "odd" if int(task.label) % 2 else "even"
        }

    def judge(self, task, message):
        return verdict(message["content"] == ("odd" if int(task.label) % 2 else "even"))


class Trusting(Retail):
    """The final words are enough when nothing had to change."""

    def completed(self, task, world):
        world.looked_up = set(task.label["wanted"])
        return super().completed(task, world)


class Partial(Instructions):
    """Full reward for half of the constraints."""

    def judge(self, task, message):
        parts = super().judge(task, message).parts
        return verdict(sum(parts.values()) / len(parts) >= 0.5, parts)


class Silent(PathologyPrompts):
    """No fault found is all it asks, so that silence is the best answer."""

    def judge(self, task, message):
        return verdict(True)


BROKEN = {
    Forgetful: "give another task",
    OneSplit: "a development task occurs in train",
    SeedSplit: "a test task occurs in train",
    SplitByWords: "problem of a development task occurs in train",
    CarelessOracle: "the oracle earns",
    AlwaysThinks: "thoughts where asked for",
    Lenient: "earns",
    Fragile: "gives Score",
    Forgiving: "earns|raised|NoneType",
    Parity: "everywhere",
    Trusting: "earns",
    Partial: "earns",
    Silent: "earns",
}


@pytest.mark.parametrize("broken", BROKEN, ids=lambda cls: cls.__name__)
def test_contract_refuses_broken_environments(broken):
    """Each fault is found, by the property it breaks."""
    with pytest.raises(AssertionError, match=BROKEN[broken]):
        check_environment(broken())


def test_difficulties_and_splits_are_checked():
    """An unknown difficulty or split is one clear line."""
    with pytest.raises(ValueError, match=r"difficulties = \(13,\): arithmetic has difficulties"):
        ENVIRONMENTS["arithmetic"].task(0, 0, difficulties=(13,))
    with pytest.raises(ValueError, match="use 'train', 'development', 'test'"):
        ENVIRONMENTS["arithmetic"].task(0, 0, split="dev")


@given(seeds)
def test_shares_of_the_splits(seed):
    """About one content in ten is a test task and one a development task: the hash divides evenly, whatever the seed."""
    env = ENVIRONMENTS["arithmetic"]
    rng = random.Random(seed)
    counts = collections.Counter()
    for _ in range(400):
        messages, label = env.draw(rng, 5)
        counts[split_of(fingerprint([env.name, messages, label]))] += 1
    for split in (Split.DEVELOPMENT, Split.TEST):
        assert 12 <= counts[split] <= 72  # 40 expected, deviation 6; five of them to each side


@pytest.mark.parametrize("name", ["arithmetic", "code", "instructions", "retail"])
def test_demonstrations_show_the_easy_part(name):
    """What is shown is a part of the scale, every difficulty of it, beginning with the easiest that is dealt."""
    env = ENVIRONMENTS[name]
    shown = {task.difficulty for task in env.shown_tasks(60, seed=0)}
    assert shown == set(env.shown_difficulties or env.default_difficulties)
    assert min(shown) <= min(env.default_difficulties)
    assert max(shown) <= max(env.default_difficulties)


class AskingInPlace(Environments):
    """Asks other difficulties, by changing the environments themselves."""

    def asking(self, asked, shown=None):
        for name, difficulties in asked.items():
            self[name].default_difficulties = difficulties
        return self


def check_asking(environments, name, difficulties, shown):
    """Check that these difficulties are asked and these shown, and that the environments stay as they were."""
    before = environments[name].tasks(6, 0), environments[name].shown_tasks(6, 0)
    changed = environments.asking({name: difficulties})[name]
    assert {task.difficulty for task in changed.tasks(12, 0)} <= set(difficulties)
    assert changed.shown_tasks(6, 0) == before[1]
    changed = environments.asking({}, {name: shown})[name]
    assert {task.difficulty for task in changed.shown_tasks(12, 0)} <= set(shown)
    assert changed.tasks(6, 0) == before[0]
    assert (environments[name].tasks(6, 0), environments[name].shown_tasks(6, 0)) == before


@given(st.sampled_from(["arithmetic", "instructions", "retail", "science"]), st.data())
def test_what_is_asked_is_apart_from_what_is_shown(name, data):
    """A run asks any difficulties and shows any others; naming one of the two leaves the other as it was."""
    levels = st.sampled_from(ENVIRONMENTS[name].difficulties)
    asked, shown = (tuple(data.draw(st.lists(levels, min_size=1))) for _ in range(2))
    check_asking(ENVIRONMENTS, name, asked, shown)


def test_asking_in_place_is_found():
    """A twin that changes the environments for everyone fails."""
    with pytest.raises(AssertionError):
        check_asking(AskingInPlace(Arithmetic()), "arithmetic", (9,), (2,))


def test_asked_difficulties_exist():
    """A difficulty that an environment does not have is one clear line, with those that it has."""
    with pytest.raises(ValueError, match="retail:1,4: retail has the difficulties 1, 2, 3"):
        ENVIRONMENTS.asking({"retail": (1, 4)})


def test_faults_of_calls():
    """Every way to break a call's schema is named; what the schema allows is no fault, in either nesting."""

    def call(name, arguments):
        return assistant() | {"tool_calls": [{"name": name, "arguments": arguments}]}

    nested = tuple({"type": "function", "function": tool} for tool in TOOLS)
    for tools in (TOOLS, nested):
        assert message_fault(call("get_order", {"order_id": 482}), tools) is None
        assert "unknown tool" in message_fault(call("drop_table", {}), tools)
        assert "wrong arguments" in message_fault(call("get_order", {}), tools)
        assert "wrong arguments" in message_fault(call("get_order", {"order_id": 1, "x": 2}), tools)
        for value in ("482", 4.5, True, None, [482]):
            assert "not of type integer" in message_fault(
                call("get_order", {"order_id": value}), tools
            )
    assert message_fault(assistant("hello") | {"error": "bad_tool_call"}, TOOLS) == "bad_tool_call"


# Arithmetic


@given(seeds, st.integers(1, 6))
def test_arithmetic_is_right(seed, difficulty):
    """The label is the value of the sum, every step of the thought is true, and partial results stay in range."""
    env = ENVIRONMENTS["arithmetic"]
    task = env.task(seed, seed, difficulties=(difficulty,))
    prompt = task.messages[0]["content"]
    terms = [int(t) for t in prompt.rstrip("=").replace("+", " ").replace("-", " -").split()]
    assert len(terms) == difficulty + 1
    assert int(task.label) == sum(terms)
    steps = env.demonstrate(task)[-1]["reasoning_content"].split(";")
    for i, step in enumerate(steps):
        left, right = step.split("=")
        assert int(left.replace("-", "+-").split("+")[0]) == sum(terms[: i + 1])
        assert int(right) == sum(terms[: i + 2])
        assert 0 <= int(right) <= 9


def test_arithmetic_score_is_strict():
    """Whitespace around the number is ignored; everything else counts."""
    env = ENVIRONMENTS["arithmetic"]
    task = env.task(0, 0)
    for text, value in (
        (task.label, 1),
        (f" {task.label}\n", 1),
        (f"{task.label}.", 0),
        (f"0{task.label}", 0),
    ):
        assert play_messages(env, task, [assistant(text)]).score.value == value, text


# Retail


def shop(status, difficulty=1, secret=None, other="pending"):
    """Return an episode about order 482 (and 317 in difficulty 3), with two bystanders."""
    wanted = [482, 317] if difficulty == 3 else [482]
    orders = {"482": status, "317": other, "555": "pending", "666": "delivered"}
    label = {"orders": orders, "wanted": wanted, "secret": secret}
    task = dataclasses.replace(
        ENVIRONMENTS["retail"].task(0, 0),
        label=label,
        messages=(user("..."),),
        difficulty=difficulty,
    )
    return ENVIRONMENTS["retail"].episode(task)


def play(episode, *turns):
    """Say strings, make calls ("get", 482); return the score, and the last replies."""
    replies = []
    for turn in turns:
        message = assistant(turn) if isinstance(turn, str) else assistant("", None, [call_of(turn)])
        replies = run_without_waiting(episode.step(message))
    return run_without_waiting(episode.score()), replies


def call_of(turn):
    return f"{turn[0]}_order", {"order_id": turn[1]}


@pytest.mark.parametrize(
    ("status", "turns", "value"),
    [
        ("pending", [("get", 482), ("cancel", 482), "Order 482 is cancelled."], 1),
        ("pending", [("get", 482), ("cancel", 482), "It is canceled"], 1),
        ("pending", [("get", 482), ("cancel", 482), "Order 482 is returned."], 0),
        ("pending", [("get", 482), ("cancel", 482), "Order 482 is cancelled or returned."], 0),
        ("pending", [("get", 482), ("cancel", 482), "Order 483 is cancelled."], 0),
        ("pending", [("get", 482), ("cancel", 482), "Done."], 0),
        ("pending", [("get", 482), "Order 482 is cancelled."], 0),  # said, not done
        # Acted blindly.
        ("pending", [("cancel", 482), ("get", 482), ("cancel", 482), "Order 482 is cancelled."], 0),
        # Tried both.
        ("pending", [("get", 482), ("return", 482), ("cancel", 482), "Order 482 is cancelled."], 0),
        (
            "pending",
            [
                ("get", 482),
                ("cancel", 482),
                ("get", 555),
                ("cancel", 555),
                "Order 482 is cancelled.",
            ],
            0,
        ),
        ("pending", [("get", 482), ("get", 999), ("cancel", 482), "Order 482 is cancelled."], 1),
        ("delivered", [("get", 482), ("return", 482), "Order 482 is returned."], 1),
        ("delivered", [("get", 482), ("cancel", 482), "Order 482 is cancelled."], 0),
        ("shipped", [("get", 482), "Order 482 is on its way."], 1),
        ("shipped", ["Order 482 is on its way."], 0),  # a guess
        ("shipped", [("get", 482), ("get", 482), "Order 482 is on its way."], 1),
        ("shipped", [("get", 482)] * 8, 0),  # out of turns
    ],
)
def test_retail_policy(status, turns, value):
    """Look up, do what the policy says and nothing else, and tell the customer."""
    score, _ = play(shop(status), *turns)
    assert (score.value, score.status) == (value, "ok" if value else "wrong"), score


def test_retail_customer_tells_the_number_once():
    """A question brings the number, if it is still unknown; a statement, or a second question, ends the talk."""
    episode = shop("shipped", difficulty=2, secret="It is 482.")
    assert run_without_waiting(episode.step(assistant("Which order?"))) == [user("It is 482.")]
    assert play(episode, ("get", 482), "Order 482 is on its way.")[0].value == 1
    assert play(shop("shipped", difficulty=2, secret="482."), "I will help you.")[1] == []
    episode = shop("shipped", difficulty=2, secret="482.")
    play(episode, "Which order?", "Which order?")
    assert episode.done and run_without_waiting(episode.score()).value == 0


def test_retail_two_orders_and_parallel_calls():
    """Both orders count, and several calls in one message get one result each, in order."""
    episode = shop("pending", difficulty=3, other="shipped")
    both = assistant("", None, [call_of(("get", 482)), call_of(("get", 317))])
    replies = run_without_waiting(episode.step(both))
    assert [json.loads(r["content"]) for r in replies] == [
        {"status": "pending"},
        {"status": "shipped"},
    ]
    assert all(r["role"] == "tool" for r in replies)
    score, _ = play(episode, ("cancel", 482), "Order 482 is cancelled. Order 317 is on its way.")
    assert score.value == 1 and (score.parts["calls"], score.parts["valid_calls"]) == (3, 3)
    episode = shop("pending", difficulty=3, other="shipped")
    assert play(episode, ("get", 482), ("cancel", 482), "Order 482 is cancelled.")[0].value == 0


def test_retail_halts_on_a_malformed_call():
    """Value 0 at once, with the calls counted: one was valid, one was not."""
    episode = shop("shipped")
    play(episode, ("get", 482))
    malformed = assistant("", None, [("get_order", {"order_id": "482"})])
    assert run_without_waiting(episode.step(malformed)) == []
    score = run_without_waiting(episode.score())
    assert episode.done and (score.value, score.status) == (0, "format")
    assert (score.parts["calls"], score.parts["valid_calls"], score.parts["format"]) == (2, 1, 1)


@pytest.mark.parametrize(
    ("reply", "told"),
    [
        ("482 and 317 are cancelled.", ("cancelled", "cancelled")),
        ("Order 317 is returned, 482 is cancelled.", ("cancelled", "returned")),
        # Read from the number on; no credit for less.
        ("Cancelled: 482. On its way: 317.", ("on its way", None)),
        ("482 cancelled", (None, None)),
        ("482 is cancelled, 482 and 317 are returned", (None, None)),
        ("482 is cancelled and returned, 317 is returned", (None, "returned")),
        ("", (None, None)),
        # What is denied is not told, and takes no other order's statement.
        ("482 is not cancelled. 317 is returned.", (None, "returned")),
        ("482 can't be cancelled or returned, it is on its way. 317 isn't.", ("on its way", None)),
        ("Neither 482 nor 317 is cancelled.", (None, None)),
    ],
)
def test_retail_reading_of_replies(reply, told):
    """Each order gets the statement that follows its number, or none."""
    assert tuple(outcomes_told(reply, [482, 317])[n] for n in ("482", "317")) == told


@pytest.mark.parametrize("name", ["retail", "airline"])
@given(
    seed=seeds,
    denial=st.sampled_from(
        [
            "not",
            "was never",
            "isn't",
            "isn’t",
            "cannot be",
            "could not be",
            "is not yet",
            "won't be",
        ]
    ),
)
def test_an_outcome_that_is_denied_was_not_told(name, denial, seed):
    """The oracle's talk, whose last words deny what was done, earns nothing, however they deny it."""
    env = ENVIRONMENTS[name]
    task = env.task(seed, seed)
    talk = [m for m in env.demonstrate(task)[1:] if m["role"] == "assistant"]
    right = talk[-1]["content"]
    wrong = re.sub(r" is (?!not )", f" {denial} ", right, count=1)
    said = talk[-1] | {"content": wrong}
    assert play_messages(env, task, [*talk[:-1], said]).score.value == float(wrong == right)


@given(seeds, st.sampled_from([1, 2, 3]))
def test_retail_wrong_outcomes_earn_nothing(seed, difficulty):
    """The oracle's talk, with the last message about another outcome, earns nothing."""
    env = ENVIRONMENTS["retail"]
    task = env.task(seed, seed, difficulties=(difficulty,))
    talk = [m for m in env.demonstrate(task)[1:] if m["role"] == "assistant"]
    for right in OUTCOME.values():
        for wrong in OUTCOME.values():
            if right in talk[-1]["content"] and wrong != right:
                lie = talk[-1] | {"content": talk[-1]["content"].replace(right, wrong, 1)}
                assert play_messages(env, task, [*talk[:-1], lie]).score.value == 0


# Instructions


@pytest.mark.parametrize("name", ["instructions", "constraints", "unseen_constraints"])
@given(seed=seeds)
def test_an_answer_that_says_nothing_obeys_nothing(name, seed):
    """No constraint holds of an answer without a word, so that no partial credit is paid for silence."""
    env = ENVIRONMENTS[name]
    task = env.task(seed, seed)
    for text in ("", " \n", "!", "()", ", "):
        assert not any(env.judge(task, assistant(text)).parts.values()), text


def changed(kind, value, text, language):
    """Return the answer `text`, changed so that it breaks one kind of constraint."""
    words = split_words(text)
    free = [w for w in WORDS[language] if w not in words]
    smallest = WORDS[language][0]
    largest = WORDS[language][8]

    def instead(fits):
        return text.replace(words[0], next(w for w in free if fits(w)), 1)

    def first_two(first, second):
        # By marks, since a new first word may equal the old second one.
        marked = text.replace(words[0], "\1", 1).replace(words[1], "\2", 1)
        return marked.replace("\1", first).replace("\2", second)

    return {
        "count": lambda: text.replace(words[0], f"{words[0]} {free[0]}", 1),
        "repeat": lambda: instead(lambda word: True),
        "language": lambda: text.replace(words[0], "café" if language == "zh" else "七", 1),
        "even": lambda: instead(lambda word: VALUE[word] % 2 == 1),
        "odd": lambda: instead(lambda word: VALUE[word] % 2 == 0),
        "above": lambda: instead(lambda word: VALUE[word] <= value),
        "below": lambda: instead(lambda word: VALUE[word] >= value),
        "include": lambda: text.replace(value, free[0]),
        "avoid": lambda: text.replace(words[0], value, 1),
        "up": lambda: first_two(largest, smallest),
        "down": lambda: first_two(smallest, largest),
        "start": lambda: instead(lambda word: word[0] != value),
        "forbid": lambda: text.replace(words[0], words[0] + value, 1),
        "capitals": lambda: text.lower(),
        "dashes": lambda: text.replace("- ", "* ", 1),
        "numbered": lambda: text.replace("1. ", "2. ", 1),
        "commas": lambda: text.replace(", ", " ", 1).replace("，", " ", 1),
        "brackets": lambda: text.replace(")", ""),
        "end": lambda: text[:-1],
    }[kind]()


@given(seeds, st.sampled_from([1, 2, 3, 4]))
def test_each_instruction_counts(seed, difficulty):
    """Every constraint of a perfect answer, broken by itself, costs the reward, and `parts` names it."""
    env = ENVIRONMENTS["instructions"]
    task = env.task(seed, seed, difficulties=(difficulty,))
    constraints = task.label["constraints"]
    assert len(constraints) == min(difficulty, 3) + 2  # number and language are always given
    right = env.demonstrate(task)[-1]["content"]
    text = right.lower() if "capitals" not in constraints else right
    for kind, value in constraints.items():
        if kind != "capitals" and "capitals" in constraints:
            broken = changed(kind, value, text.lower(), constraints["language"]).upper()
        else:
            broken = changed(kind, value, text, constraints["language"])
        score = env.judge(task, assistant(broken))
        assert score.value == 0 and score.parts[kind] == 0, (kind, broken, score)


def test_instructions_have_every_kind():
    """Many tasks show all kinds of constraints, in both languages."""
    tasks = ENVIRONMENTS["instructions"].tasks(2000, 0, difficulties=(1, 2, 3, 4))
    assert {kind for t in tasks for kind in t.label["constraints"]} == set(CHECKS)
    pairs = {(t.label["asked"], t.label["constraints"]["language"]) for t in tasks}
    assert pairs == {("en", "en"), ("en", "zh"), ("zh", "zh"), ("zh", "en")}


# Code


@given(seeds, st.sampled_from([1, 2, 3, 4]))
def test_code_tests_mean_what_the_words_say(seed, difficulty):
    """The prompt names the steps of the label in order, and the tests tell it from every shorter list of steps."""
    task = ENVIRONMENTS["code"].task(seed, seed, difficulties=(difficulty,))
    steps = task.label["steps"]
    words = task.messages[0]["content"].split(": ")[1].rstrip(".").split(", then ")
    assert words == [code_module.STEPS[name].words.format(c=c) for name, c in steps]
    assert len(steps) == difficulty
    # A constant that the prompt does not show would make two tasks of one prompt.
    for name, c in steps:
        assert (c is None) == ("{c}" not in code_module.STEPS[name].words)
    for i in range(difficulty):
        shorter = steps[:i] + steps[i + 1 :]
        assert any(meaning(shorter, value) != expected for [value], expected in cases(task.label))


def computed(task):
    """Compute what a task's function does to numbers beyond those of the tests, or to lists of its own."""
    rng = random.Random(0)
    lists = [[rng.randint(-20, 40) for _ in range(rng.randint(0, 9))] for _ in range(60)]
    inputs = range(-60, 61) if task.label["argument"] == "x" else lists
    return json.dumps([meaning(task.label["steps"], value) for value in inputs])


@settings(strategies.contract, max_examples=4)
@given(seeds, seeds, st.sampled_from([(1,), (2,), (1, 2, 3, 4)]))
def test_no_test_function_is_computed_in_training(seed, other, difficulties):
    """Whatever the words, the seeds and the difficulties."""
    env = ENVIRONMENTS["code"]
    tests = {computed(env.task(i, seed, "test", difficulties)) for i in range(30)}
    trained = {computed(env.task(i, other, "train")) for i in range(200)}
    assert not tests & trained and len(tests) >= 3


def test_tasks_in_other_words_are_one_problem():
    """Ways to say a function share a problem; another function, of however little difference, does not."""
    env = ENVIRONMENTS["code"]

    def problem(*steps, argument="x"):
        return env.problem([user("any words")], {"argument": argument, "steps": list(steps)})

    assert problem(["add", 3]) == problem(["add", 5], ["subtract", 2])
    assert problem(["times", 4]) == problem(["times", 2], ["times", 2])
    assert problem(["at_least", 3]) == problem(["at_least", 2], ["at_least", 3])
    assert problem(["add", 3]) != problem(["add", 4])
    assert problem(["abs", None]) != problem(["at_least", 2], ["abs", None])
    assert problem(["sort", None], argument="xs") == problem(
        ["reverse", None], ["sort", None], argument="xs"
    )


def test_a_task_of_code_whose_tests_cannot_be_compared_is_never_dealt(monkeypatch):
    """An operation with such a value is an error when the task is made, not a failure of every answer."""
    broken = {"add": code_module.STEPS["add"]._replace(meaning=lambda x, c: float("nan"))}
    monkeypatch.setattr(code_module, "STEPS", code_module.STEPS | broken)
    with pytest.raises(ValueError, match="equals nothing"):
        ENVIRONMENTS["code"].tasks(50, 0, difficulties=(1,))


def test_code_accepts_any_right_program():
    """Another way to compute the function, and a fenced one, earn the reward; in parallel and alone."""
    env = ENVIRONMENTS["code"]
    label = {"argument": "x", "steps": [["add", 3], ["abs", None], ["times", 2]]}
    task = dataclasses.replace(env.task(0, 0), label=label)
    sources = {
        "def f(x):\n    return 2 * abs(x + 3)": 1,
        "f = lambda x: 2 * max(x + 3, -x - 3)": 1,
        "Here:\n```python\ndef f(x):\n    y = x + 3\n    return y * 2 if y > 0 else -y - y\n```\nDone.": 1,
        "```py\ndef f(x):\n    return 2 * abs(x + 3)\n```": 1,
        "``` Python3 \ndef f(x):\n    return 2 * abs(3 + x)\n```": 1,
        "def f(x):\n    return 2 * (x + 3)": 0,
        "def g(x):\n    return 2 * abs(x + 3)": 0,
    }
    played = play_all(env, [(task, [assistant(source)]) for source in sources])
    assert [p.score.value for p in played] == list(sources.values())
    assert env.judge(task, assistant(next(iter(sources)))).value == 1


def stub_sandbox(monkeypatch, judge):
    """Let the code tasks be judged by `judge(source, function, cases, seconds)`; return the sources in a list."""
    judged = []

    def submit(source, *rest):
        judged.append(source)
        future = Future()
        loop = asyncio.get_running_loop()
        loop.call_later(0.01, lambda: future.set_result(judge(source, *rest)))
        return future

    monkeypatch.setattr(code_module, "shared", lambda floor: SimpleNamespace(submit=submit))
    return judged


def test_code_failure_of_the_sandbox_is_nobodys_fault(monkeypatch):
    """An infrastructure Verdict becomes an infrastructure Score."""
    env = Code()
    stub_sandbox(monkeypatch, lambda *_: Verdict("infrastructure", 0, 10, "a sandbox worker died"))
    score = play_messages(env, env.task(0, 0), [assistant("def f(x):\n    return x")]).score
    assert (score.value, score.status) == (0, "infrastructure") and "worker died" in score.detail


def test_equal_answers_are_judged_once(monkeypatch):
    """Answers to one task that wait at the same time share a verdict; another task or another time does not."""
    env = Code()
    judged = stub_sandbox(monkeypatch, lambda *_: Verdict("passed", 10, 10))
    task, other = env.tasks(2, 0)
    games = [(task, [assistant("a")]), (task, [assistant("a")]), (task, [assistant("b")])]
    played = play_all(env, [*games, (other, [assistant("a")])])
    assert sorted(judged) == ["a", "a", "b"]
    assert all(p.score.value == 1 for p in played)
    play_all(env, games[:1])
    assert len(judged) == 4 and not env.in_flight


def test_code_refuses_weak_isolation(monkeypatch):
    """Below the floor, grading stops with one clear line, and does not report failures sample by sample."""
    env = Code()

    def refuse(floor):
        raise ValueError(f"below {floor}")

    monkeypatch.setattr(code_module, "shared", refuse)
    with pytest.raises(Misconfigured, match="below no-namespaces"):
        play_messages(env, env.task(0, 0), [assistant("def f(x):\n    return x")])


# Pathology prompts


def test_provocation_reports_each_detector():
    """A fault of each kind costs the reward and shows in parts, also when the format halts the episode."""
    env = ENVIRONMENTS["provocation"]
    task = next(t for t in env.tasks(50, 0) if t.label == "en")
    for text, error, part in (
        ("Iron is 一种 金属 and 固体 too.", None, "language_mixing"),
        ("iron is iron " * 40, None, "repetition"),
        ("Iron is a solid.</think>", None, "format"),
        ("Iron is a solid.", "stray_tag", "format"),
    ):
        score = play_messages(env, task, [assistant(text) | {"error": error}]).score
        assert score.value == 0 and score.parts[part] == 1, (text, score)
        assert {"language_mixing", "repetition", "format"} <= set(score.parts)
