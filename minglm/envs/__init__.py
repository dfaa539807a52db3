"""Provide environments: tasks with verifiable rewards for reinforcement learning (paper 3.2 to 3.4)."""

import copy
from collections.abc import Mapping, Sequence

from minglm.common import mistakes
from minglm.envs import gym, pages
from minglm.envs.arithmetic import Arithmetic
from minglm.envs.base import Environment
from minglm.envs.code import Code
from minglm.envs.constraints.environment import Constraints, UnseenConstraints
from minglm.envs.functions import Functions
from minglm.envs.instructions import Instructions
from minglm.envs.logic import Logic
from minglm.envs.needle import Needle
from minglm.envs.pathology import PathologyPrompts
from minglm.envs.programs import Completion, Repair
from minglm.envs.safety import Safety
from minglm.envs.science import Science
from minglm.envs.search import SHORT, Search
from minglm.envs.swe import users
from minglm.envs.swe.functions import RepairFunctions
from minglm.envs.swe.library import RepairLibrary
from minglm.envs.worlds import short
from minglm.envs.worlds.retail import Retail
from minglm.envs.worlds.sets import AIRLINE
from minglm.envs.worlds.tables import TableEnvironment, world_in_file

WORLD = "world:"


SINGLE_CHARACTERS = {
    environment.name: environment
    for environment in (
        Search(wording=SHORT, name="search:short"),
        short.ListedWorlds(),
        short.ListedWorld(short.SHOP, "shop:short"),
        short.ListedWorld(short.AIRLINE, "airline:short"),
        short.ListedSteps(short.STEPPED, "functions:short"),
    )
}
"""Environments for the smallest models."""


class Environments(dict[str, Environment]):
    """Environments by name: those of this package, reasoning-gym's, worlds in files, repositories, and documents.

    All but the first are made when they are first asked for; iteration gives those of this package only.
    """

    def __init__(self, *environments: Environment) -> None:
        super().__init__({environment.name: environment for environment in environments})
        self._made: dict[str, Environment] = {}

    def __missing__(self, name: str) -> Environment:
        """Return an environment that is described by its name. Raises ValueError, in one line, for other names."""
        if name not in self._made:
            self._made[name] = _made(name, list(self))
        return self._made[name]

    def asking(
        self,
        asked: Mapping[str, Sequence[int]],
        shown: Mapping[str, Sequence[int]] | None = None,
    ) -> "Environments":
        """Return these environments, some of which ask, and show in demonstrations, other difficulties.

        asked, shown: {name: difficulties}; a difficulty that is named twice comes twice as often. What is asked does not
        change what is shown. Raises ValueError, in one line, for a name or a difficulty that does not exist.
        """
        changed = Environments(*self.values())
        changed._made = dict(self._made)
        shown = shown or {}
        for name in dict.fromkeys([*asked, *shown]):
            environment = copy.copy(self[name])
            for difficulties in (asked.get(name, ()), shown.get(name, ())):
                if not set(difficulties) <= set(environment.difficulties):
                    raise ValueError(
                        f"{name}:{','.join(map(str, difficulties))}: "
                        f"{name} has the difficulties {', '.join(map(str, environment.difficulties))}"
                    )
            dealt = environment.default_difficulties
            environment.shown_difficulties = tuple(
                shown.get(name, environment.shown_difficulties or dealt)
            )
            environment.default_difficulties = tuple(asked.get(name, dealt))
            changed[name] = environment
        return changed


def _made(name: str, ours: list[str]) -> Environment:
    """Return the environment that a name describes. ours: the names that need no description."""
    if name.startswith(gym.PREFIX):
        return gym.ReasoningGym(name)
    if name in SINGLE_CHARACTERS:
        return SINGLE_CHARACTERS[name]
    if name.startswith(pages.PREFIX):
        return pages.PageSearch(name)
    if name.startswith(WORLD):
        return world_in_file(name.removeprefix(WORLD), name)
    if name == RepairLibrary.name:
        return RepairLibrary()
    if name.startswith(users.PREFIX):
        return users.UserRepository(name)
    others = ", ".join(
        [RepairLibrary.name, *SINGLE_CHARACTERS, users.FORM, pages.FORM, f"{WORLD}FILE"]
    )
    others += f", or {gym.FORM}"
    raise ValueError(f"{mistakes.shown(name)}: must be some of {', '.join(ours)}, {others}")


ENVIRONMENTS = Environments(
    Arithmetic(),
    Code(),
    Retail(),
    Science(),
    Safety(),
    Logic(),
    Needle(),
    Completion(),
    Repair(),
    Search(),
    Instructions(),
    RepairFunctions(),
    Constraints(),
    UnseenConstraints(),
    PathologyPrompts(),
    Functions(),
    TableEnvironment(AIRLINE),
)
"""Every environment by name."""
