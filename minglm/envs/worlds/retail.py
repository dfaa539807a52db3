"""Run a small shop with a rule-based customer, an agentic task of the toy (paper 3.3 agentic RL, 3.4 function calling).

    customer: I do not want order 482.      get_order(482) -> {"status": "pending"}
                                            cancel_order(482) -> {"ok": true}
    assistant: Order 482 is cancelled.

The policy: look an order up first; a pending one is cancelled, a delivered one returned, and a shipped one
left alone because it is on its way. Difficulty 1 names the order. In difficulty 2 the customer gives the
number only when asked. Difficulty 3 is about two orders. The reward is end to end, as in paper Figure 11: it
looks at the final database and at what the customer was told, not at the path.

    reward = 1  iff  database == goal, every order in question was looked up, no call broke the policy,
                     and the last message names the right outcome of each order

Choices: the look-up is part of the reward, so saying "on its way" without a call earns nothing. A cancel or
return that the policy forbids is refused by the shop and costs the reward, so trying both is no strategy.
Schemas are as short as JSON allows, because every prompt carries them.

Simplification: the customer has one secret, the number, asks for one thing, and is less patient than the
users of other worlds (`minglm.envs.worlds.users`): a second question ends the talk.
"""

import json
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from minglm.chat.messages import Message
from minglm.envs.base import Task, assistant, tool, user
from minglm.envs.worlds.base import WorldEnvironment, statements
from minglm.envs.worlds.users import STOP

REQUESTS = (
    "I do not want {}.",
    "Please undo {}.",
    "I changed my mind about {}.",
    "I no longer need {}.",
    "Get rid of {}, please.",
    "I want my money back for {}.",
    "Can you take back {}?",
    "Help me give back {}.",
    "It was wrong to buy {}.",
    "Stop {} or take back what came.",
)
NUMBERS = ("{}.", "Order {}.", "It is {}.", "The number is {}.")

ACTION = {"pending": "cancel_order", "delivered": "return_order"}
AFTER = {"cancel_order": "cancelled", "return_order": "returned"}
OUTCOME = {"pending": "cancelled", "delivered": "returned", "shipped": "on its way"}


TOOLS = (
    tool("get_order", "status", order_id="integer"),
    tool("cancel_order", "if pending", order_id="integer"),
    tool("return_order", "if delivered", order_id="integer"),
)


