"""Screening: every problem is measured, in the draws that it needs, once, also by a run that was stopped on the way."""

from collections import Counter
from types import SimpleNamespace

import pytest
from helpers.scripted import ScriptedGenerator, byte_tokenizer, said

from minglm.common.files import read_json
from minglm.config import CurriculumConfig
from minglm.envs.base import Environment, Episode, Score, ScoreStatus, assistant, user
from minglm.rl import screening
from minglm.rl.curriculum import PassRate, Tier
from minglm.rl.episode import Player, SamplingSettings
from minglm.rl.screening import Screener, screen

CHANCES = (0.0, 0.125, 0.5, 1.0)
TIERS = {0.0: Tier.UNSOLVED, 0.125: Tier.EXTREME, 0.5: Tier.MODERATE, 1.0: Tier.SOLVED}
CONFIG = CurriculumConfig(pool=16, screen=8, search=40, guard_problems=8)


class Chances(Environment):
    """Problems of four difficulties, of whose answers exactly that share is right."""

    name = "chances"

    def __init__(self, broken=False):
        self.broken = broken
        self.played = Counter()

    def draw(self, rng, difficulty):
        return [user(f"{rng.randint(0, 10**9)}?")], rng.choice(CHANCES)

    def episode(self, task):
        self.played[task.id] += 1
        return ChancesEpisode(task, self.played[task.id], self.broken)


class ChancesEpisode(Episode):
    """Take any message."""

    def __init__(self, task, number, broken):
        super().__init__(task)
        self.number = number
        self.broken = broken

    async def step(self, message):
        """End at once."""
        self.done = True
        return []

    async def score(self):
        """Return full marks for every so many-th episode."""
        if self.broken:
            raise OSError("the machine is gone")
        chance = self.task.label
        right = int(self.number * chance) > int((self.number - 1) * chance)
        return Score(float(right), ScoreStatus.OK if right else ScoreStatus.WRONG)


class Bar(SimpleNamespace):
    """Count what a progress bar is told."""

    n = 0

    def update(self, count):
        """Add."""
        self.n += count


def screener(path, environment, answers=10**9):
    """Return a screener whose model dies after so many answers."""
    tokenizer = byte_tokenizer()
    given = iter(range(answers))

    def answer(prompt):
        if next(given, None) is None:
            raise KeyboardInterrupt
        return said(tokenizer, assistant("yes", "so"))

    player = Player(ScriptedGenerator(tokenizer, answer), tokenizer, SamplingSettings(8))
    return Screener(player, {"chances": environment}, 3, path / "screening.json", Bar())


def run(subject, config=CONFIG):
    """Screen with half of the problems thinking."""
    return screen(subject, ("chances", "chances"), config, 0.5)


def test_every_problem_lands_in_its_tier(tmp_path):
    """16 problems, 8 answers each, 32 more to those below a fifth; development problems apart from them."""
    environment = Chances()
    subject = screener(tmp_path, environment)
    found = run(subject)
    again = 0
    for tier, by_name in found.tiers.items():
        for problem in by_name["chances"]:
            assert TIERS[problem.task.label] == tier
            is_rare = problem.task.label <= 0.125
            again += is_rare
            assert environment.played[problem.task.id] == (40 if is_rare else 8)
    assert sum(len(by_name["chances"]) for by_name in found.tiers.values()) == 16
    assert len(found.rates) == 16 and all(isinstance(rate, PassRate) for rate in found.rates)
    assert subject.bar.n == 16 * 8 + again * 32 + 8 * 8 == sum(environment.played.values())
    assert found.held_out and all(problem.task.label == 0.5 for problem in found.held_out)
    trained = {
        problem.task.id for by_name in found.tiers.values() for problem in by_name["chances"]
    }
    assert not trained & {problem.task.id for problem in found.held_out}
    switches = [p.thinking for by_name in found.tiers.values() for p in by_name["chances"]]
    assert sum(switches) == 8


@pytest.mark.parametrize("dies_after", [1, 100, 200])
def test_a_screening_that_was_stopped_goes_on(tmp_path, dies_after):
    """Finished chunks are not played again, and the outcome is that of one go; a complete one plays nothing."""
    whole = run(screener(tmp_path / "whole", Chances()))
    environment = Chances()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(screening, "ANSWERS_AT_ONCE", 40)
        with pytest.raises(KeyboardInterrupt):
            run(screener(tmp_path, environment, dies_after))
        kept = read_json(tmp_path / "screening.json") if dies_after > 40 else {}
        answers = sum(counts[1] for draw in kept.values() for counts in draw)
        assert dies_after - 40 <= answers <= dies_after
        # the environment of a new process has played only what was kept
        environment.played = Counter()
        second = screener(tmp_path, environment)
        found = run(second)
    assert found == whole
    assert sum(environment.played.values()) == second.bar.n - answers
    complete = Chances()
    assert run(screener(tmp_path, complete)) == found and not complete.played


def test_problems_whose_environment_failed_are_left_out(tmp_path):
    """No rate is made up for them, and they are in no tier."""
    with pytest.warns(UserWarning, match="the machine is gone"):
        found = run(screener(tmp_path, Chances(broken=True)))
    assert not found.rates and not found.held_out
    assert not any(by_name["chances"] for by_name in found.tiers.values())


def test_without_a_second_draw_or_a_guard_nothing_more_is_played(tmp_path):
    """search = screen and guard_problems = 0: eight answers to each problem of the pool."""
    environment = Chances()
    config = CurriculumConfig(pool=10, search=8, guard_problems=0)
    found = run(screener(tmp_path, environment), config)
    assert set(environment.played.values()) == {8} and len(environment.played) == 10
    assert not any(rate.second for rate in found.rates)


@pytest.mark.parametrize(
    "kept", ["[]", "5", '{"first": 5}', '{"first": [[1]]}', '{"first": [5]}', "{"]
)
def test_a_damaged_file_is_named(tmp_path, kept):
    """Whatever it holds in the place of counts: one line, and nothing is drawn."""
    environment = Chances()
    subject = screener(tmp_path, environment)
    subject.path.write_text(kept)
    with pytest.raises(ValueError, match=r"^.*screening\.json.*$"):
        run(subject)
    assert not environment.played
