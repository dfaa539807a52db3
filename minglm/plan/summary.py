"""Plan a run: which layout, does it fit, how long does each stage take, what binds it (paper Table 1, Figure 3).

    python -m minglm plan configs/glm45_355b.py --gpus 512

The layout is the config's, or where it names none the best of `minglm.plan.search`. A stage whose rows are
too long for one GPU shares them among as many as it takes (cp): the same run continues in another layout from
stage to stage. A run that does not fit still has its parameters counted, and the plan says what would fit.

Time is a range, from `minglm.plan.speed`: expected, by arithmetic, and not measured. That of post-training is
wider and stands beside (`minglm.plan.posttraining`): it depends on how long the model chooses to think.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from minglm.config.parallel import Layout, ParallelConfig, divisors, expert_ranks
from minglm.config.run import RunConfig
from minglm.config.training import StageConfig
from minglm.plan.counts import count_parameters, flops_per_token, kv_cache_bytes_per_token
from minglm.plan.gpus import GPU, KERNEL_SHARE, NETWORK_SHARE, NVLINK_SHARE, USABLE
from minglm.plan.layout import check_exchange, check_layout, layout_for, words
from minglm.plan.memory import GIB, STATE_TERMS, fit
from minglm.plan.posttraining import ANSWERS, plan_posttraining
from minglm.plan.serving import serving_table
from minglm.plan.speed import EXPECTED, step_time, tensor_parallel_seconds

ROUTING = "equal loads: the bound as if forced, the range once the bias has balanced them"
"""How tokens are routed in every number of utilisation."""
LARGEST_POWER = 16
"""Numbers of GPUs up to two to this power are tried where a run does not fit."""
LONGEST_PIPELINE = 16
INTERLEAVED = (1, 2, 4)
"""Stages of a rank that a search tries."""
COMFORTABLE = 0.8
"""Share of the usable memory up to which an estimate can be trusted not to be exceeded."""


@dataclass(frozen=True)
class StagePlan:
    """One stage of pre- or mid-training in a layout."""

    name: str
    tokens: int
    sequence_length: int
    cp: int
    """GPUs that share a row."""
    tokens_per_gpu: int
    """Of a micro-batch."""
    microbatches: int
    recompute: bool
    memory: dict[str, int]
    """Bytes of one GPU by term."""
    fits: bool
    flops_per_token: int
    step_tokens: int
    step_seconds: tuple[float, float]
    """Expected, shortest and longest."""
    seconds: dict[str, float]
    """Parts of a step at the bound."""
    traffic: dict[str, float]
    """Bytes that one GPU gets in a micro-batch, by collective and axis."""
    binds: str
    mfu_bound: float
    mfu: tuple[float, float]
    """Expected, lowest and highest."""
    tokens_per_second_per_gpu: tuple[float, float]
    tokens_per_day: tuple[float, float]
    days: tuple[float, float]
    gpu_hours: tuple[float, float]


def plan_stage(
    run: RunConfig, layout: Layout, gpu: GPU, name: str, stage: StageConfig
) -> StagePlan:
    """Plan one stage in a layout, with as many GPUs for a row as it needs."""
    length = stage.sequence_length
    layout = layout_for(run, layout, length)
    found = fit(run, layout, gpu, length)
    time = step_time(run, layout, gpu, length, found.recompute)
    low, high = EXPECTED
    speeds = (low * time.tokens / time.total, high * time.tokens / time.total)
    days = (stage.tokens / speeds[1] / 86400, stage.tokens / speeds[0] / 86400)
    seconds = {"products": time.products}
    traffic = {}
    for collective in time.collectives:
        key = f"{collective.name} over {collective.axis} {collective.ranks}"
        seconds[key] = collective.seconds
        traffic[key] = collective.bytes
    seconds |= {"micro-batch": time.microbatch, "optimizer": time.optimizer, "step": time.total}
    seconds["tensor parallelism"] = tensor_parallel_seconds(
        run, layout, gpu, length, found.recompute
    )
    return StagePlan(
        name=name,
        tokens=stage.tokens,
        sequence_length=length,
        cp=layout.cp,
        tokens_per_gpu=time.share.tokens,
        microbatches=time.share.microbatches,
        recompute=found.recompute,
        memory=found.memory,
        fits=found.fits,
        flops_per_token=flops_per_token(run.model, length).total,
        step_tokens=time.tokens,
        step_seconds=(time.total / high, time.total / low),
        seconds=seconds,
        traffic=traffic,
        binds=time.binds,
        mfu_bound=time.mfu_bound,
        mfu=(low * time.mfu_bound, high * time.mfu_bound),
        tokens_per_second_per_gpu=(speeds[0] / layout.world, speeds[1] / layout.world),
        tokens_per_day=(speeds[0] * 86400, speeds[1] * 86400),
        days=days,
        gpu_hours=(days[0] * 24 * layout.world, days[1] * 24 * layout.world),
    )


def plan_stages(run: RunConfig, layout: Layout, gpu: GPU) -> list[StagePlan]:
    """Plan every stage that has tokens."""
    return [
        plan_stage(run, layout, gpu, name, stage)
        for name, stage in run.stages.items()
        if stage.tokens
    ]


class Candidate(NamedTuple):
    """One layout of the search, with what it costs."""

    layout: Layout
    days: float
    """Of all stages, at the upper end of what is expected."""
    memory: int
    """Bytes of one GPU, in the stage that needs most."""
    recompute: bool
    binds: str
    """In the longest stage."""

    def is_tight(self, usable: float) -> bool:
        """Return whether little of the usable bytes is left for what the estimate does not know."""
        return self.memory > COMFORTABLE * usable


def search(run: RunConfig, gpu: GPU, gpus: int, pipelines: bool = False) -> list[Candidate]:
    """Return every layout of `gpus` GPUs in which all stages fit, the fastest first, those that are tight last.

    Tried are all divisions of the ranks into replicas, sharding and experts, and as many GPUs for a row as it needs.
    pipelines: pipelines of any length up to `LONGEST_PIPELINE`, with
    each number of stages of `INTERLEAVED`, in place of the config's.
    """
    shapes = [(run.parallel.pp, run.parallel.interleave)]
    if pipelines:
        lengths = [pp for pp in divisors(gpus) if pp <= LONGEST_PIPELINE]
        shapes = [(pp, n) for pp in lengths for n in INTERLEAVED if pp > 1 or n == 1]
    found = []
    for pp, interleave in shapes:
        for dp_replicate in divisors(gpus // pp) if gpus % pp == 0 else ():
            for ep in expert_ranks(gpus // pp // dp_replicate, run.model):
                asked = replace(
                    run.parallel,
                    pp=pp,
                    interleave=interleave,
                    dp_replicate=dp_replicate,
                    fsdp=0,
                    ep=ep,
                    cp=1,
                )
                candidate = _candidate(run, asked, gpu, gpus)
                if candidate is not None:
                    found.append(candidate)
    usable = USABLE * gpu.memory_gib * GIB
    return sorted(found, key=lambda candidate: (candidate.is_tight(usable), candidate.days))


def _candidate(run: RunConfig, asked: ParallelConfig, gpu: GPU, gpus: int) -> Candidate | None:
    """Return what a layout costs; None where it is impossible, or a stage does not fit."""
    try:
        asked.check(run.model)
        layout = asked.layout(gpus, run.model)
        check_layout(run, layout)
        check_exchange(run, layout, gpu)
        lengths = {stage.sequence_length for _, stage in run.stages.items() if stage.tokens}
        for length in sorted(lengths, reverse=True):  # the longest rows need most
            if not fit(run, layout_for(run, layout, length), gpu, length).fits:
                return None
    except ValueError:
        return None
    stages = plan_stages(run, layout, gpu)
    if not stages:
        return None
    longest = max(stages, key=lambda stage: stage.days[0])
    return Candidate(
        layout=layout,
        days=sum(stage.days[0] for stage in stages),
        memory=max(stage.memory["total"] for stage in stages),
        recompute=any(stage.recompute for stage in stages),
        binds=longest.binds,
    )


def gpus_of(run: RunConfig) -> int:
    """Return the GPUs that the config's layout asks for: their product, one where it leaves fsdp open."""
    p = run.parallel
    return p.pp * p.dp_replicate * (p.fsdp or p.ep * p.cp)