class Shop:
    """The database of the shop and its functions.

    orders: {number: status}, changed by the calls. looked_up: the orders that were looked up. violations:
    calls that the policy forbids.
    """

    def __init__(self, orders: dict[int, str]) -> None:
        self.orders = orders
        self.looked_up: set[int] = set()
        self.violations = 0

    def call(self, name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Run one function on the database; return its result."""
        number = arguments["order_id"]
        status = self.orders.get(number)
        if status is None:
            return {"error": "no such order"}
        if name == "get_order":
            self.looked_up.add(number)
            return {"status": status}
        if number not in self.looked_up:
            self.violations += 1
            return {"error": "look it up first"}
        if ACTION.get(status) != name:
            self.violations += 1
            return {"error": f"order is {status}"}
        self.orders[number] = AFTER[name]
        return {"ok": True}


class Customer:
    """The shop's customer: says one thing when asked, once, and ends the talk otherwise."""

    def __init__(self, secret: str | None) -> None:
        self.secret = secret

    async def answer(self, said: str) -> str:
        """Return the number in answer to the first question, STOP to everything else."""
        if self.secret is None or "?" not in said:
            return STOP
        number = self.secret
        self.secret = None
        return number


class Retail(WorldEnvironment):
    """Cancel, return or leave alone; the difficulty is 1 (number given), 2 (ask for it) or 3 (two orders)."""

    name = "retail"

    def tools(self) -> tuple[dict[str, Any], ...]:
        """Return the schemas of the shop's functions."""
        return TOOLS

    def draw(self, rng: random.Random, difficulty: int) -> tuple[list[Message], dict[str, Any]]:
        """Return one random request as (messages, label).

        Label: {"orders": {number as text: status}, "wanted": [numbers], "secret": what the customer says when asked}.
        """
        numbers = rng.sample(range(100, 1000), 4)
        orders = {str(number): rng.choice(list(OUTCOME)) for number in numbers}
        wanted = numbers[: 2 if difficulty == 3 else 1]
        if difficulty == 1:
            subject = f"order {wanted[0]}"
        elif difficulty == 2:
            subject = "my order"
        else:
            subject = f"orders {wanted[0]} and {wanted[1]}"
        request = rng.choice(REQUESTS).format(subject)
        secret = rng.choice(NUMBERS).format(wanted[0]) if difficulty == 2 else None
        return [user(request)], {"orders": orders, "wanted": wanted, "secret": secret}

    def world(self, task: Task) -> Shop:
        """Return the shop with the task's orders."""
        return Shop(initial_orders(task))

    def program_user(self, task: Task) -> Customer:
        """Return the customer, who knows what the label keeps secret."""
        return Customer(task.label["secret"])

    def knowledge(self, task: Task) -> str:
        """Return what the customer wants and knows."""
        numbers = " and ".join(map(str, task.label["wanted"]))
        return f"You no longer want what you bought: {numbers} is the number of the order."

    def completed(self, task: Task, world: Shop) -> bool:
        """Return whether every order in question was looked up, and each is as the policy wants it."""
        before = initial_orders(task)
        wanted = task.label["wanted"]
        goal = dict(before)
        for number in wanted:
            if before[number] in ACTION:
                goal[number] = AFTER[ACTION[before[number]]]
        return world.orders == goal and set(wanted) <= world.looked_up

    def told(self, task: Task, reply: str) -> bool:
        """Return whether a reply names the right outcome of each order."""
        before = initial_orders(task)
        wanted = task.label["wanted"]
        outcomes = {str(number): OUTCOME[before[number]] for number in wanted}
        return outcomes_told(reply, wanted) == outcomes

    def oracle(self, task: Task, conversation: Sequence[Message], rng: random.Random) -> Message:
        """Read the conversation, as the model must, and return what the policy says next."""
        numbers = []
        calls = []
        results = []
        for message in conversation:
            if message["role"] == "user":
                numbers += [int(digits) for digits in re.findall(r"\d{3}", message["content"])]
            elif message["role"] == "tool":
                results.append(json.loads(message["content"]))
            for call in message.get("tool_calls", ()):
                calls.append((call["name"], call["arguments"]["order_id"]))
        if not numbers:
            return assistant("Which order?", "no number, ask")

        result_of = dict(zip(calls, results, strict=False))
        outcomes = []
        for number in numbers:
            if ("get_order", number) not in result_of:
                return assistant("", f"look up {number}", [("get_order", {"order_id": number})])
            status = result_of["get_order", number]["status"]
            action = ACTION.get(status)
            if action and (action, number) not in result_of:
                thought = f"{status} so {action.removesuffix('_order')} {number}"
                return assistant("", thought, [(action, {"order_id": number})])
            outcomes.append(f"Order {number} is {OUTCOME[status]}.")
        return assistant(" ".join(outcomes), "done")

    def hack_probes(self, task: Task) -> list[Message]:
        """Return every outcome at once, a lucky guess without a look-up, and every call at once."""
        wanted = task.label["wanted"]
        all_outcomes = []
        truth = []
        calls = []
        for number in wanted:
            all_outcomes += [f"Order {number} is {outcome}." for outcome in OUTCOME.values()]
            truth.append(f"Order {number} is {OUTCOME[task.label['orders'][str(number)]]}.")
            calls += [(name, {"order_id": number}) for name in ("get_order", *AFTER)]
        return super().hack_probes(task) + [
            assistant(" ".join(all_outcomes)),
            assistant(" ".join(truth)),
            assistant(" ".join(truth), None, calls),
        ]


def initial_orders(task: Task) -> dict[int, str]:
    """Return the shop's database at the start of a task, {number: status}."""
    return {int(number): status for number, status in task.label["orders"].items()}


def outcomes_told(reply: str, wanted: Iterable[int]) -> dict[str, str | None]:
    """Return what a reply says about each order: {number as text: outcome}, None if missing, denied or contradictory.

    The text from an order's number to the next number is about that order. Where it says nothing ("482 and
    317 are cancelled") the next statement counts. A reply about one order is read as a whole and need not
    repeat its number.
    """
    reply = reply.lower().replace("canceled", "cancelled")
    named = statements(reply, OUTCOME.values())
    names = [str(number) for number in wanted]
    mentions = [(match.start(), match.group()) for match in re.finditer(r"[0-9]+", reply)]
    if len(names) == 1 and {number for _, number in mentions} <= {names[0]}:
        mentions = [(0, names[0])]
    if sorted(number for _, number in mentions) != sorted(names):
        return dict.fromkeys(names)

    told: dict[str, str | None] = {}
    following = None
    ends = [start for start, _ in mentions[1:]] + [len(reply)]
    # From the last mention to the first, so that a mention without a statement takes the one after it.
    for (start, number), end in reversed(list(zip(mentions, ends, strict=True))):
        here = [statement for statement in named if start <= statement.place < end]
        if here:
            outcomes = {statement.word for statement in here if statement.done}
            following = outcomes.pop() if len(outcomes) == 1 else None
        told[number] = following
    return told
