"""Turn conversations into token ids with a loss mask, for supervised fine-tuning (paper 3.1).

The loss is on what the assistant produces, the role token that ends its turn included. The template drops the
reasoning of earlier turns when the user speaks again, so a conversation with several user turns becomes several
examples, one per user turn, each with the loss on the answers to its last user message: what the model sees in
training is what it will see when it is used.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from minglm.chat import render
from minglm.config import RunConfig, SFTConfig
from minglm.data.tokenizer import Tokenizer
from minglm.train.loop import Phase

WARMUP_SHARE = 0.05  # of the tokens


class Example(NamedTuple):
    """A conversation to train on, up to the answers to one user message."""

    tokens_S: np.ndarray
    """int64 token ids."""
    mask_S: np.ndarray
    """bool: True where the loss is computed."""


def examples(
    tokenizer: Tokenizer,
    messages: Sequence[dict[str, Any]],
    tools: Sequence[dict[str, Any]] = (),
    thinking: bool = True,
) -> list[Example]:
    """Convert a conversation to examples, one for each user turn that is answered."""
    # An example ends before the next user message, or with the conversation.
    next_users = [i for i in range(1, len(messages)) if messages[i]["role"] == "user"]
    result = []
    for end in [*next_users, len(messages)]:
        if not end or messages[end - 1]["role"] == "user":
            continue  # nobody answered
        users = [i for i in range(end) if messages[i]["role"] == "user"]
        last_user = users[-1] if users else -1
        prompt = render(tokenizer, messages[: last_user + 1], tools, thinking)
        whole = render(tokenizer, messages[:end], tools, thinking)
        mask_S = np.array(whole.mask)
        mask_S[: len(prompt.ids)] = False
        if mask_S.any():  # a system message alone has nothing to train on
            result.append(Example(np.array(whole.ids), mask_S))
    return result


def phase(name: str, config: SFTConfig, run: RunConfig, tokens: int) -> Phase:
    """Return the `Phase` of an SFT stage over `tokens` tokens: warm-up over 5%, then cosine to a tenth of the peak.

    run: for what SFT shares with the later stages of pre-training: the weights of the MTP and balance losses,
    micro-batches, clipping and the guard. The selection bias does not move.
    """
    warmup_tokens = WARMUP_SHARE * tokens

    def learning_rate(tokens_seen: int) -> float:
        if tokens_seen < warmup_tokens:
            return config.peak_lr * (tokens_seen + 1) / (warmup_tokens + 1)
        angle = math.pi * (tokens_seen - warmup_tokens) / max(1, tokens - warmup_tokens)
        return config.peak_lr * (0.1 + 0.45 * (1 + math.cos(angle)))  # 1 at angle 0, 0.1 at pi

    return Phase(
        name=name,
        tokens=tokens,
        start=0,
        sequence_length=config.sequence_length,
        learning_rate=learning_rate,
        batch_tokens=lambda tokens_seen: config.batch_tokens,
        mtp_weight=lambda tokens_seen: run.balance.mtp_weight_late,
        bias_rate=lambda tokens_seen: 0.0,
        balance_weight=run.balance.sequence_loss_weight,
        optimizer=run.optimizer,
    )
