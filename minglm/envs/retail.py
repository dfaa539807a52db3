"""Run a small shop with a rule-based customer, the agentic task of the toy (paper 3.2 agentic RL, 3.3.2 function calling).

    customer: I do not want order 482.      get_order(482) -> {"status": "pending"}
                                            cancel_order(482) -> {"ok": true}
    assistant: Order 482 is cancelled.

The policy: look an order up first; a pending one is cancelled, a delivered one returned, and a shipped one left alone
because it is on its way. Difficulty 1 names the order. In difficulty 2 the customer gives the number only when asked.
Difficulty 3 is about two orders. The reward is end to end, as in paper Figure 11: it looks at the final database and at
what the customer was told, not at the path.

    reward = 1  iff  database == goal, every order in question was looked up, no call broke the policy,
                     and the last message names the right outcome of each order

Choices: the look-up is part of the reward, so saying "on its way" without a call earns nothing. A cancel or return
that the policy forbids is refused by the shop and costs the reward, so trying both is no strategy. Schemas are as
short as JSON allows, because every prompt carries them.

Simplification: the customer is a program with one secret, the number, and asks for one thing.
"""

import json
import random
import re
from collections.abc import Iterable, Sequence
from typing import Any

from minglm.chat.messages import Message
from minglm.envs.base import Environment, Episode, Score, Task, assistant, user, verdict

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
OUTCOME_PATTERN = re.compile("|".join(OUTCOME.values()))


def tool(name: str, description: str) -> dict[str, Any]:
    """Return the schema of a function of one order."""
    parameters = {"properties": {"order_id": {"type": "integer"}}, "required": ["order_id"]}
    return {"name": name, "description": description, "parameters": parameters}


TOOLS = (
    tool("get_order", "status"),
    tool("cancel_order", "if pending"),
    tool("return_order", "if delivered"),
)


class Shop:
    """The database of the shop and its functions.

    orders: {number: status}, changed by the calls. looked_up: the orders that were looked up. violations: calls that
    the policy forbids.
    """

    def __init__(self, orders: dict[int, str]) -> None:
        self.orders = orders
        self.looked_up: set[int] = set()
        self.violations = 0

    def call(self, name: str, number: int) -> dict[str, Any]:
        """Run one function on the database; return its result."""
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


class Retail(Environment):
    """Cancel, return or leave alone; the difficulty is 1 (number given), 2 (ask for it) or 3 (two orders)."""

    name = "retail"
    group = "agentic"
    chance = 0.0
    max_turns = 8

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

    def episode(self, task: Task) -> "RetailEpisode":
        """Return a fresh episode of `task`, with a shop of its own."""
        return RetailEpisode(task, self.max_turns)

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


class RetailEpisode(Episode):
    """The shop and the customer."""

    def __init__(self, task: Task, max_turns: int) -> None:
        super().__init__(task, max_turns)
        self.shop = Shop(initial_orders(task))
        self.secret: str | None = task.label["secret"]
        self.reply = ""

    async def respond(self, message: Message) -> list[Message]:
        """Run the calls of a message, or let the customer answer a question."""
        calls = message.get("tool_calls") or ()
        if calls:
            results = [
                self.shop.call(call["name"], call["arguments"]["order_id"]) for call in calls
            ]
            return [{"role": "tool", "content": json.dumps(result)} for result in results]
        self.reply = message["content"]
        if self.secret and "?" in self.reply:
            number = self.secret
            self.secret = None  # told once only
            return [user(number)]
        return []

    async def grade(self) -> Score:
        """Return 1 if the database, the look-ups and the last message are right and no call broke the policy."""
        before = initial_orders(self.task)
        wanted = self.task.label["wanted"]
        goal = dict(before)
        for number in wanted:
            if before[number] in ACTION:
                goal[number] = AFTER[ACTION[before[number]]]
        right_state = self.shop.orders == goal
        looked_up = set(wanted) <= self.shop.looked_up
        outcomes = {str(number): OUTCOME[before[number]] for number in wanted}
        told = outcomes_told(self.reply, wanted) == outcomes
        violations = self.shop.violations
        parts = {"state": float(right_state), "told": float(told), "violations": violations}
        return verdict(self.done and right_state and looked_up and told and not violations, parts)


def initial_orders(task: Task) -> dict[int, str]:
    """Return the shop's database at the start of a task, {number: status}."""
    return {int(number): status for number, status in task.label["orders"].items()}


def outcomes_told(reply: str, wanted: Iterable[int]) -> dict[str, str | None]:
    """Return what a reply says about each order: {number as text: outcome}, None if missing or contradictory.

    The text from an order's number to the next number is about that order. Where it says nothing ("482 and 317 are
    cancelled") the next statement counts. A reply about one order is read as a whole and need not repeat its number.
    """
    reply = reply.lower().replace("canceled", "cancelled")
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
        outcomes = set(OUTCOME_PATTERN.findall(reply[start:end]))
        if outcomes:
            following = outcomes.pop() if len(outcomes) == 1 else None
        told[number] = following
    return told
