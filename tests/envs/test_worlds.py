"""Worlds: the shop deals what it always dealt, users keep their rules, files are refused in one line, rewards are strict."""

import copy
import hashlib
import json

import pytest
from helpers.incurious import Incurious
from helpers.scripted import ScriptedGenerator, byte_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from minglm.envs import ENVIRONMENTS
from minglm.envs.base import assistant, run_without_waiting
from minglm.envs.worlds.model_user import Simulator
from minglm.envs.worlds.sets import AIRLINE, TRAINED
from minglm.envs.worlds.specification import read_world, specification
from minglm.envs.worlds.tables import TableEnvironment
from minglm.envs.worlds.users import STOP, UNKNOWN, Fact, ProgramUser
from minglm.testing.envs import check_environment, check_lazy_answers, play
from minglm.testing.strategies import seeds

AIR = ENVIRONMENTS["airline"]
assert isinstance(AIR, TableEnvironment)
WORLDS = [AIR, *map(TableEnvironment, TRAINED)]


def test_the_shop_deals_the_tasks_it_always_dealt():
    """Runs that learned from the shop can be continued: tasks, schemas and demonstrations are those of the first day."""
    env = ENVIRONMENTS["retail"]
    digest = hashlib.sha256()
    for split in ("train", "development", "test"):
        for task in env.tasks(20, 7, split):
            parts = [task.id, list(task.messages), list(task.tools), task.label, task.difficulty]
            digest.update(json.dumps([*parts, env.demonstrate(task, seed=3)]).encode())
    assert digest.hexdigest()[:16] == "7213b5c2e4012860"


class IncuriousTableEnvironment(Incurious, TableEnvironment):
    """The right words are enough where nothing had to change."""


def test_the_contract_refuses_a_world_that_pays_for_guesses():
    """The right words without a look-up are found by the contract."""
    with pytest.raises(AssertionError, match="earns"):
        check_lazy_answers(IncuriousTableEnvironment(AIRLINE))


def courses(env, task):
    """Return the assistant's messages of the oracle."""
    return [m for m in env.demonstrate(task)[1:] if m["role"] == "assistant"]


@given(st.sampled_from(WORLDS), seeds, st.data())
def test_a_forbidden_call_costs_the_reward(env, seed, data):
    """One call more than the policy allows, anywhere before the last words: refused by the world, and worth nothing."""
    task = env.task(0, seed, difficulties=(data.draw(st.sampled_from(env.difficulties)),))
    turns = courses(env, task)
    spec = env.specification
    rule = data.draw(st.sampled_from([rule for rule in spec.rules.values() if not rule.shows]))
    arguments = {name: spec.arguments[name][0] for name in spec.arguments_of(rule)}
    arguments[spec.key] = int(task.label["number"])
    extra = assistant("", None, [(rule.name, arguments)])
    at = data.draw(st.integers(0, len(turns) - 1))
    score = play(env, task, [*turns[:at], extra, *turns[at:]]).score
    record = task.label["records"][task.label["number"]]
    blind = not any(turn.get("tool_calls") for turn in turns[:at])
    if blind or not any(
        rule.allows(state, arguments)
        for state in (record, env.solved(task.label)[0][task.label["number"]])
    ):
        assert score.value == 0


@given(st.sampled_from(WORLDS), seeds, st.booleans())
def test_a_lie_about_the_outcome_earns_nothing(env, seed, other_record):
    """Everything done, and the last words turned round or about another record."""
    task = env.task(0, seed)
    *turns, last = courses(env, task)
    text = last["content"]
    if other_record:
        lie = text.replace(task.label["number"], "1000")
    else:
        lie = text.replace(" not ", " ") if " not " in text else text.replace(" is ", " is not ")
    assert play(env, task, [*turns, last]).score.value == 1
    assert play(env, task, [*turns, assistant(lie)]).score.value == 0


BOOKING = Fact(("booking",), ("482",))
SEAT = Fact(("seat",), ("14C", "15A"))


def talk(user, *said):
    """Return what a user answers to these words, one after the other."""
    return [run_without_waiting(user.answer(words)) for words in said]


