"""Share the work of a training step among workers, without the model knowing (no section in the paper).

`parallelize(model, ...)` returns the workers that share the batches of a loop: threads over one set of
weights, or the ranks that `minglm.parallel.shard` has sharded the model over. The loops know nothing else of
how the work is shared.
"""

from torch import nn

from minglm.parallel.mesh import Meshes
from minglm.parallel.replicas import Replicas
from minglm.parallel.workers import ShardedWorker, Workers
from minglm.parallel.world import World

__all__ = ["Replicas", "Workers", "parallelize"]


def parallelize(
    model: nn.Module,
    threads: int = 1,
    world: World | None = None,
    meshes: Meshes | None = None,
) -> Workers:
    """Return the workers that share each batch.

    threads: of one process, over one set of weights. world, meshes: of the ranks over which `model` is
    sharded; None: it is not.
    """
    if world is not None and meshes is not None:
        return ShardedWorker(model, world, meshes)
    return Replicas(model, threads)
