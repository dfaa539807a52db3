"""Let a language model play the user of a task with tools, by the rules of the paper's Figure 11.

    simulator = Simulator(generator, tokenizer)          any `Generator`: the engine of another run, a released model
    environment.with_user(simulator)                     its tasks, with that user

The model reads the rules and what its user knows as a system prompt, and the assistant's words as prompts.

Choices
- The rules are in our words: the text of Figure 11 is not copied.
- A turn is checked: an empty one, one that was cut off or malformed, and one with a number that neither the task nor the
  assistant has named are failures of the user, not of the assistant (`UserFailed`): the sample leaves the statistics.

Simplified: nothing checks whether the user keeps the other rules, for example whether it tells everything at once.
"""

import re
from dataclasses import dataclass

from minglm.chat import render
from minglm.chat.messages import Message
from minglm.chat.stream import decode_turn
from minglm.data.tokenizer import Tokenizer
from minglm.envs.base import assistant, user
from minglm.envs.worlds.users import STOP, UserFailed
from minglm.inference.client import Generator
from minglm.inference.request import FinishReason, Request

RULES = f"""You play a user who talks to an assistant. The assistant has tools; you have none.
{{knowledge}}
Rules:
- Write one line, as a user would, and nothing around it.
- Say only what the current step needs. Do not tell everything at once.
- If you are asked for what is not written above, say that you don't remember. Never invent a fact.
- If something is refused, offer your alternative, if one is written above.
- Never ask for more than is written above.
- When your request is settled, or cannot be, write only {STOP}"""
"""The prompt of a language model that plays the user."""
GREETING = "Hello, what can I do for you?"


@dataclass(frozen=True)
class Simulator:
    """A language model that plays users."""

    generator: Generator
    tokenizer: Tokenizer
    max_new_tokens: int = 100
    """Bound on the tokens of one turn of the user."""
    temperature: float = 0.0
    """0: an episode with the same assistant repeats."""

    def user(self, knowledge: str, request: str) -> "ModelUser":
        """Return the user of one episode, whose first message was `request`."""
        return ModelUser(self, knowledge, request)


class ModelUser:
    """A user that a language model plays.

    Its own turns are the model's, and the assistant's are its prompts.
    """

    def __init__(self, simulator: Simulator, knowledge: str, request: str) -> None:
        """Begin after the user's first message, `request`. knowledge: what the user wants and knows, in sentences."""
        self.simulator = simulator
        self.knowledge = knowledge
        rules = RULES.format(knowledge=knowledge)
        self.messages: list[Message] = [
            {"role": "system", "content": rules},
            user(GREETING),
            assistant(request),
        ]

    async def answer(self, said: str) -> str:
        """Return the model's next line. Raises UserFailed for a turn that no user could say."""
        self.messages.append(user(said))
        tokenizer = self.simulator.tokenizer
        prompt = render(tokenizer, self.messages, thinking=False, generation_prompt=True).ids
        completion = await self.simulator.generator.generate(
            Request(prompt, self.simulator.max_new_tokens, self.simulator.temperature)
        )
        message = decode_turn(tokenizer, completion.tokens)
        line = message["content"].strip()
        if completion.finish_reason != FinishReason.STOP:
            raise UserFailed("was cut off before the end of its turn")
        if message["error"] or message["tool_calls"] or not line:
            raise UserFailed(f"said nothing that can be read: {message['error'] or 'no text'}")
        known = set(re.findall(r"\d+", " ".join(m["content"] for m in self.messages)))
        invented = [number for number in re.findall(r"\d+", line) if number not in known]
        if invented:
            raise UserFailed(f"invented {', '.join(invented)}")
        self.messages.append(assistant(line))
        return line
