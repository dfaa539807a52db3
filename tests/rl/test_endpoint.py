"""Outside agents over HTTP: their episodes are those that `play` would have played, and none is lost."""

import contextlib
import itertools
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from helpers import shop_agent
from helpers.scripted import ScriptedGenerator, byte_tokenizer, oracle, said

from minglm.config import OutsideConfig
from minglm.envs import ENVIRONMENTS
from minglm.envs.base import Misconfigured, assistant
from minglm.rl.endpoint import Endpoint
from minglm.rl.episode import Player, SamplingSettings
from minglm.rl.rollout import rollout

TOKENIZER = byte_tokenizer()
RETAIL = ENVIRONMENTS["retail"]
LIMIT = 100_000
AGENT = Path(shop_agent.__file__)


def player(tasks, outside=None, thinking=True, script=None, **values):
    """Return a player whose model plays these tasks of the shop perfectly, or by a script."""
    known = {}
    for task in tasks:
        known |= oracle(TOKENIZER, RETAIL, [task], thinking).__self__
    generator = ScriptedGenerator(TOKENIZER, script or known.__getitem__, LIMIT)
    bounds = SamplingSettings(**{"max_new_tokens": 400, "max_turns": 8, **values})
    return Player(generator, TOKENIZER, bounds, outside=outside)


@contextlib.contextmanager
def endpoint(folder, **values):
    """Yield an endpoint; it is closed whatever happens."""
    made = Endpoint(OutsideConfig(**values), TOKENIZER, LIMIT, folder)
    try:
        yield made
    finally:
        made.close()


@contextlib.contextmanager
def rolling_out(tasks, made, thinking=True, **values):
    """Yield (http client, the list that the trajectories come into) while a rollout of these tasks waits for agents."""
    played, raised = [], []

    def run():
        try:
            switches = [thinking] * len(tasks)
            groups = rollout(
                player(tasks, made, thinking, **values), ENVIRONMENTS, tasks, 1, switches
            )
            played.extend(trajectory for (trajectory,) in groups)
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    with httpx.Client(base_url=made.url, timeout=60) as http:
        yield http, played
        thread.join(60)
    assert not thread.is_alive(), "the rollout still waits"
    if raised:
        raise raised[0]


def by_http(http):
    """Return how to ask without a client: plain posts."""

    def ask(session, body):
        found = http.post(f"{session['url']}/chat/completions", json=body)
        assert found.status_code == 200, found.text
        return found.json()["choices"][0]["message"]

    return ask


def what_was_trained(trajectory):
    """Return everything that the trainer reads of a trajectory, but the log-probabilities' numbering by call."""
    segments = [(s.tokens, s.mask, [p < 0 for p in s.logprobs]) for s in trajectory.segments]
    return (
        *(segments, trajectory.texts, trajectory.truncated, trajectory.switch_obeyed),
        *(trajectory.score.value, trajectory.score.status, trajectory.thinking, trajectory.task),
    )


def test_agents_of_other_processes_play_what_play_plays(tmp_path):
    """OpenAI's client and the Agents SDK, in turn: segments, masks, texts and rewards are those of `play`."""
    tasks = [RETAIL.task(n, 1, difficulties=(d,)) for d, n in itertools.product((1, 2, 3), (0, 1))]
    command = f"{sys.executable} {AGENT} client framework"
    alone = rollout(player(tasks), ENVIRONMENTS, tasks, 1)
    with endpoint(tmp_path, command=command) as made:
        outside = rollout(player(tasks, made), ENVIRONMENTS, tasks, 1)
    for ours, theirs in zip(itertools.chain(*alone), itertools.chain(*outside), strict=True):
        assert theirs.score.detail == "" and theirs.score.value == 1
        assert what_was_trained(ours) == what_was_trained(theirs)


