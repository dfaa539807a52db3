"""Contracts of environments and of the sandbox: properties of any verifiable reward (paper 3.2 to 3.4).

    from minglm.testing.envs import check_environment, check_sandbox
    check_environment(MyEnvironment())
    check_sandbox(my_judge)              # my_judge(source, function, cases) -> an object like sandbox.Verdict

Tasks and messages are drawn by hypothesis; the first property that fails raises AssertionError and is named.
"""

import asyncio
import itertools
import json
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from hypothesis import given, settings
from hypothesis import strategies as st

from minglm.config import Split
from minglm.envs.base import (
    Environment,
    Message,
    Score,
    ScoreStatus,
    Task,
    assistant,
    prompt_of,
)
from minglm.envs.sandbox.pool import Case, Verdict
from minglm.testing import strategies

contract = settings(strategies.contract, max_examples=25)  # an example in a sandbox takes seconds


def contract_of(env: Environment) -> settings:
    """Return how many examples to draw of an environment: fewer where each message runs programs."""
    if env.waits:
        return settings(contract, max_examples=2)
    return settings(contract, max_examples=4) if env.group == "coding" else contract


def check_environment(env: Environment) -> None:
    """Check that an environment keeps the interface of `envs.base.Environment`.

    Tasks are a function of (index, seed, split), plain JSON, and never in two splits. The oracle earns 1,
    with its reasoning and without. Lazy and malformed messages earn 0, and the latter end the episode. No
    message raises, or counts as a failure of the machine. A constant answer earns no more than `chance`.
    """
    check_tasks(env)
    check_oracle(env)
    check_lazy_answers(env)
    check_malformed_messages(env)
    check_chance(env)


def strategy(env: Environment) -> st.SearchStrategy[Task]:
    """Return a strategy for tasks of an environment: any difficulty, split, seed and index."""
    return st.builds(
        lambda index, seed, split, difficulty: env.task(index, seed, split, (difficulty,)),
        st.integers(0, 10**6),
        st.integers(0, 2**31),
        st.sampled_from(list(Split)),
        st.sampled_from(env.difficulties),
    )


def content(task: Task) -> str:
    """Return all that a task consists of, as text."""
    return json.dumps([task.messages, task.label], ensure_ascii=False, sort_keys=True)


def problem(env: Environment, task: Task) -> str:
    """Return what a task asks for, as text."""
    return json.dumps(env.problem(list(task.messages), task.label), sort_keys=True)


def check_tasks(env: Environment) -> None:
    """Check determinism, plain values, declared difficulties, and splits that share nothing, whatever the seeds."""

    @contract
    @given(st.integers(0, 10**6), st.integers(0, 2**31), st.sampled_from(list(Split)))
    def deterministic(index: int, seed: int, split: str) -> None:
        task = env.task(index, seed, split)
        assert env.task(index, seed, split) == task, (
            "the same index, seed and split give another task"
        )
        last = env.tasks(index % 5 + 1, seed, split)[-1]
        assert last == env.task(index % 5, seed, split), "tasks differ from task"
        assert task.environment == env.name and task.difficulty in env.difficulties
        assert task.messages[-1]["role"] in ("user", "tool"), (
            "the model speaks next, so the user speaks last, or a tool"
        )
        plain = json.loads(json.dumps([task.messages, task.tools, task.label]))
        assert plain == [list(task.messages), list(task.tools), task.label], (
            "a task must be plain JSON values"
        )

    deterministic()
    drawn: dict[Split, list[Task]] = {split: [] for split in Split}
    for split, tasks in drawn.items():
        for seed in (0, 1):
            tasks += env.tasks(150, seed, split, env.difficulties)
    contents = {split: {content(task) for task in tasks} for split, tasks in drawn.items()}
    problems = {split: {problem(env, task) for task in tasks} for split, tasks in drawn.items()}
    for one, other in itertools.combinations(Split, 2):
        assert not contents[one] & contents[other], f"a {other} task occurs in {one}"
        assert not problems[one] & problems[other], f"the problem of a {other} task occurs in {one}"
    ids = {task.id for tasks in drawn.values() for task in tasks}
    assert len(ids) == len(set().union(*contents.values())), "ids must name contents, one to one"
    trained = Split.TRAIN
    assert len(contents[trained]) > len(drawn[trained]) / 10, "hardly any variety"


