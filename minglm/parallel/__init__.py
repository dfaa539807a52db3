"""Share the work of a training step among workers, without the model knowing (no section in the paper).

`parallelize(model, ...)` returns an object with one method, `run(work, shares)`: it calls `work(replica, share)` on
every worker and leaves the sum of the gradients in the model. The loops know nothing else of how the work is shared.
"""

from torch import nn

from minglm.parallel.replicas import Replicas

__all__ = ["Replicas", "parallelize"]


def parallelize(model: nn.Module, threads: int = 1) -> Replicas:
    """Return the workers that share each batch: `threads` threads of this process, over one set of weights."""
    return Replicas(model, threads)