@pytest.mark.parametrize("thinking", [True, False])
def test_a_loop_of_plain_requests_without_thinking_too(tmp_path, thinking):
    """The switch of the sample decides the prompts, and the parts of the agent's score are kept."""
    tasks = RETAIL.tasks(2, 5)
    (ours,), (other,) = rollout(
        player(tasks, thinking=thinking), ENVIRONMENTS, tasks, 1, [thinking] * 2
    )
    with endpoint(tmp_path, port=0) as made, rolling_out(tasks, made, thinking) as (http, played):
        agent = threading.Thread(
            target=shop_agent.main,
            args=(made.url, [lambda session: shop_agent.client(session, by_http(http))]),
            daemon=True,
        )
        agent.start()
    found = {t.task.id: t for t in played}
    for expected in (ours, other):
        trajectory = found[expected.task.id]
        assert [s.tokens for s in trajectory.segments][-1] == expected.segments[-1].tokens
        assert trajectory.score == expected.score and trajectory.texts == expected.texts
        assert trajectory.length == expected.length


def claimed(http):
    """Return the next session."""
    found = http.post("/sessions")
    assert found.status_code == 200
    return found.json()


def rewarded(http, session, **body):
    """Post what ends a session; return the answer."""
    return http.post(f"/sessions/{session['id']}/reward", json=body)


REFUSED = {
    "temperature": 0.3,
    "top_p": 0.5,
    "seed": 1,
    "n": 2,
    "stop": ["."],
    "logit_bias": {"1": 1},
    "response_format": {"type": "json_object"},
    "enable_thinking": False,
    "max_tokens": 0,
    "tool_choice": "required",
    "parallel_tool_calls": False,
    "unheard_of": 1,
}


def test_what_the_trainer_decides_is_refused_and_nothing_is_lost(tmp_path):
    """Each field by its name; after every refusal the same session goes on, and a stream is as good as a whole answer."""
    task = RETAIL.task(0, 3, difficulties=(1,))
    with endpoint(tmp_path, port=0) as made, rolling_out([task], made) as (http, played):
        session = claimed(http)
        url = session["url"] + "/chat/completions"
        body = {
            "model": "policy",
            "messages": session["task"]["messages"],
            "tools": shop_agent.OPENAI_TOOLS,
        }
        for field, value in REFUSED.items():
            found = http.post(url, json=body | {field: value})
            message = found.json()["error"]["message"]
            assert found.status_code == 400 and field in message, (field, message)
        for wrong, status in (
            ({}, 400),
            ({"reward": "much"}, 400),
            ({"reward": True}, 400),
            ({"reward": 1e9}, 400),
        ):
            assert rewarded(http, session, **wrong).status_code == status
        assert rewarded(http, session, reward=1, parts={"x": "y"}).status_code == 400
        assert rewarded(http, session, reward=1, parts={"x": 10**400}).status_code == 400
        assert rewarded(http, session, reward=10**400).status_code == 400
        assert http.post("/nowhere", json={}).status_code == 404
        assert rewarded(http, {"id": "other"}, reward=1).status_code == 404
        assert http.post("/sessions", headers={"origin": "http://elsewhere"}).status_code == 403
        same = {"temperature": 1.0, "top_p": 1, "user": "me", "stream": True}
        streamed = http.post(url, json=body | same).text
        assert "get_order" in streamed and streamed.endswith("data: [DONE]\n\n")
        assert rewarded(http, session, reward=0.25, parts={"tips": 3}).json()["status"] == "wrong"
        assert rewarded(http, session, reward=1).status_code == 404, "a reward counts once"
    (trajectory,) = played
    assert (trajectory.score.value, trajectory.score.parts) == (0.25, {"tips": 3})
    assert len(trajectory.texts) == 1 and trajectory.length > 0


def test_agents_that_fall_silent(tmp_path):
    """Before the model was asked, the task goes to the next agent; afterwards the sample leaves the statistics, whole."""
    task = RETAIL.task(0, 3, difficulties=(1,))
    with (
        pytest.warns(UserWarning, match="silent"),
        endpoint(tmp_path, port=0, idle_seconds=2.0) as made,
        rolling_out([task], made) as (http, played),
    ):
        first, second = claimed(http), claimed(http)
        assert first["id"] != second["id"] and first["task"] == second["task"]
        assert rewarded(http, first, reward=1).status_code == 404, "it is another agent's now"
        body = {
            "model": "policy",
            "messages": second["task"]["messages"],
            "tools": shop_agent.OPENAI_TOOLS,
        }
        http.post(second["url"] + "/chat/completions", json=body)
    (trajectory,) = played
    assert (trajectory.score.status, trajectory.valid) == ("infrastructure", False)
    assert "silent for 2 s after 1 calls" in trajectory.score.detail and trajectory.length > 0


