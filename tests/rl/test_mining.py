"""Mining: the prompts that are kept are those that provoked a fault, whoever stops it on the way, and RL meets so many of them."""

from collections import Counter

import pytest
from helpers.scripted import ScriptedGenerator, byte_tokenizer, said
from tqdm import tqdm

from minglm.config import MiningConfig, load_config
from minglm.config.posttraining import Split
from minglm.envs import ENVIRONMENTS
from minglm.envs.base import Environment, SingleTurn, assistant, user, verdict
from minglm.recipe.inputs import check_environments
from minglm.rl import screening
from minglm.rl.episode import Player, SamplingSettings
from minglm.rl.mining import has_fault, mine
from minglm.rl.schedule import TaskSchedule
from minglm.rl.screening import Screener

LOOP = "over and over " * 6
CONFIG = MiningConfig(pool=12, answers=4)


class Tempting(SingleTurn):
    """Prompts of which some tempt a model, which is said by their first word."""

    name = "tempting"

    def draw(self, rng, difficulty):
        word = rng.choice(["loop", "calm"])
        return [user(f"{word} {rng.randint(0, 10**9)}")], None

    def judge(self, task, message):
        return verdict(True, {}, "")


def screener(folder, tempted=1, counts=has_fault, answers=10**9):
    """Return a screener whose model loops in one of `tempted` answers to a tempting prompt, and dies after so many."""
    tokenizer = byte_tokenizer()
    asked = Counter()

    def answer(text):
        if asked.total() >= answers:
            raise KeyboardInterrupt
        asked[text] += 1
        loops = "loop" in text and asked[text] % tempted == 0
        return said(
            tokenizer,
            assistant(LOOP if loops else "so be it", "so" if "nothink" not in text else None),
        )

    player = Player(ScriptedGenerator(tokenizer, answer), tokenizer, SamplingSettings(200))
    path = folder / "mining.json"
    kinds: dict[str, Environment] = {"tempting": Tempting()}
    return Screener(player, kinds, 3, path, tqdm(disable=True), counts=counts)


@pytest.mark.parametrize("tempted", [1, 4])
def test_prompts_that_provoked_a_fault_are_kept(tmp_path, tempted):
    """Those with a fault in one of four answers too; all are different training prompts, half of them with thinking."""
    found = mine(screener(tmp_path, tempted), CONFIG, 0.5)
    assert len({problem.task.id for problem in found.asked}) == len(found.asked) == 12
    assert sum(problem.thinking for problem in found.asked) == 6
    kept = [problem.task.messages[0]["content"].split()[0] for problem in found.provoking]
    wanted = [p for p in found.asked if p.task.messages[0]["content"].startswith("loop")]
    assert kept == ["loop"] * len(wanted) and 0 < len(wanted) < 12
    assert found.asked[0].task in Tempting().tasks(50, 3, Split.TRAIN)
    # Broken twin: right answers counted in place of faults keep every prompt.
    broken = mine(screener(tmp_path / "twin", tempted, screening.is_right), CONFIG, 0.5)
    assert len(broken.provoking) == 12


def test_mining_that_was_stopped_goes_on(tmp_path):
    """What was counted is not asked again, and the outcome is that of one go."""
    whole = mine(screener(tmp_path / "whole"), CONFIG, 0.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(screening, "ANSWERS_AT_ONCE", 16)
        with pytest.raises(KeyboardInterrupt):
            mine(screener(tmp_path, answers=20), CONFIG, 0.5)
        assert mine(screener(tmp_path, answers=32), CONFIG, 0.5) == whole
    assert mine(screener(tmp_path, answers=0), CONFIG, 0.5) == whole


def schedule(chosen, share, names=("arithmetic", "arithmetic", "retail")):
    """Return a schedule of four prompts a step."""
    return TaskSchedule(ENVIRONMENTS, names, 4, 1, 0.5, chosen=chosen, chosen_share=share)


def test_chosen_prompts_have_their_share(tmp_path):
    """Three in four, each as often as the others, with its own switch; the environments take turns in the rest."""
    chosen = mine(screener(tmp_path), CONFIG, 0.5).provoking
    dealt = schedule(chosen, 0.75)
    steps = [dealt.draw(step) for step in range(12 * len(chosen))]
    names = Counter(task.environment for step in steps for task in step.tasks)
    turns = 4 * len(chosen)
    assert names == {"tempting": 9 * turns, "arithmetic": 2 * turns, "retail": turns}
    met = Counter(
        task.id for step in steps for task in step.tasks if task.environment == "tempting"
    )
    assert met == dict.fromkeys([problem.task.id for problem in chosen], 36)
    switches = {problem.task.id: problem.thinking for problem in chosen}
    for step in steps:
        for task, thinking in zip(step.tasks, step.thinking, strict=True):
            assert switches.get(task.id, thinking) == thinking
    assert dealt.draw(7) == steps[7], "a function of the step alone"
    assert steps[0].tasks != steps[1].tasks


def test_without_a_provoking_prompt_the_environments_deal_all():
    """An empty list changes nothing, whatever the share."""
    for step in range(5):
        assert schedule((), 0.75).draw(step) == schedule((), 0.0).draw(step)


def test_a_kind_is_an_environment_with_or_without_difficulties():
    """In the order in which they are named; a colon in the name of an environment is no difficulty."""
    kinds = ("search:short", "constraints:4,5x2", "gym:chain_sum?max_terms=3", "provocation")
    assert list(MiningConfig(kinds=kinds).difficulties("mining").items()) == [
        ("search:short", ()),
        ("constraints", (4, 5, 5)),
        ("gym:chain_sum?max_terms=3", ()),
        ("provocation", ()),
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("kinds", "provocation provocation:1"), r"mining\.kinds names provocation twice"),
        (
            ("kinds", "provocation:7"),
            r"mining\.kinds: provocation:7: provocation has the difficult",
        ),
        (("kinds", "pathologies"), r"mining\.kinds: pathologies: must be some of"),
        (("mined_share", "1.5"), r"mining\.mined_share = 1\.5"),
    ],
)
def test_a_kind_that_cannot_be_asked_is_one_line(words, message):
    """The field, what is wrong, and nothing is trained."""
    name, value = words
    option = f"--posttraining.pathology_rl.mining.{name}"
    with pytest.raises(ValueError, match=message):
        check_environments(load_config("configs/nano.py", [option, *value.split()]))


def test_a_curriculum_and_mining_exclude_each_other():
    """Both would deal the prompts."""
    words = ("--posttraining.pathology_rl.curriculum.pool", "8")
    with pytest.raises(ValueError, match="a curriculum deals all prompts itself"):
        load_config("configs/nano.py", words)
