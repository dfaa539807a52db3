"""The buffer: whatever workers do, every group is counted once, no token is too old, and nothing slow is dropped."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from rl.test_trainer import Letters

from minglm.chat.parser import Tag
from minglm.envs.base import Score
from minglm.rl.buffer import Buffer, versions_of
from minglm.rl.episode import Segment, Trajectory
from minglm.rl.recorded import Recorded
from minglm.rl.samples import GroupKey, SampleFile, read_sample, read_steps, write_sample
from minglm.rl.schedule import TaskSchedule

STEPS = 4


def live(key):
    """Return whether a group teaches anything: some do, some do not, in every round."""
    return (7 * key.step + 3 * key.place + 5 * key.refill) % 3 > 0


class Workers(RuleBasedStateMachine):
    """A trainer and workers that finish, die and save at any moment."""

    @initialize(prompts=st.integers(1, 3), refill=st.integers(0, 2), staleness=st.integers(0, 3))
    def start(self, prompts, refill, staleness):
        environments = {"letters": Letters()}
        self.schedule = TaskSchedule(environments, ("letters",), prompts, 1, refill=refill)
        self.staleness = staleness
        self.keys = {}
        self.buffer = self.fresh()
        self.playing = {}
        self.taken = []
        self.finished = Counter()

    def fresh(self):
        """Return an empty buffer."""

        def informative(groups):
            return [live(self.keys[group[0].task.id]) for group in groups]

        return Buffer(self.schedule, informative, STEPS, self.staleness)

    @rule()
    def deal(self):
        self.buffer.begin()
        for task in self.buffer.deal():
            assert task.key not in self.playing
            assert self.buffer.version >= task.key.step - self.staleness
            self.keys[task.task.id] = task.key
            self.playing[task.key] = (task, self.buffer.version)

    @precondition(lambda self: self.playing)
    @rule(data=st.data())
    def finish(self, data):
        key = data.draw(st.sampled_from(sorted(self.playing)))
        task, began = self.playing.pop(key)
        versions = [-1, *range(began, self.buffer.version + 1)]  # an answer lives through updates
        segment = Segment(
            [1] * len(versions), [v >= 0 for v in versions], [-0.5] * len(versions), versions
        )
        group = [Trajectory(task.task, True, segments=[segment], texts=["a"])]
        assert self.buffer.add(key, group)
        assert not self.buffer.add(key, group), "a second answer to one key is refused"
        self.finished[key] += 1

    @precondition(lambda self: self.playing)
    @rule(data=st.data())
    def die(self, data):
        lost = data.draw(st.sets(st.sampled_from(sorted(self.playing)), min_size=1))
        self.buffer.requeue(lost)
        for key in lost:
            del self.playing[key]

    @precondition(lambda self: self.buffer.is_ready(self.buffer.taken))
    @rule()
    def learn(self):
        step = self.buffer.taken
        drawn = self.buffer.take(step)
        assert drawn.refilled == len(drawn.groups) - self.schedule.prompts
        for key, group in zip(drawn.keys, drawn.groups, strict=True):
            assert key == self.keys[group[0].task.id] and key.step == step
            assert all(step - self.staleness <= v <= step for v in versions_of(group))
        rounds = Counter(key.refill for key in drawn.keys)
        assert rounds[0] == self.schedule.prompts
        for refill in range(self.schedule.refill):
            dead = sum(not live(key) for key in drawn.keys if key.refill == refill)
            assert rounds[refill + 1] == dead, (
                "each group without signal is replaced, as far as rounds go"
            )
        self.taken += drawn.keys
        self.buffer.advance(step + 1)

    @rule()
    def save_and_restore(self):
        state = json.loads(json.dumps(self.buffer.state_dict()))
        ready = {key for rounds in self.buffer.rounds.values() for r in rounds for key in r.groups}
        self.buffer = self.fresh()
        self.buffer.load_state_dict(state)
        rounds = [r for rounds in self.buffer.rounds.values() for r in rounds]
        assert ready == {key for r in rounds for key in r.groups}
        dealt = {task.key for r in rounds for task in r.tasks}
        assert dealt - ready == self.buffer.waiting.keys(), "what is ready is not dealt again"
        self.playing = {}

    @invariant()
    def nothing_is_counted_twice(self):
        if hasattr(self, "taken"):
            assert max(Counter(self.taken).values(), default=1) == 1
            assert all(self.finished[key] == 1 for key in self.taken)

    def teardown(self):
        """Finish what is left: every step ends with exactly the groups that the schedule deals to it."""
        if not hasattr(self, "taken"):
            return
        while self.buffer.taken < STEPS:
            self.buffer.begin()
            for task in self.buffer.deal():
                self.keys[task.task.id] = task.key
                self.playing[task.key] = (task, self.buffer.version)
            for key, (task, began) in self.playing.items():
                segment = Segment([1], [True], [-0.5], [began])
                self.buffer.add(key, [Trajectory(task.task, True, segments=[segment], texts=["a"])])
            self.playing = {}
            if self.buffer.is_ready(self.buffer.taken):
                step = self.buffer.taken
                self.taken += self.buffer.take(step).keys
                self.buffer.advance(step + 1)
        first = [key for key in self.taken if key.refill == 0]
        assert first == [
            GroupKey(s, 0, p) for s in range(STEPS) for p in range(self.schedule.prompts)
        ]


TestWorkers = Workers.TestCase
TestWorkers.settings = settings(max_examples=25, stateful_step_count=20)


def buffer_of_one(max_staleness=0):
    """Return a buffer of one prompt a step, at version 3."""
    schedule = TaskSchedule({"letters": Letters()}, ("letters",), 1, 1)
    return Buffer(schedule, lambda groups: [True] * len(groups), 9, max_staleness, step=3)


@pytest.mark.parametrize(("version", "refused"), [(1, True), (2, False), (3, False), (4, True)])
def test_a_worker_with_the_wrong_weights_is_found(version, refused):
    """Older than the bound, or younger than any weights there are: one line names step, version and bound."""
    buffer = buffer_of_one(1)
    buffer.begin()
    task = buffer.deal()[0]
    segment = Segment([1, 2], [False, True], [0.0, -1.0], [-1, version])
    buffer.add(task.key, [Trajectory(task.task, True, segments=[segment])])
    if refused:
        with pytest.raises(
            ValueError, match=f"step 3, place 0: a token of version {version}, .*= 1"
        ):
            buffer.take(3)
    else:
        assert buffer.take(3).keys == [task.key]


floats = st.floats(width=32, allow_nan=False)
texts = st.text(max_size=5)


@st.composite
def trajectories(draw):
    """Draw a trajectory of any form."""
    segments = []
    for _ in range(draw(st.integers(0, 2))):
        mask = draw(st.lists(st.booleans(), min_size=1, max_size=6))
        logprobs = [draw(floats) if sampled else 0.0 for sampled in mask]
        versions = [draw(st.integers(0, 3)) if sampled else -1 for sampled in mask]
        segments.append(Segment(list(range(len(mask))), mask, logprobs, versions))
    pieces = draw(st.none() | st.lists(texts | st.builds(Tag, texts, st.booleans())))
    parts = draw(st.dictionaries(texts, floats, max_size=2))
    score = Score(draw(st.floats(0, 1)), draw(st.sampled_from(["ok", "wrong"])), parts, draw(texts))
    messages = [{"role": "user", "content": draw(texts)}]
    task = Letters().task(draw(st.integers(0, 9)), 1)
    flags = st.booleans()
    thinking, truncated, obeyed = draw(flags), draw(flags), draw(flags)
    said = draw(st.lists(texts))
    return Trajectory(task, thinking, messages, segments, said, score, truncated, obeyed, pieces)


@given(trajectory=trajectories())
def test_a_sample_survives_the_disk(trajectory):
    """Written as JSON and read back, a trajectory is what it was, log-probabilities to the last bit of float32."""
    line = json.loads(json.dumps(write_sample(GroupKey(0, 0, 0), 0, trajectory)))
    found = read_sample(line, trajectory.task)
    for ours, theirs in zip(found.segments, trajectory.segments, strict=True):
        assert np.array_equal(np.float32(ours.logprobs), np.float32(theirs.logprobs))
        ours.logprobs = (
            theirs.logprobs
        )  # the shortest decimals are other numbers in double precision
    assert found == trajectory
    other = Letters().task(17, 2)
    with pytest.raises(ValueError, match=f"is task {trajectory.task.id}, where .* {other.id}"):
        read_sample(line, other)


def test_the_file_of_samples_is_cut_and_checked(tmp_path):
    """A resumed run repeats its steps and not their samples; a torn line goes too; a file of another config is refused."""
    path = tmp_path / "samples" / "rl.jsonl"
    file = SampleFile(path, {"stage": "rl", "prompts": 1})
    task = Letters().task(0, 1)
    trajectory = Trajectory(
        task, True, segments=[Segment([1, 2], [False, True], [0.0, -0.1], [-1, 0])]
    )
    for step in range(4):
        file.write([GroupKey(step, 0, 0)], [[trajectory, trajectory]])
    with open(path, "a", encoding="utf-8") as torn:
        torn.write('{"step": 4, "torn')
    file.cut(2)
    file.write([GroupKey(2, 0, 0)], [[trajectory]])
    steps = list(read_steps(path, {"stage": "rl", "prompts": 1}))
    assert [(step[0]["step"], len(step)) for step in steps] == [(0, 2), (1, 2), (2, 1)]
    with pytest.raises(ValueError, match="is of another config: prompts is 1, and 2 is asked for"):
        list(read_steps(path, {"prompts": 2}))
    with pytest.raises(ValueError, match="holds no rollouts; give a file"):
        list(read_steps(tmp_path / "none.jsonl", {}))


@pytest.mark.parametrize("lines", range(1, 9))
def test_a_step_that_was_torn_is_not_trained_on(tmp_path, lines):
    """A file that ends within a step, of two prompts and two refills by two samples: one line, before anything is learned."""
    schedule = TaskSchedule({"letters": Letters()}, ("letters",), 2, 1)
    path = tmp_path / "rl.jsonl"
    file = SampleFile(path, {"samples": 2})
    for step in range(2):
        keys = [GroupKey(step, refill, place) for refill in range(2) for place in range(2)]
        tasks = [schedule.draw(key.step, key.refill, [key.place]).tasks[0] for key in keys]
        file.write(keys, [[Trajectory(task, True)] * 2 for task in tasks])
    whole = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(whole[: 1 + 8 + lines]))
    recorded = Recorded(path, {"samples": 2}, schedule)
    assert [len(group) for group in recorded.draw(0).groups] == [2] * 4
    if lines == 8:
        assert len(recorded.draw(1).groups) == 4
    else:
        with pytest.raises(ValueError, match=r"rl\.jsonl has only a part of step 1; ask for fewer"):
            recorded.draw(1)


@pytest.mark.parametrize("text", ["a\u2028b", "a\x85b", "\ud800", "a\x1cb", "\x00", "猫"])
def test_any_text_of_a_sample_survives_the_file(tmp_path, text):
    """What splits lines elsewhere, and half a surrogate pair, which an agent may send: one line, read as it was."""
    path = tmp_path / "rl.jsonl"
    messages = [{"role": "user", "content": text}]
    task = Letters().task(0, 1)
    trajectory = Trajectory(task, True, messages, [Segment([1], [True], [-0.1], [0])])
    SampleFile(path, {}).write([GroupKey(0, 0, 0)], [[trajectory, trajectory]])
    assert path.read_bytes().count(b"\n") == 3
    ((line, again),) = read_steps(path, {})
    assert line["messages"] == again["messages"] == messages


@pytest.mark.parametrize(
    "damaged", ["", "42", "[]", '{"head": 42}', '{"step": 0}', '{"step": 0, "torn', "[" * 10**5]
)
@pytest.mark.parametrize("number", [1, 2])
def test_a_damaged_file_of_samples_is_named_with_its_line(tmp_path, number, damaged):
    """Wherever it is damaged: one line with the path and the number."""
    path = tmp_path / "rl.jsonl"
    path.write_text('{"head": {}}\n' * (number - 1) + damaged, encoding="utf-8")
    if number == 2 and not damaged:
        assert list(read_steps(path, {})) == []
        return
    with pytest.raises(ValueError, match=rf"^.*rl\.jsonl, line {number} holds no rollouts; .*$"):
        list(read_steps(path, {}))
