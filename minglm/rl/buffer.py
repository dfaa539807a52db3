"""Pool the groups of a stage: which may begin, which are under way, which are ready to be learned from (paper 3.5).

    schedule -> waiting -> pending (played by a worker) -> ready -> taken by the trainer, oldest step first
                   ^            |                             |
                   +-- requeue -+ its worker died             +-> a new round for places whose group teaches nothing

A step's groups may begin as soon as the newest weights are at most `max_staleness` versions behind the step:

    step s may begin  <=>  version >= s - max_staleness        so every token of step s has a version of at least that

Version v is the weights after v steps. With `max_staleness` = 0 a step begins when the step before it has been learned
from: that is synchronous training. With more the rollouts run ahead, and the trainer seldom waits.

Choices
- A step always learns from the tasks that the schedule deals to it, however long each of them takes. Nothing is dropped
  because it is slow, and nothing is preferred because it is fast: what is trained on has the lengths of what is sampled.
  A buffer that hands out whatever is ready trains on short episodes first. The price is that a step waits for its
  slowest episode, which has `max_staleness` steps more time than in synchronous training.
- Groups without signal are replaced by groups of new prompts in at most `refill` rounds (DAPO's dynamic sampling). A
  round begins when the one before it is complete, so its draws do not depend on who was faster.
- Every group has one key, and is counted once: a second answer to the same key, as of a worker that was believed dead,
  is refused.
- What a checkpoint keeps are the groups that are ready. Those under way are dealt again.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from minglm.envs.base import Task
from minglm.rl.episode import Trajectory
from minglm.rl.samples import GroupKey, read_sample, write_sample
from minglm.rl.schedule import TaskSchedule

Group = list[Trajectory]


@dataclass(frozen=True)
class GroupTask:
    """A group to be played: one task, which is answered several times."""

    key: GroupKey
    task: Task
    thinking: bool
    """The thinking switch of the prompt."""
    seed: int
    """Decides every draw of its round."""
    number: int
    """Among the tasks of its round, from 0."""
    temperature: float


class DrawnGroups(NamedTuple):
    """The groups of one step."""

    groups: list[Group]
    """All of them, those without signal included, in the order in which they were dealt."""
    refilled: int
    """How many were drawn in place of groups without signal."""
    keys: list[GroupKey]


@dataclass
class Round:
    """Tasks of a step that are dealt together, and the groups among them that are ready."""

    tasks: list[GroupTask]
    groups: dict[GroupKey, Group] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Return whether all groups are ready."""
        return len(self.groups) == len(self.tasks)


