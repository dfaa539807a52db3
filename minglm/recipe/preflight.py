"""Check everything that can be checked before anything is written, without a GPU and without data (no section).

    inputs       environments, sources, files and tokenizer exist (`minglm.recipe.inputs`)
    kernels      Triton has a GPU to run on
    deepep       its package, GPUs, NVLink and RDMA cards are there
    exact        log-probabilities with the engine's bits have a CPU, a C compiler and one process
    agents       the command of outside agents is there; their endpoint and trackers have their packages
    engine       an engine over HTTP has an address, and can do what the stages ask of it
    stages       --only and --until name stages
    order        the stages that --only and --until leave out are done where others build on them
    memory       weights and gradients fit
    disk         the checkpoints fit, estimated from the weights and the state of the optimizer

The values themselves were checked when the config was loaded, the environments when the stages were planned.
"""

import importlib.util
import os
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import torch

from minglm.common.device import pick_device
from minglm.common.mistakes import shown
from minglm.config import (
    Kernels,
    RatioLevel,
    RunConfig,
    TokenExchange,
    Tracker,
)
from minglm.config.parallel import NVLINK_RANKS, deepep_lacks_neighbours
from minglm.config.posttraining import Judge
from minglm.kernels.dispatch import has_c_library
from minglm.plan.counts import count_parameters
from minglm.plan.memory import optimizer_split
from minglm.recipe.inputs import check_data
from minglm.recipe.stages import RLStage, Stage, StageKind, is_done
from minglm.rl.samples import read_lines
from minglm.train.checkpoint import CheckpointStore

GIB = 2**30
INFINIBAND = Path("/sys/class/infiniband")


class DiskNeed(NamedTuple):
    """Room for the checkpoints that a run will write."""

    needed: int
    """Bytes of the final checkpoints still to be written, and of the partial ones of the stage in progress."""
    free: int
    """Bytes free on the disk of the run's folder."""

    def __str__(self) -> str:
        """Return one line for people."""
        sizes = f"{self.needed / GIB:,.2f} GiB needed, {self.free / GIB:,.2f} GiB free"
        return f"checkpoints: {sizes}" + ("" if self.fits else ": not enough")

    @property
    def fits(self) -> bool:
        """Return whether the checkpoints fit."""
        return self.needed <= self.free


def check_run(run: RunConfig) -> None:
    """Raise ValueError, in one line, for sources, files or kernels that this run cannot have."""
    check_data(run)
    check_kernels(run)
    check_tracker(run)
    check_outside(run)
    check_rollout_engine(run)


def check_halves(
    stages: Sequence[Stage],
    only: str | None,
    rollout_only: bool,
    from_rollouts: Path | None,
    ranks: int,
) -> None:
    """Refuse half of RL, its rollouts or its training, where there is no stage for it."""
    if not rollout_only and from_rollouts is None:
        return
    option = "--rollout-only" if rollout_only else "--from-rollouts"
    names = [stage.name for stage in stages if isinstance(stage, RLStage)]
    if only not in names:
        raise ValueError(f"{option} is for one stage of RL: add --only {' or '.join(names)}")
    if rollout_only and from_rollouts is not None:
        raise ValueError("--rollout-only and --from-rollouts exclude each other; give one of them")
    if rollout_only and ranks > 1:
        raise ValueError(f"--rollout-only: {ranks} ranks; start one process")
    if from_rollouts is not None and not from_rollouts.is_file():
        raise ValueError(f"--from-rollouts {from_rollouts}: there is no such file")
    if from_rollouts is not None:
        next(read_lines(from_rollouts))  # the head


def check_kernels(run: RunConfig) -> None:
    """Refuse Triton kernels where there is no GPU for them."""
    device = pick_device(run.device)
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if run.kernels == Kernels.TRITON and device.type != "cuda" and not interpreted:
        raise ValueError(
            "kernels = 'triton' needs a GPU; use --kernels auto, or TRITON_INTERPRET=1 for a slow test"
        )


def check_exact(run: RunConfig, ranks: int) -> None:
    """Refuse exact log-probabilities where there is no C decoder for them, or the weights lie on several ranks."""
    phases = run.posttraining.reinforcements().items()
    for name in [name for name, rl in phases if rl.exact]:
        if pick_device(run.device).type != "cpu":
            raise ValueError(f"posttraining.{name}.exact runs on a CPU only; use --device cpu")
        if not has_c_library():
            raise ValueError(f"posttraining.{name}.exact needs a C compiler, and there is none")
        if ranks > 1:
            raise ValueError(
                f"posttraining.{name}.exact runs in one process, and there are {ranks}"
            )


