"""The reward model learns a preference, is calibrated on other pairs, and its biases show."""

import dataclasses
import random

import pytest
import torch

from minglm import lesson
from minglm.envs import ENVIRONMENTS
from minglm.envs.base import assistant
from minglm.model.glm import GLM
from minglm.recipe.preferences import preference_pairs
from minglm.rewards.reward_model import Pair, RewardModel, calibrate, judged_tokens, measure, train

MODEL = dataclasses.replace(lesson.REASONER, max_position_embeddings=64, hidden_size=32)


def pairs_by(better, count, seed):
    """Return pairs of random texts in which one has token `better` at its end, and is otherwise like the other."""
    rng = random.Random(seed)
    pairs = []
    for _ in range(count):
        text = [rng.randrange(40, 90) for _ in range(rng.randint(3, 9))]
        pairs.append(Pair([*text, better], [*text, 100], [101, *text, 100]))
    return pairs


@pytest.fixture(scope="module")
def trained():
    """Return a reward model that was trained to prefer one token."""
    torch.manual_seed(0)
    model = RewardModel(GLM(MODEL, 0), lesson.BYTES.pad)
    losses = train(model, pairs_by(99, 512, 0), 3e-3)
    calibrate(model, pairs_by(99, 64, 1))
    return model, losses


def test_it_learns_a_preference(trained):
    """The loss begins at log 2, because an untrained head prefers nothing, and pairs that it did not see are ordered right."""
    model, losses = trained
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)
    quality = measure(model, pairs_by(99, 100, 2))
    assert quality.accuracy > 0.95 and quality.calibration_error < 0.1
    values = model.values([pair.chosen for pair in pairs_by(99, 20, 3)])
    assert all(0.5 < value <= 1 for value in values)


def test_padding_changes_no_score(trained):
    """A text has the score that it has alone, whatever shares its batch (float32, sums in another order)."""
    model, _ = trained
    texts = [[50, 60, 99], [50] * 20, [70, 100]]
    together = model.scores(texts)
    alone = [model.scores([text])[0] for text in texts]
    assert together == pytest.approx(alone, abs=1e-4)


def test_a_bias_for_length_shows(trained):
    """The broken twin: preferences that are nothing but length are wrong exactly where the worse answer is longer."""
    model, _ = trained
    long_wins = RewardModel(model.base, model.pad)
    long_wins.scores = lambda texts: [float(len(text)) for text in texts]
    pairs = [Pair([50] * 3, [50] * 9, [50] * 10), Pair([50] * 9, [50] * 3, [50] * 4)]
    quality = measure(long_wins, pairs)
    assert (quality.longer_wrong, quality.shorter_wrong, quality.accuracy) == (1, 0, 0.5)


def test_a_bias_for_style_shows(trained):
    """The broken twin: a model that pays for the lively phrase alone is fooled by every pair; the trained one by few."""
    model, _ = trained
    pairs = pairs_by(99, 100, 4)
    assert measure(model, pairs).lively_wrong < 0.1
    style_wins = RewardModel(model.base, model.pad)
    style_wins.scores = lambda texts: [float(text[0] == 101) for text in texts]
    assert measure(style_wins, pairs).lively_wrong == 1


def test_a_reward_model_does_not_read_thoughts():
    """Two answers that differ in their reasoning alone are one text to it."""
    task = ENVIRONMENTS["constraints"].task(0, 0)
    texts = [
        judged_tokens(lesson.BYTES, task.messages, assistant("two", thought))
        for thought in (None, "1 two", "I am sure!")
    ]
    assert texts[0] == texts[1] == texts[2]


def test_pairs_are_a_right_answer_and_a_worse_one():
    """Environments that know a worse answer give pairs; a conversation of several turns gives none."""
    judged = [ENVIRONMENTS[name] for name in ("constraints", "instructions", "arithmetic")]
    pairs = preference_pairs(lesson.BYTES, judged, 12, 0)
    assert len(pairs) >= 9 and all(pair.chosen != pair.rejected for pair in pairs)
    assert all(len(pair.lively) > len(pair.rejected) for pair in pairs)
    assert not preference_pairs(lesson.BYTES, [ENVIRONMENTS["retail"]], 3, 0)
