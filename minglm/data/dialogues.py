"""Split conversations by user turn, with a mask of what the model is trained on (paper 2.3, 3.1).

The template drops the reasoning of earlier turns when the user speaks again, so a conversation with several
user turns becomes several examples, one per user turn. What the model sees in training is then what it will
see when it is used, and no answer is a target without the reasoning that led to it:

    tokens     earlier turns, without their reasoning  |  last user message  |  answers to it
    targets    fine-tuning    nothing                  |  nothing            |  what the assistant produces
               mid-training   nothing                  |  every token        |  every token

Fine-tuning trains what the assistant produces, the role token that ends its turn included. Mid-training is
language modelling, on solved tasks too: every token of a conversation is a target once, in the example of its
own turn.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from minglm.chat import render
from minglm.chat.messages import Message, Tool
from minglm.data.tokenizer import Tokenizer

Conversation = tuple[list[Message], Sequence[Tool], bool]
"""Messages, tools and thinking: the arguments of `minglm.chat.render`."""


class Example(NamedTuple):
    """A conversation to train on, up to the answers to one user message."""

    tokens_S: np.ndarray
    """int64 token ids."""
    mask_S: np.ndarray
    """bool: True where the loss is computed."""


def examples(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    tools: Sequence[Tool] = (),
    thinking: bool = True,
    *,
    language_modelling: bool = False,
) -> list[Example]:
    """Convert a conversation to examples, one for each user turn that is answered.

    language_modelling: every token of the turn is a target, as in mid-training; otherwise what the assistant produces.
    """
    # An example ends before the next user message, or with the conversation.
    next_users = [i for i in range(1, len(messages)) if messages[i]["role"] == "user"]
    result = []
    begin = 0  # of the turn, in messages
    for end in [*next_users, len(messages)]:
        roles = [message["role"] for message in messages[begin:end]]
        if "assistant" not in roles:
            continue  # nobody answered
        question = end - roles[::-1].index("user") if "user" in roles else begin
        prompt = render(tokenizer, messages[:question], tools, thinking)
        whole = render(tokenizer, messages[:end], tools, thinking)
        if language_modelling:
            mask_S = np.ones(len(whole.ids), dtype=bool)
            if begin:  # what came before was a target in the examples of its turns
                mask_S[: _start(tokenizer, prompt.ids, roles.count("user"))] = False
        else:
            mask_S = np.array(whole.mask)
            mask_S[: len(prompt.ids)] = False
        result.append(Example(np.array(whole.ids), mask_S))
        begin = end
    return result


def _start(tokenizer: Tokenizer, prompt_ids: Sequence[int], questions: int) -> int:
    """Return the position after the role token of the first of the last `questions` user messages of a prompt."""
    user = tokenizer.special["<|user|>"]
    return np.flatnonzero(np.array(prompt_ids) == user)[-questions].item() + 1