def check_stage_names(stages: Sequence[Stage], only: str | None, until: str | None) -> None:
    """Refuse the name of a stage that the run does not have."""
    names = [stage.name for stage in stages]
    for option, name in (("--only", only), ("--until", until)):
        if name is not None and name not in names:
            raise ValueError(f"{option} {name}: no such stage; the stages are {', '.join(names)}")


def check_order(
    stages: Sequence[Stage], checkpoints: CheckpointStore, only: str | None, until: str | None
) -> None:
    """Refuse --only or --until where another stage must come first: the base of a stage, or an interrupted one."""
    wanted = wanted_stages(stages, only, until)
    remaining = [stage for stage in stages if not is_done(stage, stages, checkpoints)]
    for stage in remaining:
        if stage.name not in wanted and checkpoints.is_interrupted(stage.name):
            raise ValueError(
                f"stage {stage.name} was interrupted; finish it first, with --only {stage.name}"
            )
    missing = {stage.name for stage in remaining}
    for stage in remaining:
        if only == stage.name and stage.base in missing:
            raise ValueError(
                f"--only {only}: the stage before has not been run: "
                f"there is no {checkpoints.stage(str(stage.base)).final}; run it first, with --until {stage.base}"
            )


def wanted_stages(stages: Sequence[Stage], only: str | None, until: str | None) -> list[str]:
    """Return the names of the stages that --only or --until asks for; of all stages without either."""
    names = [stage.name for stage in stages]
    if only is not None:
        return [only]
    if until is not None:
        return names[: names.index(until) + 1]
    return names


def check_tracker(run: RunConfig) -> None:
    """Refuse a tracker whose package is missing."""
    packages = {Tracker.TENSORBOARD: "tensorboard", Tracker.WANDB: "wandb"}
    package = packages.get(run.watch)
    if package and importlib.util.find_spec(package) is None:
        raise ValueError(f"watch = {run.watch.value!r} needs a package: pip install 'minglm[log]'")


def check_outside(run: RunConfig) -> None:
    """Refuse outside agents whose command is none, or where the packages that serve them are missing."""
    for name, phase in run.posttraining.reinforcements().items():
        if phase.outside.command:
            check_command(f"posttraining.{name}.outside.command", phase.outside.command)
        for package in ("starlette", "uvicorn") if phase.outside.on else ():
            if importlib.util.find_spec(package) is None:
                raise ValueError(
                    f"posttraining.{name}.outside needs the package {package}: pip install 'minglm[serve]'"
                )


def check_command(name: str, command: str) -> None:
    """Refuse a command that no shell could take apart, or whose program is not there. name: of the field."""
    try:
        program = next(iter(shlex.split(command)), "")
    except ValueError as error:
        raise ValueError(f"{name} = {shown(command)}: {error}") from None
    if shutil.which(program) is None:
        raise ValueError(
            f"{name} = {shown(command)}: there is no program {shown(program, quoted=True)}"
        )


def check_address(name: str, url: str) -> None:
    """Refuse what is no address of an HTTP server. name: of the field."""
    try:
        parts = urlsplit(url)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_address = False
    if not is_address:
        raise ValueError(f"{name} = {shown(url)}: must be an address, http://HOST:PORT")


def check_rollout_engine(run: RunConfig) -> None:
    """Refuse what is no engine over HTTP, and what such an engine cannot do."""
    if not run.rollout_engine:
        return
    check_address("rollout_engine", run.rollout_engine)
    if importlib.util.find_spec("httpx") is None:
        raise ValueError("rollout_engine needs the package httpx: pip install 'minglm[serve]'")
    for name, phase in run.posttraining.reinforcements().items():
        if phase.routing_replay:
            raise ValueError(
                f"posttraining.{name}.routing_replay: an engine over HTTP does not report its experts"
            )
        if phase.reward.composed and phase.reward.judge == Judge.MODEL:
            raise ValueError(
                f"posttraining.{name}.reward.judge = 'model': an engine over HTTP has one model, the one that is trained; "
                "use 'program', or leave out rollout_engine"
            )
        if phase.asynchronous.workers:
            raise ValueError(
                f"posttraining.{name}.asynchronous.workers: the workers have engines of their own; leave out rollout_engine"
            )


