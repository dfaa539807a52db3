"""Learn to reward from preferences: a reward model after Bradley and Terry (paper 3.4, holistic RL).

    P(a is preferred to b) = sigmoid(r(a) - r(b))         loss = -log sigmoid(r(chosen) - r(rejected))
    value in [0, 1]        = sigmoid(scale * (r - offset))

r is a linear map of the base model's last state at the last token of the conversation. `calibrate` chooses
`scale` on pairs that training did not see, so that a predicted probability is a frequency there, and `offset`
as their mean score.

What a reward model has learnt beside quality is probed: how often it prefers the worse answer when that is
the longer one, and when a lively phrase stands before it. Half would be chance, and zero is right.

Simplified: one linear head, one pass over the pairs in batches of one length, AdamW for all weights. The
paper gives no size, loss or data of its reward model.
"""

import copy
import math
import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from minglm.chat import render
from minglm.chat.messages import Message
from minglm.data.tokenizer import Tokenizer
from minglm.model.glm import GLM

BATCH = 32
"""Pairs of an update."""
SCALES = [2.0**power for power in range(-4, 5)]
BINS = 5


class Pair(NamedTuple):
    """Two answers to one request, whole conversations as token ids."""

    chosen: Sequence[int]
    rejected: Sequence[int]
    lively: Sequence[int]
    """The rejected answer with a lively phrase before it; never trained on."""


class Quality(NamedTuple):
    """What a reward model is worth on pairs that it did not see."""

    accuracy: float
    """Share of the pairs whose chosen answer has the higher score."""
    longer_wrong: float
    """Share of pairs with a longer rejected answer that it gets wrong; NaN without such pairs."""
    shorter_wrong: float
    """The same with a shorter rejected answer."""
    lively_wrong: float
    """Share of all pairs that it gets wrong once the rejected answer is lively; without a bias for style 1 - accuracy."""
    calibration_error: float
    """Mean distance, over pairs, of the predicted probability and the frequency in its fifth of the pairs."""


def judged_tokens(tokenizer: Tokenizer, prompt: Sequence[Message], message: Message) -> list[int]:
    """Return a conversation as a reward model reads it: the answer without its reasoning, which people do not see."""
    visible = {"role": "assistant", "content": message["content"]}
    return render(tokenizer, [*prompt, visible], thinking=False).ids


class RewardModel(nn.Module):
    """A copy of a base model with a scalar in the place of its output head."""

    def __init__(self, base: GLM, pad: int) -> None:
        super().__init__()
        self.base = copy.deepcopy(base)
        self.head = nn.Linear(base.config.hidden_size, 1, bias=False, device=base.device)
        nn.init.zeros_(self.head.weight)
        self.pad = pad
        self.scale = 1.0
        self.offset = 0.0

    def forward(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """Return the score of each text, float32 (B,).

        A text longer than the model's positions loses its beginning.
        """
        longest = self.base.config.max_position_embeddings
        texts = [text[-longest:] for text in texts]
        width = max(map(len, texts))
        device = self.base.device
        tokens_BS = torch.full((len(texts), width), self.pad, device=device)
        documents_BS = torch.full((len(texts), width), -1, dtype=torch.int32, device=device)
        for row, text in enumerate(texts):
            tokens_BS[row, : len(text)] = torch.tensor(list(text), device=device)
            documents_BS[row, : len(text)] = 0
        hidden_BSD = self.base.hidden(tokens_BS, documents_BS=documents_BS).hidden_BSD
        last_B = torch.tensor([len(text) - 1 for text in texts], device=device)
        last_BD = hidden_BSD[torch.arange(len(texts), device=device), last_B]
        return self.head(last_BD.float()).squeeze(1)

    @torch.no_grad()
    def scores(self, texts: Sequence[Sequence[int]]) -> list[float]:
        """Return the raw score of each text."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        found = [0.0] * len(texts)
        for first in range(0, len(order), BATCH):
            places = order[first : first + BATCH]
            for place, score in zip(places, self([texts[i] for i in places]).tolist(), strict=True):
                found[place] = score
        return found

    def values(self, texts: Sequence[Sequence[int]]) -> list[float]:
        """Return the calibrated value of each text, 0 to 1."""
        return [_sigmoid(self.scale * (score - self.offset)) for score in self.scores(texts)]


def _sigmoid(x: float) -> float:
    """Return 1 / (1 + e^-x) without overflow."""
    return 0.5 * (1 + math.tanh(x / 2))


def train(model: RewardModel, pairs: Sequence[Pair], peak_lr: float, seed: int = 0) -> list[float]:
    """Train on preference pairs, once on each.

    Return the loss of each update, nats. The rate falls linearly to zero.
    """
    order = random.Random(seed).sample(range(len(pairs)), len(pairs))
    batches = [order[first : first + BATCH] for first in range(0, len(order), BATCH)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_lr, weight_decay=0.0)
    losses = []
    for number, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = peak_lr * (1 - number / len(batches))
        chosen_B = model([pairs[i].chosen for i in batch])
        rejected_B = model([pairs[i].rejected for i in batch])
        loss = -logsigmoid(chosen_B - rejected_B).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def calibrate(model: RewardModel, pairs: Sequence[Pair]) -> None:
    """Set scale and offset by pairs that training did not see: least loss of their preferences, mean of their scores."""
    chosen = model.scores([pair.chosen for pair in pairs])
    rejected = model.scores([pair.rejected for pair in pairs])
    margins_B = torch.tensor(chosen) - torch.tensor(rejected)
    losses = [float(-logsigmoid(scale * margins_B).mean()) for scale in SCALES]
    model.scale = SCALES[losses.index(min(losses))]
    model.offset = sum(chosen + rejected) / (2 * len(pairs))


def measure(model: RewardModel, pairs: Sequence[Pair]) -> Quality:
    """Return what a reward model is worth on pairs of its own, neither trained nor calibrated on."""
    chosen = model.scores([pair.chosen for pair in pairs])
    rejected = model.scores([pair.rejected for pair in pairs])
    lively = model.scores([pair.lively for pair in pairs])
    right = [float(a > b) for a, b in zip(chosen, rejected, strict=True)]
    fooled = [float(a <= b) for a, b in zip(chosen, lively, strict=True)]
    wrong: dict[int, list[float]] = {-1: [], 0: [], 1: []}
    for pair, ok in zip(pairs, right, strict=True):
        difference = len(pair.rejected) - len(pair.chosen)
        wrong[(difference > 0) - (difference < 0)].append(1 - ok)

    # Preferences with their confidence, the likelier side first.
    sure = sorted(
        (_sigmoid(model.scale * abs(a - b)), ok)
        for a, b, ok in zip(chosen, rejected, right, strict=True)
    )
    error = 0.0
    for number in range(BINS):
        bin_ = sure[number * len(sure) // BINS : (number + 1) * len(sure) // BINS]
        if bin_:
            error += abs(sum(p for p, _ in bin_) - sum(ok for _, ok in bin_)) / len(sure)
    return Quality(_mean(right), _mean(wrong[1]), _mean(wrong[-1]), _mean(fooled), error)


def _mean(values: Sequence[float]) -> float:
    """Return the mean, NaN without values."""
    return sum(values) / len(values) if values else math.nan