def names_no_layout(run: RunConfig) -> bool:
    """Return whether the config leaves the layout to the plan."""
    p = run.parallel
    default = ParallelConfig()
    return (p.pp, p.dp_replicate, p.fsdp, p.ep, p.cp) == (
        default.pp,
        default.dp_replicate,
        default.fsdp,
        default.ep,
        default.cp,
    )


def choose_layout(run: RunConfig, gpu: GPU, gpus: int) -> Layout:
    """Return the layout of the config, or where it names none the fastest that fits.

    Raises ValueError, in one line, for a layout that is impossible. Where nothing fits, experts are divided in each node.
    """
    if names_no_layout(run) and gpus > 1:
        found = search(run, gpu, gpus)
        if found:
            return found[0].layout
        experts = [ep for ep in divisors(gpus) if run.model.n_routed_experts % ep == 0]
        near = max(ep for ep in experts if ep <= gpu.per_node)
        layout = Layout(1, 1, gpus, near, 1)
    else:
        layout = run.parallel.layout(gpus, run.model)
    return layout


def what_would_fit(run: RunConfig, gpu: GPU, gpus: int, stages: list[StagePlan]) -> str:
    """Return one line: what does not fit and what would."""
    worst = max(stages, key=lambda stage: stage.memory["total"])
    usable = USABLE * gpu.memory_gib
    noun = "GPU" if gpus == 1 else "GPUs"
    shortage = (
        f"{run.name} on {gpus} {noun} of kind {gpu.name} needs {worst.memory['total'] / GIB:.1f} GiB "
        f"each in stage {worst.name}, {usable:.1f} are usable"
    )
    for more in (2**power for power in range(1, LARGEST_POWER + 1)):
        found = search(run, gpu, more) if more > gpus else []
        if found:
            return f"{shortage}; use --gpus {more} {words(found[0].layout)}"
    fixed = [term for term in worst.memory if term not in (*STATE_TERMS, "total")]
    largest = max(fixed, key=lambda term: worst.memory[term])
    return (
        f"{shortage}; more GPUs do not help, its {largest} take {worst.memory[largest] / GIB:.1f} GiB: "
        "lower --optimizer.microbatch_tokens or use GPUs with more memory"
    )