def check_layout(run: RunConfig, stages: Sequence[Stage], ranks: int) -> None:
    """Refuse a layout that does not fit the number of ranks or these stages, or that a run cannot have."""
    layout = run.parallel.layout(ranks, run.model)
    for stage in stages:
        if not isinstance(stage, RLStage):
            continue
        if layout.pp > 1:
            raise ValueError(
                f"parallel.pp = {layout.pp}: {stage.name} is reinforcement learning, which has no pipeline; "
                "stop before it with --until, and continue with --parallel.pp 1"
            )
        level = stage.config.loss.importance_sampling_level
        if layout.cp > 1 and level == RatioLevel.SEQUENCE:
            raise ValueError(
                f"parallel.cp = {layout.cp}: the ratio of a whole segment ({stage.name}: "
                "loss.importance_sampling_level = 'sequence') is not computed over ranks; use 'token', or --parallel.cp 1"
            )
    if run.parallel.dispatcher == TokenExchange.DEEPEP:
        refusal = deepep_lacks(layout.ep, pick_device(run.device))
        if refusal:
            raise ValueError(f"parallel.dispatcher = 'deepep': {refusal}; or use all_to_all")


def deepep_lacks(ep: int, device: torch.device) -> str:
    """Say what this machine lacks for DeepEP's exchange among `ep` ranks, and what to do; "" where nothing is known to."""
    if device.type != "cuda":
        return "its kernels need GPUs, and there is none; start the run where they are"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "its kernels need a GPU of compute capability 8.0; use a newer one"
    if importlib.util.find_spec("deep_ep") is None:
        return (
            "it needs the package deep_ep, which is built from github.com/deepseek-ai/DeepEP, version 1.2.1; "
            "install it on every machine"
        )
    alone = deepep_lacks_neighbours(ep, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if alone:
        return alone
    own = torch.cuda.current_device()
    others = [gpu for gpu in range(torch.cuda.device_count()) if gpu != own]
    if not all(torch.cuda.can_device_access_peer(own, gpu) for gpu in others):
        return "its kernels need NVLink between the GPUs of a machine; use another machine"
    if ep > NVLINK_RANKS and not INFINIBAND.exists():
        return (
            f"parallel.ep = {ep} goes beyond one machine, and this one has no RDMA network card; "
            f"use an ep of up to {NVLINK_RANKS}"
        )
    return ""


def check_memory(run: RunConfig, ranks: int = 1) -> None:
    """Refuse a model whose weights and gradients alone, at 4 bytes a number, do not fit the memory of these ranks."""
    needed = 2 * 4 * count_parameters(run.model)["total_with_mtp"]
    device = pick_device(run.device)
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        needed /= ranks
    elif "SC_PHYS_PAGES" in os.sysconf_names:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        needed *= int(os.environ.get("LOCAL_WORLD_SIZE", "1")) / ranks  # these share the memory
    else:
        return
    if needed > memory:
        raise ValueError(
            f"model: weights and gradients need {needed / GIB:,.0f} GiB here, and there are {memory / GIB:,.0f} GiB; "
            "use a smaller config or more ranks (`plan` estimates what one needs)"
        )


def disk_need(run: RunConfig, stages: Sequence[Stage], out: Path) -> DiskNeed:
    """Compare the checkpoints that are still to be written with the free space of the disk under `out`.

    Weights have 4 bytes a parameter; so has the momentum of Muon, and each of the two moments of AdamW.
    """
    weights = 4 * count_parameters(run.model)["total_with_mtp"]
    by_muon, by_adamw = optimizer_split(run.model, run.optimizer)
    optimizer = 4 * by_muon + 2 * 4 * by_adamw
    store = CheckpointStore(out)
    needed = 0
    for stage in stages:
        if not is_done(stage, stages, store):
            needed += weights
            if stage.kind == StageKind.PRETRAIN:  # the next stage continues with its optimizer
                needed += optimizer
    if needed:
        needed += 2 * (weights + optimizer)  # the partial checkpoint and the one before it
    existing = next(
        folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists()
    )
    return DiskNeed(needed, shutil.disk_usage(existing).free)


def check_disk(need: DiskNeed, out: Path) -> None:
    """Refuse a run whose checkpoints do not fit on the disk."""
    if not need.fits:
        raise ValueError(f"--out {out}: {need}; free space or choose another --out")
