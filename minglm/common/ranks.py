"""Let ranks that write or read files together agree: all of them go on, or all stop with one error (no section).

    together(work)         every rank calls `work`; each then has the results of all, or raises what went wrong on any
    deal(work, tasks)      each rank calls `work` on its share of the tasks; all then have all results, in order
    divide(work, tasks)    the same for work on a single task

Agreement goes through a process group of its own, on the CPU (gloo): it never mixes with the exchanges of a
training step, also where a thread does it in the background, and it takes no memory of a GPU. One process
alone is a world of one.
"""

import contextlib
import datetime
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from minglm.common.files import new_folder
from minglm.common.mistakes import one_line

Result = TypeVar("Result")
Task = TypeVar("Task")

LONG = datetime.timedelta(days=1)
"""Most time that ranks wait for one that writes a file. One that dies closes its connections, which ends the wait."""


class Ranks:
    """Ranks that do something together; `Ranks()` is one process alone."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)

    @classmethod
    def of_the_world(cls) -> "Ranks":
        """Return all ranks of the world, one where there is no process group. All of them must call this."""
        if not dist.is_initialized():
            return cls()
        group = dist.new_group(backend="gloo", timeout=LONG)
        assert isinstance(group, dist.ProcessGroup), "this rank is in the group of all ranks"
        return cls(group)

    def together(self, work: Callable[[], Result]) -> list[Result]:
        """Call `work` on every rank.

        Return the results by rank; raise the error of any rank on all, as a ValueError.

        A process alone raises the error as it is.
        """
        if self.group is None:
            return [work()]
        result = None
        problem = None
        try:
            result = work()
        except Exception as error:  # whatever it is: the others wait for an answer
            problem = one_line(str(error) or type(error).__name__)
        answers: list[Any] = [None] * self.size
        dist.all_gather_object(answers, (result, problem), self.group)
        for rank, (_, problem) in enumerate(answers):
            if problem is not None:
                raise ValueError(problem if rank == self.rank else f"rank {rank}: {problem}")
        return [result for result, _ in answers]

    def first(self, work: Callable[[], Result]) -> Result:
        """Call `work` on rank 0, while the others wait.

        Return its result, or raise its error, on all ranks.
        """
        return self.together(work if self.rank == 0 else _nothing)[0]

    def deal(
        self, work: Callable[[Sequence[Task]], Sequence[Result]], tasks: Sequence[Task]
    ) -> list[Result]:
        """Call `work` with the tasks of this rank: it returns a result for each.

        Return those of all ranks, in order.

        Errors as `together`.
        """
        own = tasks[self.rank :: self.size]
        found = self.together(lambda: work(own))
        # Rank r has the tasks r, r + size, r + 2 size, ...
        return [found[n % self.size][n // self.size] for n in range(len(tasks))]

    def divide(self, work: Callable[[Task], Result], tasks: Sequence[Task]) -> list[Result]:
        """Call work(task) for each task on one of the ranks.

        Return the results of all, in order; errors as `together`.
        """
        return self.deal(lambda own: [work(task) for task in own], tasks)


def _nothing() -> Any:
    """Take part without a result."""


@contextlib.contextmanager
def new_folder_of(ranks: Ranks, folder: str | Path) -> Iterator[Path]:
    """Yield a temporary folder to all ranks, as `minglm.common.files.new_folder` does to one process.

    What the ranks do in it must fail on all of them or on none, as `Ranks.together` does.
    """
    with contextlib.ExitStack() as stack:
        yield ranks.first(lambda: stack.enter_context(new_folder(folder)))
        ranks.first(stack.pop_all().close)  # it takes its name