@pytest.mark.parametrize(
    ("said", "answers"),
    [
        (["Which booking?"], ["482."]),
        (["Which booking and which seat?"], ["482."]),  # one thing at a time
        (["Which booking?", "Which seat?"], ["482.", "14C."]),
        (["Which booking?", "The booking, again?"], ["482.", "482."]),
        (["What is your phone number?"], [UNKNOWN]),
        (["Which seat?", "14C is taken."], ["14C.", "Then 15A, please."]),
        (["Which seat?", "That seat is taken. Which other seat?"], ["14C.", "Then 15A, please."]),
        (["Which seat?", "It is taken.", "It is taken."], ["14C.", "Then 15A, please.", STOP]),
        (["The seat is taken."], [STOP]),  # nothing was asked for yet
        (["Booking 482 is moved."], [STOP]),
        (["It is moved. Is there anything else?"], [STOP]),  # never extends the task
        ([""], [STOP]),
    ],
)
def test_the_program_keeps_the_rules_of_a_user(said, answers):
    """It says what is asked, one thing at a time, offers an alternative, remembers nothing else, and stops."""
    assert talk(ProgramUser([BOOKING, SEAT]), *said) == answers


@given(
    st.lists(st.sampled_from(["Which booking?", "Which seat?", "Taken.", "Why?", "x"]), max_size=8)
)
def test_a_user_says_nothing_that_the_task_does_not_hold(said):
    """Whatever it is asked, its words are its facts, that it forgot, or the end."""
    allowed = {"482.", "14C.", "15A.", "Then 15A, please.", UNKNOWN, STOP}
    assert set(talk(ProgramUser([BOOKING, SEAT]), *said)) <= allowed


def simulated(line, env=AIR):
    """Return the airline with a language model as its user, which always writes this, and the model."""
    generator = ScriptedGenerator(byte_tokenizer(), lambda prompt: line)
    return env.with_user(Simulator(generator, byte_tokenizer()).user), generator


def test_a_model_plays_the_user():
    """Its prompt has the rules and all that the user knows; its line is the next user turn; its STOP ends the talk."""
    task = AIR.task(3, 0, difficulties=(2,))
    env, generator = simulated(f"{task.label['number']} it is.<|user|>")
    played = play(env, task, [assistant("Which booking?")])
    assert played.replies == [[{"role": "user", "content": f"{task.label['number']} it is."}]]
    prompt = byte_tokenizer().decode(generator.asked[0].prompt)
    assert STOP in prompt and f"the booking is {task.label['number']}" in prompt
    assert prompt.index("Which booking?") > prompt.index(task.messages[-1]["content"])
    env, _ = simulated(f"{STOP}<|user|>")
    turns = courses(AIR, AIR.task(1, 0, difficulties=(1,)))
    assert play(env, AIR.task(1, 0, difficulties=(1,)), turns).score.value == 1


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("<|user|>", "said nothing"),
        ("well", "cut off"),
        ("my booking is 987654.<|user|>", "invented 987654"),
        ("<tool_call>get_booking\n</tool_call><|observation|>", "said nothing"),
    ],
)
def test_a_user_that_fails_leaves_the_statistics(line, fault):
    """Nonsense of a simulated user is the infrastructure's failure: the episode raises, and a rollout goes on."""
    env, _ = simulated(line)
    with pytest.raises(RuntimeError, match=fault):
        play(env, AIR.task(0, 0), [assistant("Which booking?")])


@pytest.mark.filterwarnings("ignore:airline")
def test_a_user_that_never_stops_is_bounded():
    """Told everything and talking on: nobody's fault but the user's. Not told: the assistant is wrong."""
    env, _ = simulated("Go on.<|user|>")
    task = AIR.task(1, 0, difficulties=(1,))
    turns = courses(AIR, task)
    played = play(env, task, turns + turns[-1:] * AIR.max_turns)
    assert played.done and played.score.status == "infrastructure"
    assert "did not stop within 8 turns" in played.score.detail
    assert play(env, task, [assistant("Hm.")] * AIR.max_turns).score.status == "wrong"


