"""Specify the tool sets of this package: an airline for evaluation, and three small ones for step-wise calls (paper 3.4).

`airline` is end to end and never trained on: what reinforcement learning on other tools teaches must show
there (paper 3.3). The others provide steps and distractors to `minglm.envs.functions`. Each is written as a
file of one's own would be (`minglm.envs.worlds.specification`).

Choices: descriptions are as short as a policy allows, because every prompt carries them. No two sets share a
word for what was done.
"""

from collections.abc import Mapping
from typing import Any

from minglm.envs.worlds.specification import specification


def schema(key: str, **others: str) -> dict[str, Any]:
    """Return the input schema of a tool: the number of a record, and other arguments by their JSON types."""
    types = {key: "integer", **others}
    return {
        "type": "object",
        "properties": {name: {"type": kind} for name, kind in types.items()},
        "required": list(types),
    }


def tool(name: str, description: str, inputs: Mapping[str, Any], **rule: Any) -> dict[str, Any]:
    """Return a tool with its rule, as in a file."""
    return {"name": name, "description": description, "inputSchema": dict(inputs), **rule}


def action(
    name: str,
    description: str,
    inputs: Mapping[str, Any],
    requires: Mapping[str, Any],
    sets: Mapping[str, Any],
    done: str,
) -> dict[str, Any]:
    """Return a tool that changes a record."""
    return tool(name, description, inputs, requires=dict(requires), sets=dict(sets), done=done)


BOOKING = schema("booking_id")
SEATS = ["12A", "14C", "15D"]
AIRLINE = specification(
    {
        "name": "airline",
        "noun": "booking",
        "key": "booking_id",
        "fields": {
            "fare": ["flex", "basic"],
            "status": ["booked", "flown"],
            "free": [SEATS[:2], SEATS[1:], [SEATS[0], SEATS[2]], SEATS[:1]],
            "seat": ["20F"],
            "day": ["Monday"],
        },
        "arguments": {"seat": SEATS, "day": ["Tuesday", "Thursday", "Sunday"]},
        "tools": [
            tool("get_booking", "look up", BOOKING, shows=["fare", "status", "free"]),
            action(
                "change_seat",
                "if free",
                schema("booking_id", seat="string"),
                {"free": "$seat"},
                {"seat": "$seat"},
                "moved",
            ),
            action(
                "change_flight",
                "if flex",
                schema("booking_id", day="string"),
                {"fare": ["flex"]},
                {"day": "$day"},
                "changed",
            ),
            action(
                "cancel_booking",
                "if booked",
                BOOKING,
                {"status": ["booked"]},
                {"status": "cancelled"},
                "cancelled",
            ),
            action(
                "refund_booking",
                "if flex and cancelled",
                BOOKING,
                {"fare": ["flex"], "status": ["cancelled"]},
                {"status": "refunded"},
                "refunded",
            ),
        ],
        "requests": [
            {
                "steps": ["cancel_booking"],
                "texts": ["Cancel {record}.", "I cannot fly, please drop {record}."],
            },
            {
                "steps": ["change_seat"],
                "texts": ["Move {record} to {seat}.", "I want {seat} on {record}."],
            },
            {
                "steps": ["change_flight"],
                "texts": ["Move {record} to {day}.", "I want to fly on {day}: {record}."],
            },
            {
                "steps": ["cancel_booking", "refund_booking"],
                "texts": ["Cancel {record} and pay me back.", "I want my money back for {record}."],
            },
        ],
    }
)

BOOK = schema("book_id")
LIBRARY = specification(
    {
        "name": "library",
        "noun": "book",
        "key": "book_id",
        "fields": {"state": ["in", "out", "lost"], "day": ["none"]},
        "arguments": {"day": ["Monday", "Friday", "Saturday"]},
        "tools": [
            tool("get_book", "look up", BOOK, shows=["state"]),
            action("lend_book", "if in", BOOK, {"state": ["in"]}, {"state": "out"}, "lent"),
            action(
                "renew_book",
                "if out",
                schema("book_id", day="string"),
                {"state": ["out"]},
                {"day": "$day"},
                "renewed",
            ),
            action(
                "bill_book", "if lost", BOOK, {"state": ["lost"]}, {"state": "billed"}, "billed"
            ),
        ],
        "requests": [
            {"steps": ["lend_book"], "texts": ["Lend me {record}.", "I want to read {record}."]},
            {
                "steps": ["renew_book"],
                "texts": ["Renew {record} until {day}.", "I want to keep {record} until {day}."],
            },
            {"steps": ["bill_book"], "texts": ["I want to pay for {record}."]},
        ],
    }
)

ACCOUNT = schema("account_id")
BANK = specification(
    {
        "name": "bank",
        "noun": "account",
        "key": "account_id",
        "fields": {"state": ["open", "frozen"], "card": ["none", "active"]},
        "tools": [
            tool("get_account", "look up", ACCOUNT, shows=["state", "card"]),
            action(
                "close_account",
                "if open",
                ACCOUNT,
                {"state": ["open"]},
                {"state": "shut"},
                "closed",
            ),
            action(
                "thaw_account",
                "if frozen",
                ACCOUNT,
                {"state": ["frozen"]},
                {"state": "open"},
                "thawed",
            ),
            action(
                "block_card",
                "if active",
                ACCOUNT,
                {"card": ["active"]},
                {"card": "none"},
                "blocked",
            ),
        ],
        "requests": [
            {
                "steps": ["close_account"],
                "texts": ["Close {record}.", "I am leaving: end {record}."],
            },
            {"steps": ["thaw_account"], "texts": ["Open {record} again.", "Thaw {record}."]},
            {"steps": ["block_card"], "texts": ["I lost the card of {record}."]},
            {
                "steps": ["block_card", "close_account"],
                "texts": ["Block the card of {record}, then close it."],
            },
        ],
    }
)

LAMP = schema("lamp_id")
HOME = specification(
    {
        "name": "home",
        "noun": "lamp",
        "key": "lamp_id",
        "fields": {"power": ["on", "off"], "works": [True, False], "level": [100]},
        "arguments": {"level": [20, 40, 60]},
        "tools": [
            tool("get_lamp", "look up", LAMP, shows=["power", "works"]),
            action(
                "dim_lamp",
                "if on",
                schema("lamp_id", level="integer"),
                {"power": ["on"]},
                {"level": "$level"},
                "dimmed",
            ),
            action("light_lamp", "if off", LAMP, {"power": ["off"]}, {"power": "on"}, "lit"),
            action(
                "repair_lamp", "if broken", LAMP, {"works": [False]}, {"works": True}, "repaired"
            ),
        ],
        "requests": [
            {
                "steps": ["dim_lamp"],
                "texts": ["Dim {record} to {level}.", "Set {record} to {level}."],
            },
            {"steps": ["light_lamp"], "texts": ["It is dark near {record}.", "Light {record}."]},
            {"steps": ["repair_lamp"], "texts": ["Please look after {record}.", "Mend {record}."]},
            {"steps": ["repair_lamp", "light_lamp"], "texts": ["Mend {record} and light it."]},
        ],
    }
)

TRAINED = (LIBRARY, BANK, HOME)
"""The sets whose steps may be trained on."""
