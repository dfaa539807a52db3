"""Talking to a run in the terminal: streaming, the thinking switch, and tools with their calls and results shown.

The assistant is the last complete stage of the run. With `/tools` the conversation takes place in the toy shop: the
shop's functions are offered to the model, its calls are run on a small database, and the results go back to it.
No counterpart in the paper; the thinking switch is that of section 3.1.
"""

import json
import random

from minglm.chat import Parser, render
from minglm.envs import ENVIRONMENTS
from minglm.inference.engine import Engine, Request

HELP = """/think /nothink   answer with or without reasoning
/tools            offer the shop's functions, or take them away
/new              forget the conversation
/help  /quit"""
MAX_CALLS = 8
GREY, PLAIN = "\033[2m", "\033[0m"


class Conversation:
    """The state of one chat: messages, switches, and the shop behind the tools.

    dialect: of the model's chat template. out: a file, None for the screen.
    """

    def __init__(
        self,
        model,
        tokenizer,
        temperature=0.6,
        top_p=0.95,
        max_new_tokens=200,
        seed=0,
        dialect="glm-4.5",
        out=None,
    ):
        self.engine, self.tokenizer, self.out = Engine(model, tokenizer), tokenizer, out
        self.settings = {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_p": top_p,
        }
        self.thinking, self.tools, self.seed, self.dialect = True, False, seed, dialect
        self.reset()

    def reset(self):
        """Forget the messages and open a fresh shop."""
        self.messages, self.turn = [], 0
        rng = random.Random(self.seed)
        self.shop = ENVIRONMENTS["retail"].episode(ENVIRONMENTS["retail"].task(0, self.seed))
        self.shop.orders = {
            n: rng.choice(("pending", "shipped", "delivered"))
            for n in rng.sample(range(100, 1000), 6)
        }

    def command(self, line):
        """Carry out a line that begins with a slash; False ends the chat."""
        if line == "/quit":
            return False
        if line in ("/think", "/nothink"):
            self.thinking = line == "/think"
            self.say(f"thinking {'on' if self.thinking else 'off'}")
        elif line == "/tools":
            self.tools = not self.tools
            orders = ", ".join(f"{number} {status}" for number, status in self.shop.orders.items())
            example = f"for instance: I do not want order {next(iter(self.shop.orders))}."
            self.say(
                f"tools on; the shop has the orders {orders}; {example}"
                if self.tools
                else "tools off"
            )
        elif line == "/new":
            self.reset()
            self.say("a new conversation")
        else:
            self.say(HELP)
        return True

    def say(self, text):
        """A line from the program, not from the model."""
        print(f"{GREY}{text}{PLAIN}", file=self.out, flush=True)

    def answer(self, text):
        """Send a user message and stream the answer, running the tools it calls; what breaks off is forgotten."""
        before = len(self.messages)
        try:
            self.messages.append({"role": "user", "content": text})
            self.respond(ENVIRONMENTS["retail"].tools() if self.tools else ())
        except BaseException:
            del self.messages[before:]
            raise

    def respond(self, tools):
        """Assistant turns until one calls no tool."""
        for _ in range(MAX_CALLS):
            message = self.stream(tools)
            self.messages.append(message)
            if message["error"]:
                self.say(f"[{message['error']}]")
            if not message["tool_calls"] or message["error"]:
                return
            for call in message["tool_calls"]:
                result = self.shop.call(call["name"], call["arguments"].get("order_id"))
                self.say(f"{call['name']}({call['arguments']}) -> {result}")
                self.messages.append({"role": "tool", "content": json.dumps(result)})
        self.say(f"[stopped after {MAX_CALLS} turns with calls]")

    def stream(self, tools):
        """One assistant turn, printed as it is drawn: reasoning in grey, then the content. Returns the message."""
        prompt = render(
            self.tokenizer,
            self.messages,
            tools or None,
            self.thinking,
            generation_prompt=True,
            dialect=self.dialect,
        ).ids
        opened = prompt[-1] == self.tokenizer.special.get("<think>")
        parser, pending, stops, shown = Parser(tools, opened), [], set(self.tokenizer.stop_ids), []

        def show(events):
            for kind, value in events:
                if kind in ("reasoning", "content"):
                    line = "\n" if kind == "content" and shown[-1:] == ["reasoning"] else ""
                    shade = (GREY, PLAIN) if kind == "reasoning" else ("", "")
                    print(f"{line}{shade[0]}{value}{shade[1]}", end="", file=self.out, flush=True)
                    shown.append(kind)

        def on_token(_, token):
            pending.append(token)
            text = self.tokenizer.decode(pending)
            if token not in stops and not text.endswith(
                "\ufffd"
            ):  # wait for the rest of a character
                show(parser.feed(text))
                pending.clear()

        self.turn += 1
        request = Request(prompt, seed=self.seed * 1000 + self.turn, **self.settings)
        self.engine.generate([request], on_token)
        show(parser.finish())
        print(file=self.out)
        return parser.close()


def chat(model, tokenizer, read=input, **options):
    """Run the terminal chat until /quit or the end of input. read: a function that asks for one line."""
    conversation = Conversation(model, tokenizer, **options)
    known = [
        ENVIRONMENTS[name].test_tasks(2, conversation.seed)
        for name in ("arithmetic", "instructions")
    ]
    examples = "\n".join(f"    {task.messages[-1]['content']}" for tasks in known for task in tasks)
    conversation.say(
        f"{HELP}\nA small model knows what it was trained on, each in a conversation of its own:\n{examples}"
    )
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
