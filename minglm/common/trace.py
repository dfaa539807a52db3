"""Time every phase of reinforcement learning: who did what, from when to when (paper 3.5, Figure 10).

    lane      trainer | rollout, or rollout 0, rollout 1, ... with processes of their own
    phase     generate, environment, reward | train, publish
    idle      what is left of a lane: no phase of it is open

Choices: the spans of episodes overlap, so those of one phase and one lane are merged before they are logged:
a lane generates as long as any episode waits for the model. Times are seconds of the system's clock, which
the processes of one machine share.
"""

import contextlib
import threading
import time
from collections.abc import Iterable, Iterator
from enum import StrEnum
from typing import NamedTuple

TRAINER = "trainer"
ROLLOUT = "rollout"

GAP = 2e-3
"""Seconds between two spans of a phase that still count as one: an event loop needs as long."""


class Phase(StrEnum):
    """What a lane does."""

    GENERATE = "generate"
    """The model answers at least one episode."""
    ENVIRONMENT = "environment"
    """An environment replies to at least one episode."""
    REWARD = "reward"
    """At least one episode is scored."""
    TRAIN = "train"
    """The trainer learns."""
    PUBLISH = "publish"
    """New weights are handed to the rollouts."""


class Span(NamedTuple):
    """A phase of a lane, from `began` to `ended`, in seconds of the system's clock."""

    lane: str
    phase: str
    began: float
    ended: float


class Trace:
    """Collects the spans of one lane, and those that other processes send; any thread may add some."""

    def __init__(self, lane: str) -> None:
        self.lane = lane
        self._spans: list[Span] = []
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def span(self, phase: Phase) -> Iterator[None]:
        """Time what is done inside, whatever comes of it."""
        began = time.time()
        try:
            yield
        finally:
            self.add([Span(self.lane, phase, began, time.time())])

    def add(self, spans: Iterable[Span]) -> None:
        """Add finished spans, of any lane."""
        with self._lock:
            self._spans += spans

    def take(self) -> list[Span]:
        """Return the spans since the last call, merged."""
        with self._lock:
            spans = self._spans
            self._spans = []
        return merged(spans)


def merged(spans: Iterable[Span]) -> list[Span]:
    """Return spans in the order of lane, phase and time, with those of one lane and phase joined where they overlap."""
    joined: list[Span] = []
    for span in sorted(spans):
        last = joined[-1] if joined else None
        if last is not None and last[:2] == span[:2] and span.began <= last.ended + GAP:
            joined[-1] = last._replace(ended=max(last.ended, span.ended))
        else:
            joined.append(span)
    return joined


def idle_share(spans: Iterable[Span], lane: str, phases: Iterable[str]) -> float:
    """Return the share of the time of a lane, from the first span of any lane to the last, in which it is in no such phase."""
    spans = list(spans)
    length = max(s.ended for s in spans) - min(s.began for s in spans)
    wanted = set(phases)
    own = [s._replace(phase="busy") for s in spans if s.lane == lane and s.phase in wanted]
    busy = sum(span.ended - span.began for span in merged(own))
    return 1.0 - busy / length if length > 0 else 0.0