FILE = {
    "name": "garage",
    "noun": "car",
    "key": "car_id",
    "fields": {"state": ["broken", "fine"], "slots": [["Monday"], []], "day": ["none"]},
    "arguments": {"day": ["Monday", "Friday"]},
    "tools": [
        {
            "name": "get_car",
            "description": "look up",
            "inputSchema": {"properties": {"car_id": {"type": "integer"}}, "required": ["car_id"]},
            "shows": ["state", "slots"],
        },
        {
            "name": "book_repair",
            "description": "if broken and the day is free",
            "inputSchema": {
                "properties": {"car_id": {"type": "integer"}, "day": {"type": "string"}},
                "required": ["car_id", "day"],
            },
            "requires": {"state": ["broken"], "slots": "$day"},
            "sets": {"day": "$day"},
            "done": "booked",
        },
    ],
    "requests": [{"steps": ["book_repair"], "texts": ["Repair {record} on {day}."]}],
}


def test_a_world_of_ones_own_is_a_file(tmp_path):
    """The name of its environment is `world:PATH`, its oracle earns everything, and it holds the contract."""
    path = tmp_path / "garage.json"
    path.write_text(json.dumps(FILE), encoding="utf-8")
    env = ENVIRONMENTS[f"world:{path}"]
    assert env.task(0, 0).environment == env.name == f"world:{path}"
    assert env.difficulties == (1, 2)
    check_environment(env)


def broken(*path, value=None):
    """Return the file with one value changed, or taken away."""
    values = copy.deepcopy(FILE)
    place = values
    for step in path[:-1]:
        place = place[step]
    if value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return values


@pytest.mark.parametrize(
    ("values", "mistake"),
    [
        ([], "the file: must be an object"),
        (broken("noun"), "noun: is missing"),
        (broken("noun", value=3), "noun = 3: must be a text"),
        (broken("colour", value="red"), "colour: is not supported"),
        (broken("fields", "state", value=[]), "fields.state: must be a list"),
        (broken("arguments"), "arguments.day: is missing"),
        (broken("tools", 0, "shows"), "tools[0]: must have shows, or sets and done"),
        (broken("tools", 0, value=FILE["tools"][1]), "two of them have the same name"),
        (broken("tools", 0, "shows", value=["state"]), "requires slots, which the look-up hides"),
        (broken("tools", 0, "shows", value=[["state"]]), "is not among the fields"),
        (broken("tools", 1, "requires", "wheels", value=[4]), "wheels is not among the fields"),
        (broken("tools", 1, "requires", "state", value="broken"), "requires.state: must be a list"),
        (broken("tools", 1, "sets", "day", value="$hour"), "refers to $hour"),
        (broken("tools", 1, "inputSchema", "required", value=["day"]), "must require each"),
        (broken("tools", 1, "inputSchema", "properties", value=3), "inputSchema"),
        (broken("requests", value=[]), "requests: at least one"),
        (broken("requests", 0, "steps", value=["get_car"]), "no tool that changes a record"),
        (broken("requests", 0, "texts", value=["Repair {car}."]), "must name {day}, {record}"),
    ],
)
def test_a_file_that_does_not_parse_is_one_line(values, mistake):
    """What is wrong and where, in one line, before anything is played."""
    with pytest.raises(ValueError) as raised:
        specification(values)
    assert mistake in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("arguments", "day"), ["{}"]),  # no word begins or ends there
        (("tools", 1, "done"), "..."),
        (("noun",), "unbooked, booked car"),
        (("noun",), "car 1234"),
    ],
)
def test_a_world_in_which_nobody_is_paid_is_refused(tmp_path, path, value):
    """It parses, but its words cannot be told apart in what is said: the oracle is tried before the world is used."""
    file = tmp_path / "world.json"
    file.write_text(json.dumps(broken(*path, value=value)), encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"^world .*world.json: who follows the policy earns nothing for .*$"
    ):
        ENVIRONMENTS[f"world:{file}"]


@pytest.mark.parametrize("text", ["{", "\udcff", "[" * 10_000])
def test_a_file_that_is_no_json_is_one_line(tmp_path, text):
    """So is a file that is missing, or holds no text."""
    path = tmp_path / "world.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"world .*world.json: (is not JSON|cannot be read)"):
        read_world(str(path))
    with pytest.raises(ValueError, match="cannot be read"):
        read_world(str(tmp_path / "nothing.json"))
