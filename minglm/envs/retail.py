"""A small shop with a rule-based customer: the agentic task of the toy (paper 3.2 agentic RL, 3.3.2 function calling).

    customer: I do not want order 482.      get_order(482) -> {"status": "pending"}
                                            cancel_order(482) -> {"ok": true}
    assistant: Order 482 is cancelled.

The policy: look an order up first; a pending one is cancelled, a delivered one returned, and a shipped one left alone
because it is on its way. Tier 1 names the order. In tier 2 the customer gives the number only when asked. Tier 3 is
about two orders. End to end as in paper Figure 11: the reward looks at the final database and at what the customer was
told, not at the path.

    reward = 1  iff  database == goal, every order in question was looked up, no call broke the policy,
                     and the last message names the right outcome of each order

Choices: the look-up is part of the reward, so saying "on its way" without a call earns nothing. A cancel or return
that the policy forbids is refused by the shop and costs the reward, so trying both is no strategy. Schemas are as
short as JSON allows, because every prompt carries them.

Simplification: the customer is a program with one secret, the number, and asks for one thing.
"""

import json
import re

from minglm.envs.base import Environment, Episode, assistant, user, verdict

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


def tool(name, description):
    """The schema of a function of one order."""
    parameters = {"properties": {"order_id": {"type": "integer"}}, "required": ["order_id"]}
    return {"name": name, "description": description, "parameters": parameters}


TOOLS = (
    tool("get_order", "status"),
    tool("cancel_order", "if pending"),
    tool("return_order", "if delivered"),
)


class Retail(Environment):
    """Cancel, return or leave alone; the tier is 1 (number given), 2 (ask for it) or 3 (two orders)."""

    name = "retail"
    group = "agentic"
    chance = 0.0
    max_turns = 8

    def tools(self):
        return TOOLS

    def draw(self, rng, tier):
        numbers = rng.sample(range(100, 1000), 4)
        orders = {str(number): rng.choice(list(OUTCOME)) for number in numbers}
        wanted = numbers[: 2 if tier == 3 else 1]
        if tier == 1:
            subject = f"order {wanted[0]}"
        else:
            subject = "my order" if tier == 2 else f"orders {wanted[0]} and {wanted[1]}"
        request = rng.choice(REQUESTS).format(subject)
        secret = rng.choice(NUMBERS).format(wanted[0]) if tier == 2 else None
        return [user(request)], {"orders": orders, "wanted": wanted, "secret": secret}

    def episode(self, task):
        return RetailEpisode(task, self.max_turns)

    def oracle(self, task, conversation, rng):
        """Read the conversation, as the model must, and do what the policy says next."""
        numbers = [
            int(n)
            for m in conversation
            if m["role"] == "user"
            for n in re.findall(r"\d{3}", m["content"])
        ]
        if not numbers:
            return assistant("Which order?", "no number, ask")
        calls = [
            (c["name"], c["arguments"]["order_id"])
            for m in conversation
            for c in m.get("tool_calls", ())
        ]
        results = [json.loads(m["content"]) for m in conversation if m["role"] == "tool"]
        seen = dict(zip(calls, results))
        outcomes = []
        for number in numbers:
            if ("get_order", number) not in seen:
                return assistant("", f"look up {number}", [("get_order", {"order_id": number})])
            status = seen["get_order", number]["status"]
            action = ACTION.get(status)
            if action and (action, number) not in seen:
                verb = action.removesuffix("_order")
                return assistant(
                    "", f"{status} so {verb} {number}", [(action, {"order_id": number})]
                )
            outcomes.append(f"Order {number} is {OUTCOME[status]}.")
        return assistant(" ".join(outcomes), "done")

    def hack_probes(self, task):
        wanted = task.label["wanted"]
        all_outcomes = " ".join(
            f"Order {n} is {outcome}." for n in wanted for outcome in OUTCOME.values()
        )
        truth = " ".join(f"Order {n} is {OUTCOME[task.label['orders'][str(n)]]}." for n in wanted)
        everything = [(name, {"order_id": n}) for n in wanted for name in ("get_order", *AFTER)]
        return super().hack_probes(task) + [
            assistant(all_outcomes),
            assistant(truth),  # a lucky guess without a look-up
            assistant(truth, None, everything),
        ]


class RetailEpisode(Episode):
    """The shop's database and the customer."""

    def __init__(self, task, max_turns):
        super().__init__(task, max_turns)
        self.orders = {int(number): status for number, status in task.label["orders"].items()}
        self.secret = task.label["secret"]
        self.looked_up = set()
        self.violations = 0
        self.reply = ""

    def respond(self, message):
        calls = message.get("tool_calls") or ()
        if calls:
            results = [self.call(call["name"], call["arguments"]["order_id"]) for call in calls]
            return [{"role": "tool", "content": json.dumps(result)} for result in results]
        self.reply = message["content"]
        if self.secret and "?" in self.reply:
            number, self.secret = self.secret, None
            return [user(number)]
        return []

    def call(self, name, number):
        """Run one function on the database; its result as a dict."""
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

    def grade(self):
        before = {int(number): status for number, status in self.task.label["orders"].items()}
        wanted = self.task.label["wanted"]
        changed = {n: AFTER[ACTION[before[n]]] for n in wanted if before[n] in ACTION}
        goal = before | changed
        told = outcomes_told(self.reply, wanted) == {str(n): OUTCOME[before[n]] for n in wanted}
        state, looked = self.orders == goal, set(wanted) <= self.looked_up
        parts = {"state": float(state), "told": float(told), "violations": self.violations}
        return verdict(self.done and state and looked and told and not self.violations, parts)


def outcomes_told(reply, wanted):
    """What a reply says about each order: {number as text: outcome}, None where it is missing or contradictory.

    The text from an order's number to the next number is about that order; where it says nothing ("482 and 317 are
    cancelled") the next statement counts. A reply about one order is read whole, and need not repeat its number.
    """
    reply, wanted = (
        reply.lower().replace("canceled", "cancelled"),
        [str(number) for number in wanted],
    )
    places = [(match.start(), match.group()) for match in re.finditer(r"[0-9]+", reply)]
    if len(wanted) == 1 and {number for _, number in places} <= {wanted[0]}:
        places = [(0, wanted[0])]
    if sorted(number for _, number in places) != sorted(wanted):
        return dict.fromkeys(wanted)
    told, following = {}, None
    ends = [start for start, _ in places[1:]] + [len(reply)]
    for (start, number), end in reversed(list(zip(places, ends))):
        said = set(OUTCOME_PATTERN.findall(reply[start:end]))
        if said:
            following = said.pop() if len(said) == 1 else None
        told[number] = following
    return told
