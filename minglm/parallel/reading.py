"""Read text with a sharded model: each rank reads rows of its own, and no rank holds the model (no section in the paper).

    own(model)  ->  Reader(model, ranks)  ->  ranks.divide(pass, batches)

Ranks that share a model meet in every pass, where weights are gathered and tokens exchanged. So all of them make as many
passes: a rank that has read its last batch reads the first one again, and nobody uses the result.

Where ranks share rows, the rows are whole meanwhile: text that is only read keeps no activations, so there is
nothing to cut them for. A pipeline's model is read as a copy that is sharded over all ranks
(`minglm.parallel.copies`).
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from torch.distributed.fsdp import FSDPModule

from minglm.common.ranks import Ranks, Result, Task
from minglm.model.glm import GLM
from minglm.parallel.sequence import whole_rows


class Reader(NamedTuple):
    """A model that reads text, and the ranks that divide it."""

    model: GLM
    ranks: Ranks


class RanksInStep(Ranks):
    """Ranks that meet in every pass, because they share the model that makes it."""

    def divide(self, work: Callable[[Task], Result], tasks: Sequence[Task]) -> list[Result]:
        """Call work(task) for each task on one of the ranks, and as often on each; otherwise as `Ranks.divide`."""
        passes = -(-len(tasks) // self.size)

        def own_share(own: Sequence[Task]) -> list[Result]:
            results = [work(task) for task in own]
            for _ in range(passes - len(own)):
                work(tasks[0])
            return results

        return self.deal(own_share, tasks)


@contextlib.contextmanager
def reading(model: GLM, ranks: Ranks) -> Iterator[Reader]:
    """Yield how the ranks read with a sharded model that has all layers; free what they gathered.

    All must call it.
    """
    with whole_rows(model):
        yield Reader(model, RanksInStep(ranks.group))
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
