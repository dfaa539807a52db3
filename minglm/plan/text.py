"""Print a plan: one block a question, no line longer than a terminal is wide (no section in the paper)."""

from collections.abc import Mapping, Sequence
from typing import Any

from minglm.plan.layout import words
from minglm.plan.memory import ESTIMATES, GIB
from minglm.plan.summary import Candidate


def size(number: float, unit: str = "") -> str:
    """Format a number with four digits and its thousands: 355B, 32.1B, 512K."""
    billions = "G" if unit else "B"
    for power, letter in ((12, "T"), (9, billions), (6, "M"), (3, "K")):
        if abs(number) >= 10**power:
            return f"{number / 10**power:.4g}{letter}{unit}"
    return f"{number:.4g}{unit}"


def between(ends: Sequence[float], form: str = "") -> str:
    """Format a range by its two ends, with three digits or whole numbers unless `form` says otherwise."""
    return " to ".join(f"{end:{form or (',.0f' if end >= 100 else '.3g')}}" for end in ends)


def render(plan: Mapping[str, Any]) -> str:
    """Format a plan as text."""
    lines = [f"{plan['run']} on {plan['gpus']:,} x {plan['gpu']} ({plan['gpu_memory_gib']:g} GiB)"]
    lines += ["", "parameters"]
    count = plan["parameters"]
    lines += [f"  {name:<24}{count[name]:>22,}" for name in count]
    lines += ["", *_layout_lines(plan)]
    if plan["stages"]:
        lines += ["", *_memory_lines(plan), "", *_stage_lines(plan), "", *_step_lines(plan)]
        lines += ["", *_posttraining_lines(plan)]
    lines += ["", *_serving_lines(plan)]
    if plan["stages"]:
        lines += ["", *_cost_lines(plan)]
    if plan["refusal"]:
        lines += ["", f"does not fit: {plan['refusal']}"]
    return "\n".join(lines)


def _layout_lines(plan: Mapping[str, Any]) -> list[str]:
    layout = plan["layout"]
    if layout is None:
        return ["layout: none"]
    chosen = "the fastest that fits, see --search" if layout["chosen"] else "the config's"
    return [f"layout: {layout['words']}  ({chosen}; efsdp {layout['efsdp']})"]


def _memory_lines(plan: Mapping[str, Any]) -> list[str]:
    stage = max(plan["stages"], key=lambda stage: stage["memory"]["total"])
    lines = [f"memory per GPU in stage {stage['name']} (* estimate)"]
    for name, value in stage["memory"].items():
        star = "*" if name in ESTIMATES else " "
        lines.append(f"  {name + ' ' + star:<24}{value / GIB:>18.3f} GiB")
    lines.append(f"  {'usable':<24}{plan['usable'] / GIB:>18.3f} GiB")
    lines.append(
        f"  micro-batch of {stage['tokens_per_gpu']:,} tokens, {_rows(stage['cp'])}, "
        f"activations {'recomputed' if stage['recompute'] else 'kept'}"
    )
    return lines


def _rows(cp: int) -> str:
    return "whole rows" if cp == 1 else f"a part of rows that {cp} GPUs share"


def _stage_lines(plan: Mapping[str, Any]) -> list[str]:
    lines = [
        "expected, not measured (lowest to highest)",
        f"{'stage':<16}{'tokens':>7}{'length':>9}{'cp':>4}{'GiB':>7}{'FLOPs/token':>13}"
        f"{'MFU':>12}{'tokens/s/GPU':>24}{'days':>22}",
    ]
    for stage in plan["stages"]:
        low, high = stage["mfu"]
        mfu = f"{low:.0%} to {high:.0%}"
        lines.append(
            f"{stage['name']:<16}{size(stage['tokens']):>7}{stage['sequence_length']:>9,}{stage['cp']:>4}"
            f"{stage['memory']['total'] / GIB:>7.1f}{size(stage['flops_per_token']):>13}{mfu:>12}"
            f"{between(stage['tokens_per_second_per_gpu']):>24}{between(stage['days']):>22}"
        )
    if len({stage["cp"] for stage in plan["stages"]}) > 1:
        lines.append(
            "cp differs: run each stage with --until STAGE and its --parallel.cp; the run continues in any layout"
        )
        if plan["layout"]["pp"] > 1:
            lines.append(
                "rows that are shared go through no pipeline: there its ranks shard the weights too (--parallel.pp 1)"
            )
    return lines


