"""Split conversations by user turn, with a mask of what the model is trained on (paper 2.3, 3.1).

The loss is on what the assistant produces, the role token that ends its turn included. The template drops the
reasoning of earlier turns when the user speaks again, so a conversation with several user turns becomes several
examples, one per user turn, each with the loss on the answers to its last user message: what the model sees in
training is what it will see when it is used, and no answer is a target without the reasoning that led to it. Mid-training
on solved tasks and fine-tuning use the same examples.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from minglm.chat import render
from minglm.data.tokenizer import Tokenizer

Conversation = tuple[list[dict], Sequence[dict], bool]
"""Messages, tools and thinking: the arguments of `minglm.chat.render`."""


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