class Buffer:
    """The groups of a stage, from the schedule to the trainer. One thread at a time may use it.

    Args:
        schedule: deals the tasks.
        informative: groups -> for each, whether its rewards teach anything; asked for complete rounds.
        steps: steps of the stage.
        max_staleness: versions that the weights may be behind a step when it begins.
        step: the first step to take, and the version of the weights.
        temperature: of the steps that begin, until it is changed.
    """

    def __init__(
        self,
        schedule: TaskSchedule,
        informative: Callable[[Sequence[Group]], Sequence[bool]],
        steps: int,
        max_staleness: int = 0,
        step: int = 0,
        temperature: float = 1.0,
    ) -> None:
        self.schedule = schedule
        self.informative = informative
        self.steps = steps
        self.max_staleness = max_staleness
        self.temperature = temperature
        """At which groups are played that begin from now on."""
        self._start(step)

    def _start(self, step: int) -> None:
        self.version = step
        self.taken = step
        """The next step to be taken."""
        self.opened = step
        """The next step to be dealt."""
        self.waiting: dict[GroupKey, GroupTask] = {}
        self.pending: dict[GroupKey, GroupTask] = {}
        self.rounds: dict[int, list[Round]] = {}
        """By step; complete but for the last of each."""

    def advance(self, version: int) -> None:
        """Take note of new weights."""
        assert version >= self.version, "versions only grow"
        self.version = version

    def begin(self) -> None:
        """Let all steps begin for which the newest weights are fresh enough; their groups wait."""
        while self.opened < min(self.version + self.max_staleness + 1, self.steps):
            self._open(self.opened, 0, range(self.schedule.prompts))
            self.opened += 1

    def deal(self) -> list[GroupTask]:
        """Return all groups that wait, oldest first; they are pending from now on."""
        tasks = [self.waiting[key] for key in sorted(self.waiting)]
        self.pending |= self.waiting
        self.waiting = {}
        return tasks

    def _open(self, step: int, refill: int, places: Sequence[int]) -> None:
        """Deal a round of a step; its groups wait."""
        drawn = self.schedule.draw(step, refill, places)
        seed = self.schedule.rollout_seed(step, refill)
        tasks = []
        for number, place in enumerate(places):
            key = GroupKey(step, refill, place)
            task, thinking = drawn.tasks[number], drawn.thinking[number]
            tasks.append(GroupTask(key, task, thinking, seed, number, self.temperature))
        self.rounds.setdefault(step, []).append(Round(tasks))
        self.waiting |= {task.key: task for task in tasks}

    def add(self, key: GroupKey, group: Group) -> bool:
        """Take a group that was played.

        Return False for one that is not pending, which is not counted again.
        """
        if self.pending.pop(key, None) is None:
            return False
        last = self.rounds[key.step][-1]
        last.groups[key] = group
        if last.complete and key.refill < self.schedule.refill:
            groups = [last.groups[task.key] for task in last.tasks]
            places = [
                task.key.place
                for task, live in zip(last.tasks, self.informative(groups), strict=True)
                if not live
            ]
            if places:
                self._open(key.step, key.refill + 1, places)
        return True

    def requeue(self, keys: Collection[GroupKey]) -> None:
        """Let groups wait again that will not be finished, because their worker died."""
        for key in keys:
            self.waiting[key] = self.pending.pop(key)

    def is_ready(self, step: int) -> bool:
        """Return whether all groups of a step are ready."""
        return step in self.rounds and self.rounds[step][-1].complete

    def take(self, step: int) -> DrawnGroups:
        """Hand out the groups of the oldest step, which is ready.

        Raises ValueError where a token is older than `max_staleness` allows, or younger than the newest weights.
        """
        assert step == self.taken and self.is_ready(step), "steps are taken in order, when ready"
        groups: list[Group] = []
        keys: list[GroupKey] = []
        for dealt in self.rounds.pop(step):
            for task in dealt.tasks:
                group = dealt.groups[task.key]
                self._check_versions(task.key, group)
                groups.append(group)
                keys.append(task.key)
        self.taken += 1
        return DrawnGroups(groups, len(groups) - self.schedule.prompts, keys)

    def _check_versions(self, key: GroupKey, group: Group) -> None:
        for version in versions_of(group):
            if not key.step - self.max_staleness <= version <= self.version:
                raise ValueError(
                    f"step {key.step}, place {key.place}: a token of version {version}, where max_staleness = "
                    f"{self.max_staleness} and the newest is {self.version}; its worker has the wrong weights"
                )

    def state_dict(self) -> dict[str, Any]:
        """Return the groups that are ready, as plain values."""
        lines = []
        for rounds in self.rounds.values():
            for dealt in rounds:
                for key, group in dealt.groups.items():
                    lines += [write_sample(key, g, t) for g, t in enumerate(group)]
        return {"step": self.taken, "samples": lines}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was called: ready groups are ready, the others are dealt again."""
        self._start(state["step"])
        found: dict[GroupKey, list[dict[str, Any]]] = {}
        for line in state["samples"]:
            key = GroupKey(line["step"], line["refill"], line["place"])
            found.setdefault(key, []).append(line)
        if found:
            self.begin()
        for key in sorted(found):
            self.deal()  # a round that the group before has opened
            task = self.pending[key].task
            self.add(key, [read_sample(line, task) for line in found[key]])
        self.waiting |= self.pending
        self.pending = {}


def versions_of(group: Group) -> set[int]:
    """Return the versions of the weights that drew the tokens of a group, where they are known."""
    found: set[int] = set()
    for trajectory in group:
        for segment in trajectory.segments:
            found |= set(segment.versions)
    return found - {-1}
