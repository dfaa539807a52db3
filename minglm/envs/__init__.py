"""Provide environments: tasks with verifiable rewards for reinforcement learning (paper 3.2 to 3.4)."""

from minglm.envs.arithmetic import Arithmetic
from minglm.envs.base import Environment
from minglm.envs.code import Code
from minglm.envs.instructions import Instructions
from minglm.envs.pathology import PathologyPrompts
from minglm.envs.retail import Retail

ENVIRONMENTS: dict[str, Environment] = {
    environment.name: environment
    for environment in (Arithmetic(), Code(), Retail(), Instructions(), PathologyPrompts())
}
"""Every environment by name."""
