"""Run RL asynchronously: workers play the next steps while the trainer learns from this one (paper 3.5, Figure 10).

    Synchronous       draw(s): play the groups of step s, and await them             staleness 0
    Disaggregated     draw(s): await the groups of step s, which began when the weights had the version s - max_staleness

`minglm.rl.loop.reinforce` is the loop of both. What differs is where one result is awaited: here the groups
of several steps are under way in other processes (`minglm.rl.worker`), and a thread hands them out and takes
them in, through the buffer (`minglm.rl.buffer`), while the trainer learns.

    publish:   trainer -> channel -> every worker, which answers when it uses them        (minglm.rl.weights)
    death:     groups of the worker wait again, it is restarted, and gets weights when the trainer next has time

Choices
- With `max_staleness` = 0 nothing begins before the weights of its step are everywhere and the trainer asks for it: what is
  decided between two steps (a temperature, a tier of the curriculum, a rollback) holds for the next one. So the run is the
  synchronous one to the last bit, where an answer does not depend on its batch (`minglm.inference.cpu_decoder`).
- The trainer waits until all workers have new weights. That takes as long as a step of the engine, and no version is
  ever in doubt.
- A worker that dies costs its groups, which are dealt again: every draw follows from seeds. One that dies again and
  again without finishing a group ends the run.
- A reward of several parts is given here, where a group comes in: workers need no reward model, and the trainer learns
  meanwhile. A reward model sees the answers of one group at a time, so its value may differ in the last bits from that
  of synchronous training, where its batches are larger.
- Ranks of a sharded trainer gather the weights together; the first of them has the workers.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from minglm.common.ranks import Ranks
from minglm.common.trace import Phase, Span, Trace
from minglm.parallel.workers import buckets
from minglm.rl.buffer import Buffer, DrawnGroups, Group, GroupTask
from minglm.rl.pool import Message, Pool
from minglm.rl.samples import GroupKey
from minglm.rl.schedule import TaskSchedule
from minglm.rl.trainer import PolicyTrainer
from minglm.rl.weights import Channel, in_float8
from minglm.train.state import Stateful

MOST_DEATHS = 5
"""Deaths in a row of one worker, or hand-overs in a row to one, without success, after which the run ends."""

GRADER = "grader"
"""The lane of the rewards of several parts."""


class Disaggregated:
    """Rollouts in processes of their own, as far ahead of the trainer as the bound on staleness allows.

    Args:
        trainer: its model's weights are published.
        schedule: deals the tasks.
        pool: the workers, which `close` ends; None on ranks that leave them to the first.
        channel: carries the weights.
        float8: whether matrices are quantised before they are sent.
        ranks: of the trainer.
        grade: gives the trajectories of a group their reward, in place; None: their environment has done so.
    """

    def __init__(
        self,
        trainer: PolicyTrainer,
        schedule: TaskSchedule,
        pool: Pool | None,
        channel: Channel | None,
        float8: bool = False,
        ranks: Ranks | None = None,
        grade: Callable[[Group], None] | None = None,
    ) -> None:
        self.trainer = trainer
        self.pool = pool
        self.channel = channel
        self.float8 = float8
        self.ranks = ranks or Ranks()
        self.grade = grade
        self.trace = Trace(GRADER)
        staleness = trainer.config.asynchronous.max_staleness
        self.buffer = Buffer(
            schedule,
            trainer.informative,
            trainer.config.steps,
            staleness,
            temperature=trainer.temperature.value,
        )
        self.version = 0
        """Of the weights that were published last."""
        self.parts: Mapping[str, Stateful] = {"buffer": self}

        # Shared with the thread, guarded by `changed`.
        self.changed = threading.Condition()
        self.playing: dict[int, dict[GroupKey, GroupTask]] = {}
        """What each worker that has weights is playing."""
        self.without_weights = set(range(pool.workers)) if pool else set()
        self.asked: set[int] = set()
        """Workers that have been told to fetch weights, and have not answered."""
        self.failures: dict[int, int] = {}
        """By worker, in a row."""
        self.problem: str | None = None
        self.closing = False
        self.thread = threading.Thread(target=self._serve, name="rollouts", daemon=True)
        if pool is not None:
            self.thread.start()

    # The trainer's thread.

    def draw(self, step: int) -> DrawnGroups:
        """Await the groups of a step.

        Raises ValueError, in one line, where the workers cannot go on, RuntimeError for an error of ours in one of them.
        """
        self._begin()
        while not self.ranks.first(lambda: self._await(step)):
            self._hand_over(self.version)
        return self.ranks.first(lambda: self._take(step))

    def _await(self, step: int) -> bool:
        """Wait until a step is ready, or a worker needs weights; return whether the step is."""
        with self.changed:
            self.changed.wait_for(
                lambda: self.problem or self.buffer.is_ready(step) or self.without_weights
            )
            self._raise_problem()
            return self.buffer.is_ready(step)

    def _take(self, step: int) -> DrawnGroups:
        with self.changed:
            return self.buffer.take(step)

    def publish(self, version: int, changed: bool = True) -> None:
        """Hand the trainer's weights to all workers; then the steps may begin that they are fresh enough for."""
        with self.changed:
            if self.pool is not None:
                self.without_weights = set(range(self.pool.workers))
        self.version = version
        self._hand_over(version)
        if self.buffer.max_staleness:
            self._begin()

    def _begin(self) -> None:
        """Let the steps begin that the published weights are fresh enough for, at the present temperature."""
        with self.changed:
            self.buffer.advance(self.version)
            self.buffer.temperature = self.trainer.temperature.value
            if self.pool is not None:
                self.buffer.begin()
            self._deal()

    def _hand_over(self, version: int) -> None:
        """Give weights to the workers that have none, or old ones, until all have them."""
        while self.ranks.first(lambda: bool(self.without_weights)):
            self._send_weights(version)

    def _send_weights(self, version: int) -> None:
        """Try once to give weights to the workers that need some, and wait for their answers."""
        encoded = (in_float8(b) if self.float8 else b for b in buckets(self.trainer.model))
        if self.pool is None or self.channel is None:
            for _ in encoded:  # gathered together with the rank that sends it
                pass
            return
        with self.changed:
            self.asked = set(self.without_weights)
            workers = sorted(self.asked)
        try:
            self.channel.publish(encoded, version, workers, self._tell)
        except RuntimeError as error:  # one of them has died: all of them are asked again
            if not self.asked:
                raise
            reason = str(error)
            with self.changed:
                for worker in workers:
                    self._count_failure(worker, reason)
        with self.changed:
            self.changed.wait_for(lambda: self.problem or not self.asked)
            self._raise_problem()

    def _tell(self, worker: int, notice: Any) -> None:
        assert self.pool is not None
        self.pool.send(worker, "update", notice)

    def _raise_problem(self) -> None:
        if self.problem is not None:
            is_one_line = "\n" not in self.problem
            raise ValueError(self.problem) if is_one_line else RuntimeError(self.problem)

    def spans(self) -> list[Span]:
        """Return what the workers did, of the groups that are finished."""
        return self.trace.take()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the buffer, while no group comes in."""
        with self.changed:
            return self.buffer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state returned by `state_dict`."""
        with self.changed:
            self.buffer.load_state_dict(state)

    def close(self) -> None:
        """End the workers, and release the channel."""
        if self.pool is None:
            return
        with self.changed:
            self.closing = True
        self.pool.wake()
        self.thread.join()
        self.pool.close()
        if self.channel is not None:
            self.channel.close()

    # The other thread.

    def _serve(self) -> None:
        """Take what the workers say, until the end."""
        assert self.pool is not None
        while not self.closing:
            try:
                messages = self.pool.receive()
                self._grade(messages)
                with self.changed:
                    for message in messages:
                        self._take_in(message)
                    self._deal()
            except Exception as error:  # whatever it is: the trainer waits for this thread
                with self.changed:
                    self.problem = f"{type(error).__name__}: {error}"
            with self.changed:
                self.changed.notify_all()
                if self.problem is not None:
                    return

    def _grade(self, messages: Sequence[Message]) -> None:
        """Give the groups that were played their reward, without the lock: the trainer goes on."""
        if self.grade is None:
            return
        for message in messages:
            if message.kind == "played":
                _, played = message.value
                with self.trace.span(Phase.REWARD):
                    self.grade(played.group)

    def _take_in(self, message: Message) -> None:
        """Take one message of a worker."""
        assert self.pool is not None
        worker, kind, value = message
        if kind == "played":
            key, played = value
            self.failures.pop(worker, None)
            self.playing.get(worker, {}).pop(key, None)
            self.trace.add(played.spans)
            self.buffer.add(key, played.group)
        elif kind == "updated":
            self.failures.pop(worker, None)
            self.without_weights.discard(worker)
            self.asked.discard(worker)
            self.playing.setdefault(worker, {})
        elif kind == "stale":
            self.asked.discard(worker)
            self._count_failure(worker, value)
        elif kind == "died":
            self.buffer.requeue(self.playing.pop(worker, {}))
            self.without_weights.add(worker)
            self.asked.discard(worker)
            self._count_failure(worker, value)
            self.pool.restart(worker)
        else:
            self.problem = value

    def _count_failure(self, worker: int, reason: str) -> None:
        """Count a failure of a worker; after too many in a row the run has a problem."""
        self.failures[worker] = self.failures.get(worker, 0) + 1
        if self.failures[worker] > MOST_DEATHS:
            self.problem = (
                f"rollout worker {worker} failed {MOST_DEATHS + 1} times in a row: {reason}"
            )

    def _deal(self) -> None:
        """Give the groups that may begin to the workers with the fewest."""
        if self.pool is None or not self.playing:
            return
        for task in self.buffer.deal():
            worker = min(self.playing, key=lambda number: len(self.playing[number]))
            self.playing[worker][task.key] = task
            self.pool.send(worker, "play", task)
