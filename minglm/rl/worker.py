"""Roll out in a process of its own: take groups and weights from the trainer, and return what was played (paper 3.5).

    trainer -> worker    play, GroupTask      any number at once; all their episodes share one batch
                         update, Notice       new weights, taken between two steps of the engine
    worker -> trainer    played, Played       a whole group
                         updated, version     the weights have been checked and are in use
                         stale, reason        they could not be fetched: hand them over again
                         alive, None          every `BEAT_SECONDS`, between two steps of the engine
                         failed, reason       an error of ours, or of the config: the run stops

A worker ends when the trainer closes the connection, which a killed trainer does too. `minglm.rl.pool` starts workers.
"""

import asyncio
import contextlib
import pickle
import queue
import signal
import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch

from minglm.common.trace import ROLLOUT, Span, Trace
from minglm.config import ModelConfig
from minglm.config.posttraining import PartialRollouts
from minglm.config.run import Kernels
from minglm.data.tokenizer import Tokenizer
from minglm.envs.base import Environment
from minglm.inference import Engine
from minglm.inference.client import EngineGenerator, Generator, ResumingGenerator
from minglm.kernels import dispatch
from minglm.model.glm import GLM
from minglm.rl.buffer import Group, GroupTask
from minglm.rl.episode import Player, SamplingSettings
from minglm.rl.rollout import play_group
from minglm.rl.weights import Notice, decoded, fetch

BEAT_SECONDS = 0.5


@dataclass(frozen=True)
class WorkerSetup:
    """What a worker is made from; it travels to another process."""

    make_generator: Callable[[], Generator]
    """Makes the engine, whose weights come with the first update."""
    tokenizer: Tokenizer
    settings: SamplingSettings
    environments: Mapping[str, Environment]
    samples: int
    """Episodes of a group."""


class Played(NamedTuple):
    """A group that a worker has played, and when it did what."""

    group: Group
    spans: list[Span]


@dataclass(frozen=True)
class EngineSetup:
    """Makes the generator of a worker.

    The model is empty until the first weights come.
    """

    model: ModelConfig
    tokenizer: Tokenizer
    device: str
    dtype: torch.dtype
    kernels: Kernels
    partial: PartialRollouts = PartialRollouts.CONTINUE
    options: Mapping[str, Any] | None = None
    """Of the `Engine`: experts, draft_tokens, keep_choices."""

    def __call__(self) -> Generator:
        """Return the generator."""
        dispatch.use(self.kernels)
        model = GLM(self.model).to(self.device).eval()
        model.dtype = self.dtype
        generator = EngineGenerator(Engine(model, self.tokenizer, **(self.options or {})))
        return ResumingGenerator(generator) if self.partial == PartialRollouts.RESUME else generator


class RolloutWorker:
    """Plays groups with the weights that it was given last."""

    def __init__(self, setup: WorkerSetup, number: int) -> None:
        torch.set_num_threads(1)
        self.setup = setup
        self.generator = setup.make_generator()
        self.trace = Trace(f"{ROLLOUT} {number}")
        self.player = Player(self.generator, setup.tokenizer, setup.settings, trace=self.trace)

    async def play(self, task: GroupTask) -> Played:
        """Play one group, beside all others that are under way."""
        setup = self.setup
        group = await play_group(self.player, setup.environments, task, setup.samples)
        return Played(group, self.trace.take())

    async def alive(self) -> None:
        """Return a moment later, which a worker that hangs does not."""
        await asyncio.sleep(BEAT_SECONDS)

    def update(self, notice: Notice) -> None:
        """Use new weights from now on. Raises ValueError or RuntimeError where they cannot be fetched."""
        self.generator.update_weights(decoded(fetch(notice)), notice.version)


def run_worker(connection: Connection, setup: WorkerSetup, number: int) -> None:
    """Serve the trainer until it closes the connection: the life of a worker process."""
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C is for the trainer, which then ends its workers
    try:
        worker = RolloutWorker(setup, number)
    except Exception as error:
        connection.send_bytes(_packed("failed", reason_of(error)))
        return
    asyncio.run(serve(connection, worker))


async def serve(connection: Connection, worker: RolloutWorker) -> None:
    """Take messages until there are no more; groups are played side by side."""
    ended = asyncio.Event()
    playing: set[asyncio.Task[None]] = set()
    replies: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_send, args=(connection, replies), daemon=True).start()

    def reply(kind: str, value: Any) -> None:
        replies.put(_packed(kind, value))

    async def play(task: GroupTask) -> None:
        try:
            reply("played", (task.key, await worker.play(task)))
        except Exception as error:
            reply("failed", reason_of(error))

    async def beat() -> None:
        while True:
            reply("alive", None)
            await asyncio.sleep(BEAT_SECONDS)

    def take() -> None:
        try:
            kind, value = pickle.loads(connection.recv_bytes())
        except (EOFError, OSError):
            ended.set()
            return
        if kind == "play":
            episode = asyncio.ensure_future(play(value))
            playing.add(episode)
            episode.add_done_callback(playing.discard)
            return
        try:
            worker.update(value)
        except (ValueError, RuntimeError, OSError) as error:
            reply("stale", reason_of(error))
        except Exception as error:
            reply("failed", reason_of(error))
        else:
            reply("updated", value.version)

    loop = asyncio.get_running_loop()
    loop.add_reader(connection.fileno(), take)
    beating = asyncio.ensure_future(beat())
    await ended.wait()
    beating.cancel()
    for episode in list(playing):
        episode.cancel()
    await asyncio.gather(*playing, return_exceptions=True)


def _send(connection: Connection, replies: "queue.SimpleQueue[bytes]") -> None:
    """Send the replies of a worker, in a thread of its own.

    A worker that waited for the trainer to read would not read itself, and a trainer that deals tasks would wait for it.
    """
    with contextlib.suppress(OSError):  # the trainer is gone, which the loop learns too
        while True:
            connection.send_bytes(replies.get())


def _packed(kind: str, value: Any) -> bytes:
    """Return a message; tensors travel as bytes, not as memory of a process that may be killed."""
    return pickle.dumps((kind, value))


def reason_of(error: Exception) -> str:
    """Return what a user is told of an error: its line, or for an error of ours where it happened."""
    if isinstance(error, ValueError):
        return str(error)
    return "".join(traceback.format_exception(error))