class Played(NamedTuple):
    """An episode of given messages."""

    score: Score
    replies: list[list[Message]]
    """What the environment replied to each message."""
    done: bool
    """Whether the environment ended the episode."""


async def play_async(env: Environment, task: Task, messages: Sequence[Any]) -> Played:
    """Play these assistant messages, as far as the episode goes."""
    replies = []
    async with env.episode(task) as episode:
        for message in messages:
            if episode.done:
                break
            replies.append(await episode.step(message))
            assert isinstance(replies[-1], list) and bool(replies[-1]) != episode.done, (
                "no replies if and only if done"
            )
        score = await episode.score()
    assert 0 <= score.value <= 1 and score.status in list(ScoreStatus), score
    assert (score.value == 1) == (score.status == ScoreStatus.OK) or 0 < score.value < 1, score
    assert all(isinstance(value, int | float) for value in score.parts.values()), (
        "parts are numbers"
    )
    return Played(score, replies, episode.done)


def play_all(env: Environment, games: Iterable[tuple[Task, Sequence[Any]]]) -> list[Played]:
    """Play (task, assistant messages) pairs, all at once. The results are in the same order."""

    async def together() -> list[Played]:
        return await asyncio.gather(*(play_async(env, task, said) for task, said in games))

    return asyncio.run(together())


def play(env: Environment, task: Task, messages: Sequence[Any]) -> Played:
    """Play these assistant messages, as far as the episode goes."""
    return play_all(env, [(task, messages)])[0]


def check_oracle(env: Environment) -> None:
    """Check that the demonstration starts with the task, replays to equal replies, and earns the full reward."""

    @contract_of(env)
    @given(strategy(env), st.booleans(), st.integers(0, 3))
    def earns_everything(task: Task, thinking: bool, seed: int) -> None:
        conversation = env.demonstrate(task, thinking, seed)
        assert conversation == env.demonstrate(task, thinking, seed), (
            "the oracle must be a function of its seed"
        )
        prompt = conversation[: len(task.messages)]
        rest = conversation[len(task.messages) :]
        assert prompt == prompt_of(task, thinking), "a demonstration starts with the prompt"
        turns = [message for message in rest if message["role"] == "assistant"]
        assert all(bool(turn.get("reasoning_content")) == thinking for turn in turns), (
            "thoughts where asked for"
        )
        assert len(turns) <= env.max_turns

        played = play(env, task, turns)
        assert played.done, "the oracle does not finish"
        replayed = []
        for turn, replies in zip(turns, played.replies, strict=True):
            replayed += [turn, *replies]
        assert replayed == rest, "a replay gets other replies"
        assert played.score.value == 1, f"the oracle earns {played.score}"

    earns_everything()


def check_lazy_answers(env: Environment) -> None:
    """Check that messages that ignore the task, sent once or until the episode ends, earn nothing."""

    @contract_of(env)
    @given(strategy(env))
    def earns_nothing(task: Task) -> None:
        probes = env.hack_probes(task)
        assert probes, "an environment must name lazy answers"
        games = []
        for probe in probes:
            for times in sorted({1, env.max_turns}):
                games.append((task, [probe] * times))
        for (_, messages), played in zip(games, play_all(env, games), strict=True):
            prompt = task.messages[-1]["content"]
            assert played.score.value == 0, f"{messages[0]} earns {played.score} on {prompt!r}"

    earns_nothing()


def malformed(env: Environment) -> st.SearchStrategy[Any]:
    """Return a strategy for values that are no message, messages with an error, and calls that were not offered."""
    values = st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5), st.lists, max_leaves=5
    )
    wrong_calls: list[tuple[str, Any]] = [("no_such_tool", {})]
    for tool in env.tools():
        function = tool.get("function", tool)
        wrong = [{"order_id": "x", "also": 1}, [], None, "x"]
        if function["parameters"].get("required"):
            wrong.append({})
        wrong_calls += [(function["name"], arguments) for arguments in wrong]
    shaped = st.fixed_dictionaries({"role": st.just("assistant"), "content": st.text(max_size=5)})
    return st.one_of(
        values.filter(lambda value: not isinstance(value, dict)),
        values.filter(lambda value: not isinstance(value, str)).map(
            lambda value: {"content": value}
        ),
        st.builds(
            lambda m, error: m | {"error": error},
            shaped,
            st.sampled_from(["bad_tool_call", "unclosed_think"]),
        ),
        st.builds(
            lambda m, name, value: m | {"tool_calls": [{"name": name, "arguments": value}]},
            shaped,
            *map(st.sampled_from, (["?", ""], [{}, None])),
        ),
        st.builds(
            lambda m, call: m | {"tool_calls": [{"name": call[0], "arguments": call[1]}]},
            shaped,
            st.sampled_from(wrong_calls),
        ),
        st.builds(
            lambda m, value: m | {"tool_calls": value},
            shaped,
            st.sampled_from([1, "x", [1], [None], [{}], [{"name": []}], {"a": 1}]),
        ),
    )


