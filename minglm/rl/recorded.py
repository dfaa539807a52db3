"""Roll out without training, and train without rolling out: each half of RL alone, to find a fault in it (paper 3.5).

    run CONFIG --only STAGE --rollout-only              weights of the stage's base  ->  RUN/rollouts/STAGE.jsonl
    run CONFIG --only STAGE --from-rollouts FILE        FILE  ->  the updates of the stage, without an engine

The file is that of `minglm.rl.samples`. Trained on its own samples/STAGE.jsonl, a stage ends with the weights that it had.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from minglm.common.trace import Span
from minglm.rl.buffer import DrawnGroups, Group
from minglm.rl.loop import Rollouts
from minglm.rl.samples import GroupKey, SampleFile, read_sample, read_steps
from minglm.rl.schedule import TaskSchedule
from minglm.train.state import Stateful


class Recorded:
    """Groups that were played before.

    Args:
        path: a file of samples.
        head: what it depends on, as this config has it.
        schedule: deals the tasks of the groups again.
    """

    parts: Mapping[str, Stateful] = {}

    def __init__(self, path: Path, head: Mapping[str, Any], schedule: TaskSchedule) -> None:
        self.path = path
        self.samples = head["samples"]
        self.schedule = schedule
        self.steps: Iterator[Sequence[dict[str, Any]]] = read_steps(path, head)

    def draw(self, step: int) -> DrawnGroups:
        """Return the groups of a step.

        Raises ValueError, in one line, where the file has none, a part of them, or of other tasks.
        """
        lines = next((found for found in self.steps if found[0]["step"] == step), None)
        if lines is None:
            raise ValueError(f"{self.path} has no samples of step {step}; ask for fewer steps")
        groups: dict[GroupKey, Group] = {}
        for line in lines:
            key = GroupKey(line["step"], line["refill"], line["place"])
            task = self.schedule.draw(key.step, key.refill, [key.place]).tasks[0]
            try:
                groups.setdefault(key, []).append(read_sample(line, task))
            except ValueError as error:
                raise ValueError(f"{self.path} is of another config: {error}") from None
        wholly = all(len(group) == self.samples for group in groups.values())
        if len(groups) < lines[0]["groups"] or not wholly:
            raise ValueError(f"{self.path} has only a part of step {step}; ask for fewer steps")
        refilled = len(groups) - self.schedule.prompts
        return DrawnGroups(list(groups.values()), refilled, list(groups))

    def publish(self, version: int, changed: bool = True) -> None:
        """Do nothing: nobody rolls out."""

    def spans(self) -> list[Span]:
        """Return no spans: nobody rolls out."""
        return []


def record(rollouts: Rollouts, steps: int, samples: SampleFile, quiet: bool = False) -> None:
    """Write the samples of all steps, drawn with the weights as they are."""
    samples.cut(0)
    for step in tqdm(range(steps), desc=samples.path.stem, unit="step", disable=quiet or None):
        rollouts.publish(step)
        drawn = rollouts.draw(step)
        samples.write(drawn.keys, drawn.groups)