def _step_lines(plan: Mapping[str, Any]) -> list[str]:
    """Return what a step of the longest stage is made of."""
    stage = max(plan["stages"], key=lambda stage: stage["days"][0])
    seconds = stage["seconds"]
    lines = [
        f"a step of {stage['name']} at the bound: {stage['microbatches']} micro-batches, "
        f"{size(stage['step_tokens'])} tokens, {seconds['step']:.3g} s; binds: {stage['binds']}"
    ]
    lines.append(f"  {'products':<32}{'':>12}{seconds['products']:>12.4f} s a micro-batch")
    for name, moved in stage["traffic"].items():
        hidden = (
            ""
            if name.startswith(("exchange", "context", "stages"))
            else ", hidden where products last longer"
        )
        lines.append(f"  {name:<32}{size(moved, 'B'):>12}{seconds[name]:>12.4f} s{hidden}")
    lines.append(f"  {'optimizer':<32}{'':>12}{seconds['optimizer']:>12.4f} s a step")
    if seconds["tensor parallelism"]:
        lines.append(
            f"  left out: tensor parallelism in a node, which would add {seconds['tensor parallelism']:.3g} s to each "
            "micro-batch, not hidden"
        )
    return lines


def _posttraining_lines(plan: Mapping[str, Any]) -> list[str]:
    """Return the stages of post-training: assumed conversations, at the speed of a training step."""
    shortest, longest = plan["assumed"]["answers"]
    lines = [
        f"post-training, if conversations have {shortest:.0%} to {longest:.0%} of the longest answer",
        f"{'stage':<18}{'tokens':>16}{'length':>9}{'cp':>4}{'GiB':>7}{'tokens/s/GPU':>24}{'days':>22}{'GPU-hours':>24}",
    ]
    for stage in plan["posttraining"]:
        tokens = " to ".join(size(end) for end in stage["tokens"])
        lines.append(
            f"{stage['name']:<18}{tokens:>16}{stage['sequence_length']:>9,}{stage['cp']:>4}"
            f"{stage['memory'] / GIB:>7.1f}{between(stage['tokens_per_second_per_gpu']):>24}"
            f"{between(stage['days']):>22}{between(stage['gpu_hours']):>24}"
        )
    too_large = [stage["name"] for stage in plan["posttraining"] if not stage["fits"]]
    if too_large:
        lines.append(f"does not fit: {', '.join(too_large)}")
        engine = max(stage["engine"] for stage in plan["posttraining"])
        if engine:
            lines.append(
                f"{engine / GIB:.1f} GiB are the weights of an engine in each rank; --rollout_engine URL names one of its own"
            )
    return lines


def _serving_lines(plan: Mapping[str, Any]) -> list[str]:
    cache = plan["kv_cache_bytes_per_token"]
    lines = [
        f"serving 8 requests with vLLM or SGLang (estimate; cache {cache:,} bytes a token in bfloat16)",
        f"{'weights':<16}{'context':>10}{'GPUs':>8}{'weights GiB':>14}{'cache GiB':>12}",
    ]
    for row in plan["serving"]:
        lines.append(
            f"{row['precision']:<16}{row['context']:>10,}{row['gpus']:>8}{row['weights'] / GIB:>14,.1f}{row['cache'] / GIB:>12,.1f}"
        )
    return lines


def _cost_lines(plan: Mapping[str, Any]) -> list[str]:
    assumed = plan["assumed"]
    return [
        f"{plan['flops']:.3g} FLOPs: {between(plan['days'])} days, {between(plan['gpu_hours'])} GPU-hours, "
        f"${between(plan['dollars'])} at ${assumed['dollars_per_gpu_hour']:g} each",
        f"expected at {between(assumed['expected_share_of_bound'], '.0%')} of the bound; "
        f"routing with {assumed['routing']}",
        f"the bound: {assumed['kernel_share']:.0%} of {assumed['peak_flops']:.3g} FLOP/s in products, "
        f"{size(assumed['nvlink_bytes_per_second'], 'B/s')} within a node, "
        f"{size(assumed['network_bytes_per_second'], 'B/s')} between nodes",
        f"data sheet: {assumed['source']}; no run produced these numbers",
    ]


def render_search(found: Sequence[Candidate], usable: float, gpus: int, best: int = 8) -> str:
    """Format the best layouts of a search as text. usable: bytes of a GPU's memory."""
    if not found:
        return f"no layout of {gpus:,} GPUs fits"
    lines = [
        f"{len(found)} layouts of {gpus:,} GPUs fit; the fastest, those that leave little memory last",
        f"{'days':>10}{'GiB':>8}  {'binds':<22}layout",
    ]
    for candidate in found[:best]:
        tight = ", tight" if candidate.is_tight(usable) else ""
        lines.append(
            f"{candidate.days:>10.4g}{candidate.memory / GIB:>8.1f}  {candidate.binds:<22}{words(candidate.layout)}{tight}"
        )
    return "\n".join(lines)