def check_malformed_messages(env: Environment) -> None:
    """Check halt and zero; text of any kind is a wrong answer at worst, never an exception or the machine's fault."""

    @contract_of(env)
    @given(strategy(env), malformed(env))
    def halts(task: Task, message: Any) -> None:
        score, _, done = play(env, task, [message])
        assert done, f"continues after {message!r}"
        assert (score.value, score.status) == (0, "format"), f"{message!r} earns {score}"

    odd_texts = ["9" * 5000, "\0", "\ud800", "(" * 9999, "- \n- ", "。！"]

    @contract_of(env)
    @given(strategy(env), st.text() | st.sampled_from(odd_texts))
    def survives(task: Task, text: str) -> None:
        games = [(task, [assistant(text)] * env.max_turns), (task, [])]
        for score, _, _ in play_all(env, games):
            assert score.status == "wrong" or score.value > 0, f"{text[:40]!r} gives {score}"

    halts()
    survives()


def check_chance(env: Environment) -> None:
    """Check that the last words of other tasks' oracles earn no more than `chance`, as far as 40 tasks can tell."""
    tasks = env.tasks(40, 1, "train", env.difficulties)
    # three standard errors of 40 draws, and three lucky ones where chance is nearly zero
    bound = env.chance + 3 * math.sqrt(env.chance * (1 - env.chance) / 40) + 3 / 40
    for donor in env.tasks(4, 2, "train", env.difficulties):
        answer = env.demonstrate(donor)[-1]
        played = play_all(env, [(task, [answer] * env.max_turns) for task in tasks])
        mean = sum(score.value for score, _, _ in played) / len(tasks)
        assert mean <= bound, (
            f"{answer['content']!r} earns {mean:.2f} everywhere, chance = {env.chance}"
        )


# Programs that try to pass without computing f(x) = 3 * x + 17, from harmless to hostile, with the status they deserve.
CHEATS = {
    "sys.exit(0) at import": ("import sys\nsys.exit(0)", "crash"),
    "sys.exit(0) in the function": ("import sys\ndef f(x):\n    sys.exit(0)", "crash"),
    "os._exit(0)": ("import os\ndef f(x):\n    os._exit(0)", "crash"),
    "no function": ("x = 1", "crash"),
    "not Python": ("def f(x:\n", "crash"),
    "a null byte": ("def f(x):\n    return 3 * x + 17\0", "crash"),
    "an exception": ("def f(x):\n    raise AssertionError('passed')", "crash"),
    "nothing": ("def f(x):\n    pass", "wrong"),
    "the right text": ("def f(x):\n    return str(3 * x + 17)", "wrong"),
    "the right float": ("def f(x):\n    return 3.0 * x + 17", "wrong"),
    "right once": ("def f(x):\n    return 17", "wrong"),
    "printed": ("def f(x):\n    print(3 * x + 17)", "wrong"),
    "equal to everything": (
        "class Same(int):\n    def __eq__(self, other):\n        return True\n    def __repr__(self):\n"
        "        return '17'\ndef f(x):\n    return Same()",
        "wrong",
    ),
    "patched builtins": (
        "import builtins, json\nclass Same(str):\n    def __eq__(self, other):\n        return True\n"
        "builtins.repr = lambda value: Same('17')\njson.dumps = lambda value: '[]'\ndef f(x):\n    return 0",
        "wrong",
    ),
    "stolen frame": (
        "import sys\ndef f(x):\n    frame = sys._getframe(1)\n    while frame:\n"
        "        for value in list(frame.f_locals.values()):\n"
        "            if isinstance(value, dict) and 'cases' in value:\n"
        "                return dict((a[0], e) for a, e in value['cases'])[x]\n        frame = frame.f_back",
        "wrong",
    ),
    "forged answer": (
        "import os, sys\ndef f(x):\n    secret = ''\n    frame = sys._getframe(1)\n    while frame:\n"
        "        for value in list(frame.f_locals.values()):\n"
        "            if isinstance(value, dict) and 'secret' in value:\n                secret = value['secret']\n"
        "        frame = frame.f_back\n    answer = secret + '\\nvalue i 17' * 8\n    for d in range(3, 64):\n        try:\n"
        "            os.write(d, answer.encode())\n"
        "        except OSError:\n            pass\n    os._exit(0)",
        "wrong or crash",
    ),
    "an output flood": ("def f(x):\n    return 'x' * 10**6", "crash"),
    "an endless loop": ("def f(x):\n    while True:\n        pass", "timeout"),
    "an endless loop at import": ("while True:\n    pass", "timeout"),
    "sleep": ("import time\ndef f(x):\n    time.sleep(60)", "timeout"),
    "unbounded recursion": (
        "import sys\nsys.setrecursionlimit(10**9)\ndef f(x):\n    return f(x)",
        "crash or timeout",
    ),
    "2 GB": ("def f(x):\n    return len(bytearray(2 * 10**9))", "crash"),
    "null pointer": ("import ctypes\ndef f(x):\n    ctypes.string_at(0)", "crash"),
}