def test_an_endpoint_that_stood_still_takes_no_session_away(tmp_path, monkeypatch):
    """Ctrl-Z stops it for longer than an agent may be silent: the agent goes on, and its reward counts."""
    task = RETAIL.task(0, 3, difficulties=(1,))
    stops = []
    stopped = SimpleNamespace(monotonic=lambda: time.monotonic() + sum(stops))
    monkeypatch.setattr("minglm.rl.endpoint.time", stopped)
    with endpoint(tmp_path, port=0) as made, rolling_out([task], made) as (http, played):
        session = claimed(http)
        body = {
            "model": "policy",
            "messages": session["task"]["messages"],
            "tools": shop_agent.OPENAI_TOOLS,
        }
        http.post(session["url"] + "/chat/completions", json=body)
        stops.append(3600.0)
        time.sleep(1)
        assert rewarded(http, session, reward=1).status_code == 200
    assert [trajectory.score.value for trajectory in played] == [1.0]


def test_results_in_any_order_make_one_trajectory(tmp_path):
    """Two calls whose results come the wrong way round: the model reads them, and trains on them, in the order of its calls."""
    (task,) = RETAIL.tasks(1, 1)
    both = assistant("", "both", [("get_order", {"order_id": number}) for number in (1, 2)])

    def script(prompt):
        return said(TOKENIZER, assistant("done", "so") if "result" in prompt else both)

    trained = []
    for order in ((0, 1), (1, 0)):
        with (
            endpoint(tmp_path, port=0) as made,
            rolling_out([task], made, script=script) as (http, played),
        ):
            session = claimed(http)
            messages = session["task"]["messages"]
            body = {"model": "policy", "tools": shop_agent.OPENAI_TOOLS}
            message = by_http(http)(session, body | {"messages": messages})
            results = [
                {"role": "tool", "tool_call_id": call["id"], "content": f"result {number}"}
                for number, call in enumerate(message["tool_calls"])
            ]
            told = [*messages, message, *[results[number] for number in order]]
            by_http(http)(session, body | {"messages": told})
            rewarded(http, session, reward=1)
        trained.append(what_was_trained(played[0]))
    assert trained[0] == trained[1] and len(trained[0][0]) == 1
    assert "result 0" in TOKENIZER.decode(trained[0][0][0][0])


def test_an_agent_that_fails_says_so(tmp_path):
    """Its own exception is a failure of the infrastructure."""
    with (
        pytest.warns(UserWarning, match="no disk"),
        endpoint(tmp_path, port=0) as made,
        rolling_out(RETAIL.tasks(1, 1), made) as (http, played),
    ):
        rewarded(http, claimed(http), error="no disk\nat all")
    assert played[0].score.detail.endswith("no disk at all")


def test_a_broken_generator_ends_the_rollout(tmp_path):
    """As in `play`: only an answer of its own that fails is a sample's alone. (The script knows no other prompt.)"""
    with (
        pytest.raises(KeyError),
        endpoint(tmp_path, port=0) as made,
        rolling_out(RETAIL.tasks(1, 1), made) as (http, _),
    ):
        session = claimed(http)
        body = {"model": "policy", "messages": [{"role": "user", "content": "who are you?"}]}
        assert http.post(session["url"] + "/chat/completions", json=body).status_code == 500


def test_mistakes_of_the_config(tmp_path):
    """A port in use, a command that is not there, and one that never plays: one line each, and the rollout ends."""
    with endpoint(tmp_path) as made:
        port = made.listening.getsockname()[1]
        with pytest.raises(ValueError, match=f"cannot listen on 127.0.0.1:{port}"):
            Endpoint(OutsideConfig(port=port), TOKENIZER, LIMIT, tmp_path)
    with pytest.raises(ValueError, match=r"outside\.command = 'no-such-agent': .*No such file"):
        Endpoint(OutsideConfig(command="no-such-agent"), TOKENIZER, LIMIT, tmp_path)
    command = "sh -c 'echo no licence; exit 3'"
    with (
        endpoint(tmp_path, command=command) as made,
        pytest.raises(Misconfigured, match=r"ends with status 3 .*: no licence$"),
        rolling_out(RETAIL.tasks(1, 1), made),
    ):
        pass
