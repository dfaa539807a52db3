"""The verb `launch`: write the script that starts a config on many GPUs, or rehearse it without any (paper 2.4)."""

import argparse
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from minglm.cli.arguments import add_config, file, folder, number, refuse_idle, whole, word

if TYPE_CHECKING:
    from minglm.config import RunConfig
    from minglm.launch.job import Job
    from minglm.plan.gpus import GPU

HOURS = 24.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `launch`."""
    from minglm.plan.gpus import GPUS

    add_config(parser, example="configs/glm45_355b.py:h100x512")
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--torchrun", action="store_true", help="a bash script that starts torchrun")
    kind.add_argument("--slurm", action="store_true", help="a batch script for sbatch")
    kind.add_argument("--kubernetes", action="store_true", help="a Service and a Job for kubectl")
    kind.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything that needs no GPU, and rehearse a step of every rank in this process",
    )
    parser.add_argument(
        "--gpus", type=whole(1, 10**6), default=0, help="number of GPUs (default: the config's)"
    )
    parser.add_argument("--gpu", choices=list(GPUS), default="h100", help="kind of GPU")
    parser.add_argument(
        "--gpus-per-node", type=whole(1, 10**4), help="GPUs of a node, if other than usual"
    )
    parser.add_argument("--out", type=folder, help="folder of the run (default: runs/NAME)")
    parser.add_argument(
        "--until", metavar="STAGE", help="stop after this stage of pre- or mid-training"
    )
    parser.add_argument(
        "--stage",
        metavar="STAGE",
        help="--dry-run: rehearse this stage only (default: one for each length of rows)",
    )
    parser.add_argument(
        "--script", type=file, metavar="FILE", help="write the script here (default: print it)"
    )
    parser.add_argument(
        "--hours",
        type=number(0, 10**4, above=True),
        help=f"Slurm: limit of one job (default: {HOURS})",
    )
    parser.add_argument("--partition", type=word, help="Slurm: partition")
    parser.add_argument("--account", type=word, help="Slurm: account")
    parser.add_argument("--image", type=word, help="Kubernetes: container image with minglm")
    parser.add_argument(
        "--claim", type=word, help="Kubernetes: PersistentVolumeClaim with configs and runs"
    )


def main(args: argparse.Namespace) -> None:
    """Write the script that starts CONFIG on a cluster: nodes, rendezvous, settings, resume.

    Starts nothing itself.

    --dry-run builds the whole model on all ranks instead, without memory and without numbers, and tells what each holds.

    Refuses a plan that does not fit. The script says what to run first on a new cluster.
    """
    from minglm.common.files import atomic_path
    from minglm.config import load_config
    from minglm.launch import scripts
    from minglm.launch.job import make_job
    from minglm.plan.gpus import GPUS

    if not args.dry_run:
        refuse_idle({"--stage": args.stage}, "without --dry-run")
    else:
        refuse_idle({"--script": args.script}, "with --dry-run")
    if not args.slurm:
        slurm = {"--hours": args.hours, "--partition": args.partition, "--account": args.account}
        refuse_idle(slurm, "without --slurm")
    if not args.kubernetes:
        refuse_idle({"--image": args.image, "--claim": args.claim}, "without --kubernetes")
    run = load_config(args.config, args.overrides)
    gpu = GPUS[args.gpu]
    if args.gpus_per_node:
        gpu = replace(gpu, per_node=args.gpus_per_node)
    out = args.out or f"runs/{run.name}"
    until = args.until
    if args.dry_run and until is None:  # a rehearsal is of stages of pre- and mid-training
        until = [name for name, stage in run.stages.items() if stage.tokens][-1]
    job = make_job(run, args.config, args.overrides, out, gpu, args.gpus, until)
    if args.dry_run:
        _rehearse(run, gpu, job, args.stage)
        return
    if args.kubernetes:
        if not args.image or not args.claim:
            raise ValueError("--kubernetes needs --image and --claim; see --help")
        text = scripts.kubernetes_objects(job, args.image, args.claim)
    elif args.slurm:
        text = scripts.slurm_script(job, args.hours or HOURS, args.partition, args.account)
    else:
        text = scripts.torchrun_script(job)
    if args.script:
        with atomic_path(args.script) as temporary:
            temporary.write_text(text, encoding="utf-8")
        print(args.script, file=sys.stderr)
    else:
        print(text, end="")


def _rehearse(run: "RunConfig", gpu: "GPU", job: "Job", only: str | None) -> None:
    """Check sources and files, and rehearse a step of one stage, or of the first with each length of rows."""
    from minglm.config.overrides import override
    from minglm.launch.rehearsal import rehearse, render
    from minglm.plan.gpus import USABLE
    from minglm.plan.memory import GIB
    from minglm.recipe.inputs import check_data

    check_data(run)
    usable = USABLE * gpu.memory_gib * GIB
    names = [stage for stage, _ in job.stages]
    if only is not None and only not in names:
        raise ValueError(f"--stage {only}: no such stage; the stages are {', '.join(names)}")
    seen: set[int] = set()
    for stage, words in job.stages:
        if only is not None and stage != only:
            continue
        laid_out = override(run, words)
        length = dict(run.stages.items())[stage].sequence_length
        if length in seen:
            continue
        seen.add(length)
        layout = laid_out.parallel.layout(job.gpus, run.model)
        print(
            f"{stage}, rows of {length:,} tokens, {job.gpus:,} ranks, {' '.join(words)}", flush=True
        )
        for rank in sorted({0, layout.pp - 1}):  # the stages with embedding and head
            if layout.pp > 1:
                print(f"rank {rank} of the pipeline's {layout.pp}")
            print(render(rehearse(laid_out, layout, stage, rank), usable), flush=True)
