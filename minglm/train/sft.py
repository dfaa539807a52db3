"""Supervised fine-tuning: conversations to token ids with a loss mask (paper 3.1).

The loss is on what the assistant produces, the role token that ends its turn included. The template drops the
reasoning of earlier turns when the user speaks again, so a conversation with several user turns becomes several
examples, one per user turn, each with the loss on the answers to its last user message: what the model sees in
training is what it will see when it is used.
"""

import math

import numpy as np

from minglm.chat import render
from minglm.train.loop import Phase


def examples(tokenizer, messages, tools=(), thinking=True):
    """A conversation as a list of (tokens, mask) arrays, int64 and bool, one for each user turn that is answered."""
    found = []
    ends = [
        i
        for i in range(1, len(messages) + 1)
        if i == len(messages) or messages[i]["role"] == "user"
    ]
    for end in ends:
        if messages[end - 1]["role"] == "user":
            continue
        last_user = max((i for i in range(end) if messages[i]["role"] == "user"), default=-1)
        prompt = render(tokenizer, messages[: last_user + 1], tools, thinking)
        whole = render(tokenizer, messages[:end], tools, thinking)
        mask = np.array(whole.mask)
        mask[: len(prompt.ids)] = False
        if mask.any():  # not so for a system message on its own
            found.append((np.array(whole.ids), mask))
    return found


def phase(name, config, run, tokens):
    """The `Phase` of an SFT stage over `tokens` tokens: warm-up over 5%, then cosine to a tenth.

    config: SFTConfig. run: RunConfig, for what SFT shares with the later stages of pre-training: the MTP weight, the balance
    loss (the selection bias rests), micro-batch and clipping.
    """
    warm = 0.05 * tokens

    def learning_rate(seen):
        if seen < warm:
            return config.peak_lr * (seen + 1) / (warm + 1)
        return config.peak_lr * (
            0.1 + 0.45 * (1 + math.cos(math.pi * (seen - warm) / max(1, tokens - warm)))
        )

    return Phase(
        name,
        tokens,
        0,
        config.sequence_length,
        learning_rate,
        batch_tokens=lambda seen: config.batch_tokens,
        mtp_weight=lambda seen: run.balance.mtp_weight_late,
        bias_rate=lambda seen: 0.0,
        balance_weight=run.balance.sequence_loss_weight,
        microbatch_tokens=run.optimizer.microbatch_tokens,
        clip_norm=run.optimizer.clip_norm,
        spike_factor=run.optimizer.spike_factor,
        rollback_after=run.optimizer.rollback_after,
    )
