"""Bound the tokens of a thought: after so many, `</think>` is put in, not sampled (no section in the paper).

    the text is inside a thought, and its budget is spent   ->   the next token is `</think>`

Choices
- The budget is that of the whole answer: a second thought gets what the first one has left. The two tags cost nothing.
  Inside a thought that the prompt has opened, the tokens after `<think>` in the prompt count.
- The token that is put in is part of the answer: it counts in `max_new_tokens`, in penalties, and in what a client pays
  for. It is reported with the model's own log-probability, as every token is, and marked as forced: nothing was chosen
  there, so training must not learn from it.
- With a grammar the close waits until the grammar allows it, for at most the three bytes that complete a character.
  Allowed ids and the like are about what is sampled, and do not concern it.
- A token before the close is what it would have been without a budget, with and without drafts: drafts are accepted up
  to the place of the close, and none are made for it.
"""

from collections.abc import Mapping, Sequence

from minglm.inference.request import Request

OPEN_TAG = "<think>"
CLOSE_TAG = "</think>"


class ThoughtBudget:
    """Where an answer stands with its thinking budget.

    Raises ValueError for a tokenizer without the two tags.

    special: {name: id} of the tokenizer's special tokens.
    """

    def __init__(self, request: Request, special: Mapping[str, int]) -> None:
        assert request.thinking_budget is not None, "a request with a budget"
        for tag in (OPEN_TAG, CLOSE_TAG):
            if tag not in special:
                raise ValueError(f"thinking_budget needs a tokenizer with the special token {tag}")
        self.open_id = special[OPEN_TAG]
        self.close_id = special[CLOSE_TAG]
        self.left = request.thinking_budget
        """Tokens that thoughts may still have."""
        self.inside = False
        """Whether the text ends inside a thought."""
        for token in open_thought(request.prompt, self.open_id, self.close_id):
            self.take(token)

    @property
    def forced(self) -> int | None:
        """Return the id that has to come next; None where the model decides."""
        return self.close_id if self.inside and self.left <= 0 else None

    def take(self, token: int) -> None:
        """Take in the next token of the text."""
        if token == self.close_id:
            self.inside = False
        elif self.inside:
            self.left -= 1
        elif token == self.open_id:
            self.inside = True


def open_thought(prompt: Sequence[int], open_id: int, close_id: int) -> list[int]:
    """Return the end of a prompt from the tag that opens its last thought; nothing if that thought is closed."""
    for place in range(len(prompt) - 1, -1, -1):
        if prompt[place] == close_id:
            return []
        if prompt[place] == open_id:
            return list(prompt[place:])
    return []