def why_not(run: RunConfig, layout: Layout, gpu: GPU, stages: list[StagePlan]) -> str | None:
    """Return one line: why a layout does not fit or is a waste, and what would do; None where it does."""
    if not all(stage.fits for stage in stages):
        return what_would_fit(run, gpu, layout.world, stages)
    try:
        check_layout(run, layout)
        check_exchange(run, layout, gpu)
    except ValueError as error:
        return str(error)
    return None


def plan(run: RunConfig, gpu: GPU, gpus: int = 0, dollars: float = 2.0) -> dict[str, Any]:
    """Plan a run on `gpus` GPUs of a kind: everything of this package, as a dict that JSON can hold.

    gpus: 0 for as many as the config's layout has. dollars: of one GPU-hour. `fits` is False, and `refusal`
    says in one line why and what would fit, for a layout that is impossible or too large for the memory.
    """
    gpus = gpus or gpus_of(run)
    result: dict[str, Any] = {
        "run": run.name,
        "gpu": gpu.name,
        "gpus": gpus,
        "gpu_memory_gib": gpu.memory_gib,
        "usable": int(USABLE * gpu.memory_gib * GIB),
        "parameters": count_parameters(run.model),
        "kv_cache_bytes_per_token": kv_cache_bytes_per_token(run.model),
        "serving": [row._asdict() for row in serving_table(run.model, gpu)],
        "fits": False,
        "refusal": None,
        "layout": None,
        "stages": [],
        "posttraining": [],
        "assumed": {
            "source": gpu.source,
            "peak_flops": gpu.flops,
            "kernel_share": KERNEL_SHARE,
            "nvlink_bytes_per_second": NVLINK_SHARE * gpu.nvlink,
            "network_bytes_per_second": NETWORK_SHARE * gpu.network,
            "expected_share_of_bound": EXPECTED,
            "routing": ROUTING,
            "answers": ANSWERS,
            "dollars_per_gpu_hour": dollars,
            "measured": False,
        },
    }
    try:
        layout = choose_layout(run, gpu, gpus)
        stages = plan_stages(run, layout, gpu)
        later = plan_posttraining(run, layout, gpu)
    except ValueError as error:
        return result | {"refusal": str(error)}
    result["layout"] = layout._asdict() | {"efsdp": layout.efsdp, "words": words(layout)}
    result["layout"]["chosen"] = names_no_layout(run) and gpus > 1
    result["stages"] = [vars(stage) for stage in stages]
    result["posttraining"] = [vars(stage) for stage in later]
    result["refusal"] = why_not(run, layout, gpu, stages)
    result["fits"] = result["refusal"] is None
    result["flops"] = sum(stage.tokens * stage.flops_per_token for stage in stages)
    for name in ("days", "gpu_hours"):
        result[name] = [sum(getattr(stage, name)[end] for stage in stages) for end in (0, 1)]
    result["dollars"] = [dollars * hours for hours in result["gpu_hours"]]
    return result