# Equality is Python's; types are those of the expected value, and an int may stand for a float.
EQUALITIES = (
    ("2", 2.0, "passed"),
    ("2.0", 2, "wrong"),
    ("-0.0", 0.0, "passed"),
    ("True", 1, "wrong"),
    ("0", False, "wrong"),
    ("None", 0, "wrong"),
    ("'1'", 1, "wrong"),
    ("(1,)", [1], "wrong"),
    ("{2: 'b', 1: 'a'}", {1: "a", 2: "b"}, "passed"),
    ("{1: 'a'}", {1: "a", 2: "b"}, "wrong"),
    ("{3, 1, 2}", {1, 2, 3}, "passed"),
    ("[1, 2, 3]", {1, 2, 3}, "wrong"),
    ("frozenset([1])", {1}, "wrong"),
    ("b'ab'", b"ab", "passed"),
    ("'ab'", b"ab", "wrong"),
    ("1j + 2", 2 + 1j, "passed"),
    ("__import__('collections').Counter('aab')", {"a": 2, "b": 1}, "passed"),
    ("float('nan')", 0.0, "wrong"),
    ("10**5000", 10**5000, "passed"),
)
"""Expression of an answer, expected value, status."""

Judge = Callable[[str, str, Sequence[Case]], Verdict]
"""(source, name of the function, cases) -> Verdict."""


def check_sandbox(judge: Judge) -> None:
    """Check a function like `Sandbox.judge`.

    A right program passes, whatever its arguments do to themselves. Each of CHEATS gets its own status. A
    judgement does not depend on the ones before it. Values are equal as EQUALITIES says.
    """
    cases = [([x], 3 * x + 17) for x in range(8)]
    honest = "def f(x):\n    return 17 + x * 3"
    for name, (source, status) in CHEATS.items():
        verdict = judge(source, "f", cases)
        assert verdict.status in status.split(" or "), f"{name}: {verdict}, expected {status}"
        assert verdict.total == 8 and verdict.passed < 8
        verdict = judge(honest, "f", cases)
        assert (verdict.status, verdict.passed) == ("passed", 8), (
            f"a right program after {name}: {verdict}"
        )

    mutates = "def f(xs):\n    xs.append(1)\n    return xs"
    verdict = judge(mutates, "f", [([[]], [1]), ([[]], [1]), ([[2]], [2, 1])])
    assert verdict.status == "passed", "tests share arguments"

    check_equalities(judge)


def check_equalities(judge: Judge) -> None:
    """Check that values are equal as EQUALITIES says."""
    for answer, expected, status in EQUALITIES:
        verdict = judge(f"def f():\n    return {answer}", "f", [([], expected)])
        assert verdict.status == status, f"{answer} for {expected!r}: {verdict.status}"
