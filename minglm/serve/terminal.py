"""Chat with a run in the terminal: streaming, the thinking switch, and tools (no section in the paper; thinking is 3.1's).

The assistant is the last complete stage of the run. With `/tools` the conversation takes place in the toy
shop: the shop's functions are offered to the model, its calls run on a small database, and the results go
back to it.
"""

import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from minglm.chat.messages import AssistantMessage, Message
from minglm.chat.parser import Delta, DeltaKind
from minglm.chat.stream import StreamDecoder
from minglm.chat.template import render
from minglm.data.tokenizer import Tokenizer
from minglm.envs import ENVIRONMENTS
from minglm.envs.worlds.retail import Shop
from minglm.inference.engine import Engine
from minglm.inference.request import Request
from minglm.model.glm import GLM

HELP = """/think /nothink   answer with or without reasoning
/tools            offer the shop's functions, or take them away
/new              forget the conversation
/help  /quit"""
MAX_CALLS = 8
"""Most assistant turns with tool calls before the user is asked again."""
ORDERS_IN_THE_SHOP = 6
GREY = "\033[2m"
PLAIN = "\033[0m"


@dataclass(frozen=True)
class ChatSettings:
    """How the assistant answers."""

    temperature: float = 0.6
    top_p: float = 0.95
    max_new_tokens: int = 200
    """Of one assistant turn."""
    seed: int = 0
    """Decides every answer, and the orders in the shop."""
    thinking_budget: int | None = None
    """Most tokens of reasoning; None: no bound of its own."""
    draft_tokens: int = 0
    """Tokens that the MTP layer drafts for each pass of the model."""
    dialect: str = "glm-4.5"
    """Of the model's chat template."""


class Conversation:
    """The state of one chat: its messages, the switches, and the shop behind the tools.

    out: the file to print to, None for the screen.
    """

    def __init__(
        self,
        model: GLM,
        tokenizer: Tokenizer,
        settings: ChatSettings | None = None,
        out: TextIO | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.settings = settings or ChatSettings()
        self.engine = Engine(model, tokenizer, draft_tokens=self.settings.draft_tokens)
        self.out = out
        self.thinking = True
        self.tools = False
        self.reset()

    def reset(self) -> None:
        """Forget the messages, and open a new shop."""
        self.messages: list[Message] = []
        self.turns = 0  # assistant turns so far
        rng = random.Random(self.settings.seed)
        orders = {
            number: rng.choice(("pending", "shipped", "delivered"))
            for number in rng.sample(range(100, 1000), ORDERS_IN_THE_SHOP)
        }
        self.shop = Shop(orders)

    def command(self, line: str) -> bool:
        """Carry out a line that begins with a slash; return False to end the chat."""
        if line == "/quit":
            return False
        if line in ("/think", "/nothink"):
            self.thinking = line == "/think"
            self.say(f"thinking {'on' if self.thinking else 'off'}")
        elif line == "/tools":
            self.tools = not self.tools
            self.say(self._shop_opens() if self.tools else "tools off")
        elif line == "/new":
            self.reset()
            self.say("a new conversation")
        else:
            self.say(HELP)
        return True

    def _shop_opens(self) -> str:
        orders = ", ".join(f"{number} {status}" for number, status in self.shop.orders.items())
        first = next(iter(self.shop.orders))
        example = f"for instance: I do not want order {first}."
        return f"tools on; the shop has the orders {orders}; {example}"

    def say(self, text: str) -> None:
        """Print a line from the program, not from the model."""
        print(f"{GREY}{text}{PLAIN}", file=self.out, flush=True)

    def answer(self, text: str) -> None:
        """Send a user message and stream the answer, running the tools it calls; forget the turn if it is interrupted."""
        before = len(self.messages)
        try:
            self.messages.append({"role": "user", "content": text})
            self.respond(ENVIRONMENTS["retail"].tools() if self.tools else ())
        except BaseException:
            del self.messages[before:]
            raise

    def respond(self, tools: Sequence[dict[str, Any]]) -> None:
        """Stream assistant turns until one calls no tool."""
        for _ in range(MAX_CALLS):
            message = self.stream(tools)
            self.messages.append(message)
            if message["error"]:
                self.say(f"[{message['error']}]")
            if not message["tool_calls"] or message["error"]:
                return
            for call in message["tool_calls"]:
                result = self.shop.call(call["name"], call["arguments"])
                self.say(f"{call['name']}({call['arguments']}) -> {result}")
                self.messages.append({"role": "tool", "content": json.dumps(result)})
        self.say(f"[stopped after {MAX_CALLS} turns with calls]")

    def stream(self, tools: Sequence[dict[str, Any]]) -> AssistantMessage:
        """Print one assistant turn as it is sampled, reasoning in grey, then the content; return its message."""
        prompt = render(
            self.tokenizer,
            self.messages,
            tools or None,
            self.thinking,
            generation_prompt=True,
            dialect=self.settings.dialect,
        ).ids
        opened = prompt[-1] == self.tokenizer.special.get("<think>")
        decoder = StreamDecoder(self.tokenizer, tools, opened)
        printer = _Printer(self.out)
        self.turns += 1
        request = Request(
            prompt,
            max_new_tokens=self.settings.max_new_tokens,
            temperature=self.settings.temperature,
            top_p=self.settings.top_p,
            seed=self.settings.seed * 1000 + self.turns,
            thinking_budget=self.settings.thinking_budget,
        )
        self.engine.generate([request], lambda _, token: printer.show(decoder.feed(token)))
        printer.show(decoder.flush())
        print(file=self.out)
        return decoder.finish()


class _Printer:
    """Prints the text of one assistant turn."""

    def __init__(self, out: TextIO | None) -> None:
        self.out = out
        self.last: DeltaKind | None = None  # of the text printed last

    def show(self, deltas: Iterable[Delta]) -> None:
        """Print text as it comes; calls are shown with their results."""
        for delta in deltas:
            if delta.kind not in (DeltaKind.REASONING, DeltaKind.CONTENT):
                continue
            text = delta.text
            if delta.kind is DeltaKind.REASONING:
                text = f"{GREY}{text}{PLAIN}"
            elif self.last is DeltaKind.REASONING:
                text = f"\n{text}"  # the answer begins on a new line
            print(text, end="", file=self.out, flush=True)
            self.last = delta.kind


def chat(
    model: GLM,
    tokenizer: Tokenizer,
    settings: ChatSettings | None = None,
    read: Callable[[str], str] = input,
    out: TextIO | None = None,
) -> None:
    """Run the terminal chat until /quit or the end of input. read: a function that asks for one line."""
    conversation = Conversation(model, tokenizer, settings, out)
    hint = "A small model knows only what it was trained on, one conversation each:"
    conversation.say(f"{HELP}\n{hint}\n{_examples(conversation.settings.seed)}")
    while True:
        try:
            line = read("> ").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if not line:
            continue
        if line.startswith("/"):
            if not conversation.command(line):
                return
            continue
        try:
            conversation.answer(line)
        except KeyboardInterrupt:
            conversation.say("[stopped]")
        except ValueError as error:
            conversation.say(f"{error}; /new begins again")


def _examples(seed: int) -> str:
    """Return questions that a toy run can answer, one a line."""
    lines = []
    for name in ("arithmetic", "instructions"):
        for task in ENVIRONMENTS[name].distinct_tasks(2, seed):
            lines.append(f"    {task.messages[-1]['content']}")
    return "\n".join(lines)
