"""Work out what is started on a cluster: nodes, ranks, and the commands one after the other (paper 2.4).

    minglm run CONFIG --until code_reasoning --parallel.cp 1       rows of 4,096
    minglm run CONFIG --until reasoning --parallel.cp 2            rows of 32,768
    minglm run CONFIG --until long_agent --parallel.cp 8           rows of 131,072
    minglm run CONFIG --until reasoning.sft --parallel.cp 8        fine-tuning of an expert
    minglm run CONFIG --until reasoning.rl --parallel.cp 4         its reinforcement learning, and so on

One run in one folder: each command continues where the one before ended, in the layout that its rows need. A
job that is started again begins with the first command, which finds its stages complete and ends at once.

A plan that does not fit is refused before a script is written.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from minglm.config.run import RunConfig
from minglm.plan.gpus import GPU
from minglm.plan.layout import layout_for, words
from minglm.plan.posttraining import posttraining_layouts, why_no_posttraining
from minglm.plan.summary import choose_layout, gpus_of, plan_stages, why_not


@dataclass(frozen=True)
class Job:
    """Everything that a script of any kind needs."""

    name: str
    """Of the run: letters, digits, hyphens."""
    nodes: int
    per_node: int
    """GPUs of a node, each with one rank."""
    commands: list[list[str]]
    """Words after `python -m minglm`, in order."""
    stages: list[tuple[str, list[str]]]
    """Each stage of pre- and mid-training that is run, with the words that ask for its layout."""
    check: list[str]
    """Words after `python -m minglm` that measure the links of every axis of the mesh."""

    @property
    def gpus(self) -> int:
        """GPUs of all nodes."""
        return self.nodes * self.per_node


def check_nodes(gpus: int, per_node: int) -> tuple[int, int]:
    """Return (nodes, GPUs of each). Raises ValueError, in one line, for GPUs that do not fill their nodes."""
    if gpus < per_node:
        return 1, gpus
    if gpus % per_node:
        fewer = gpus // per_node * per_node
        raise ValueError(
            f"{gpus} GPUs do not fill nodes of {per_node}; use --gpus {fewer} or {fewer + per_node}"
        )
    return gpus // per_node, per_node


def make_job(
    run: RunConfig,
    config: str,
    overrides: Sequence[str],
    out: str,
    gpu: GPU,
    gpus: int = 0,
    until: str | None = None,
) -> Job:
    """Return the job of a config. config: its path, as `run` takes it. gpus: 0 for as many as the config's layout has.

    until: the last stage of pre- or mid-training to run; None: all stages, post-training included. Raises
    ValueError, in one line, for a layout that is impossible or does not fit in any stage, and for an unknown
    stage.
    """
    gpus = gpus or gpus_of(run)
    if until is not None:
        run = stop_after(run, until)
    layout = choose_layout(run, gpu, gpus)
    wanted = plan_stages(run, layout, gpu)
    refusal = why_not(run, layout, gpu, wanted)
    if refusal:
        raise ValueError(refusal)
    nodes, per_node = check_nodes(gpus, gpu.per_node)

    start = ["run", config, "--out", out]
    commands = []
    every = layout.pp > 1 or run.parallel.cp > 1  # the config names what not all commands have
    layouts = [layout_for(run, layout, stage.sequence_length) for stage in wanted]
    for number, (stage, own) in enumerate(zip(wanted, layouts)):
        is_last = number + 1 == len(wanted)
        if is_last or layouts[number + 1] != own:
            asked = words(own, every).split()
            commands.append([*start, "--until", stage.name, *overrides, *asked])
    if until is None:
        refusal = why_no_posttraining(run, layout, gpu)
        if refusal:
            raise ValueError(refusal)
        later = posttraining_layouts(run, layout)
        for number, (name, own) in enumerate(later):
            if number + 1 == len(later):
                commands.append([*start, *overrides, *words(own, every).split()])
            elif later[number + 1][1] != own:
                asked = words(own, every).split()
                commands.append([*start, "--until", name, *overrides, *asked])
    check = ["bench", "collectives", config, *overrides, *words(layout).split()]
    laid_out = [(stage.name, words(own, every=True).split()) for stage, own in zip(wanted, layouts)]
    return Job(_safe(run.name), nodes, per_node, commands, laid_out, check)


def stop_after(run: RunConfig, stage: str) -> RunConfig:
    """Return a run whose later stages have no tokens. Raises ValueError for a stage that is not there."""
    names = [name for name, there in run.stages.items() if there.tokens]
    if stage not in names:
        raise ValueError(f"--until {stage}: no such stage; the stages are {', '.join(names)}")
    later = {
        name: replace(there, tokens=0)
        for name, there in run.stages.items()
        if name not in names[: names.index(stage) + 1]
    }
    return replace(run, stages=replace(run.stages, **later))


def _safe(name: str) -> str:
    """Return a name for jobs and hosts: lower case letters, digits and hyphens, at most 40."""
    kept = "".join(c if c.isascii() and c.isalnum() else "-" for c in name.lower())
    return kept.strip("-")[:40].strip("-") or "minglm"
