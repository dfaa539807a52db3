"""minglm: the GLM-4.5 system (arXiv 2508.06471) as one readable PyTorch code base.

Axis letters. A tensor's name ends in the letters of its axes, in order: `scores_TE` has tokens, then experts.

    B  sequences in a batch          S  positions in a sequence      T  tokens (B and S made flat)
    D  width of the model            N  query heads                  M  key/value heads
    A  width of one head             V  vocabulary                   E  experts
    K  experts chosen per token      F  width of one expert or FFN   G  samples per prompt
    P  prompts                       C  positions held in a cache    L  width of the latent (MLA)
    R  rotating part of a head (MLA); rows of tokens sorted by expert (MoE)

A name without such an ending is a scalar, a Python object, or a tensor whose docstring gives its shape.
"""

import sys
from typing import TYPE_CHECKING, Any

from minglm.common.threads import prepare_threads, use_threads

if TYPE_CHECKING:
    from minglm.config import load_config
    from minglm.model.glm import GLM

__version__ = "0.1.0"
__all__ = ["GLM", "load_config", "__version__"]

if "torch" in sys.modules:  # too late for the environment: set the threads of the pool itself
    use_threads()
else:
    prepare_threads()


def __getattr__(name: str) -> Any:
    """Import `GLM` and `load_config` when they are first used, so that `import minglm` needs no torch."""
    if name == "GLM":
        from minglm.model.glm import GLM

        return GLM
    if name == "load_config":
        from minglm.config import load_config

        return load_config
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
