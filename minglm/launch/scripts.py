"""Write the script that starts a job: bash with torchrun, a Slurm batch script, or Kubernetes objects (no section).

What all three do:

    rendezvous   the nodes meet at the first one, port 29500; torchrun gives each rank its number
    settings     one thread per rank and core share, expandable memory segments, and NCCL's warnings in the log
    resume       SIGTERM two minutes before the end: the run saves between two steps and stops; started again, it continues
    restart      after a rank that died torchrun starts all of them again, `RESTARTS` times: they resume on the same nodes
    again        a job that failed or was preempted is put back into the queue, `AGAIN` times at most

A script holds no secret and no path but those that were given. It is plain: read it before you start it, and
change what your cluster needs, such as NCCL_SOCKET_IFNAME.
"""

import json
import shlex
from typing import Any

from minglm.launch.job import Job

PORT = 29500
RESTARTS = 3
"""How often torchrun starts all ranks again. A mistake in the config fails as often, within a minute."""
AGAIN = 20
"""How often a job is started again."""
GRACE_SECONDS = 120
"""Time for a last checkpoint."""
SETTINGS = {
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",  # less fragmentation
    "NCCL_DEBUG": "WARN",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",  # a rank that fails ends the others, instead of a hang
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # ranks that are started again find one another anew
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "110",  # torchrun would wait 30 s for a last checkpoint
    "PYTHONUNBUFFERED": "1",
}
"""Environment of every rank."""
CHECK_LINES = [
    "# First on a new cluster: with MINGLM_CHECK=1 in its environment this script measures the links of every axis",
    "# instead, to compare with what `minglm plan` assumes.",
]
"""The comment that says what to run first."""


def torchrun_script(job: Job) -> str:
    """Return a bash script for one node, or to be started on each of several."""
    lines = ["#!/usr/bin/env bash", f"# {job.name}: {_where(job)}."]
    if job.nodes > 1:
        lines += [
            "# Start it on every node, with the name of the first:",
            "#     MASTER_ADDR=FIRST_NODE bash THIS_SCRIPT",
            "# MASTER_ADDR must be reachable from all nodes.",
        ]
    lines += [
        *CHECK_LINES,
        "set -euo pipefail",
        "",
        *_exports(),
        _threads(job),
        "",
        *_torchrun_lines(job, '"${MASTER_ADDR:-localhost}"'),
        "",
        *_measure_first(job),
        *[f"minglm {shlex.join(command)}" for command in job.commands],
    ]
    return "\n".join(lines) + "\n"


def slurm_script(
    job: Job, hours: float, partition: str | None = None, account: str | None = None
) -> str:
    """Return a batch script for sbatch. hours: limit of one job; a run longer than that is queued again."""
    minutes = max(1, round(hours * 60))
    directives = [
        f"--job-name={job.name}",
        f"--nodes={job.nodes}",
        "--ntasks-per-node=1",
        f"--gpus-per-node={job.per_node}",
        "--exclusive",
        f"--time={minutes}",
        f"--signal=TERM@{GRACE_SECONDS}",
        "--requeue",
        "--open-mode=append",
        f"--output={job.name}-%j.log",
    ]
    if partition:
        directives.append(f"--partition={partition}")
    if account:
        directives.append(f"--account={account}")
    lines = ["#!/usr/bin/env bash", *[f"#SBATCH {directive}" for directive in directives]]
    lines += [
        f"# {job.name}: {_where(job)}. sbatch THIS_SCRIPT",
        *CHECK_LINES,
        "set -euo pipefail",
        "",
        *_exports(),
        _threads(job),
        'first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        "",
        *_torchrun_lines(job, '"$first_node"', before="srun --kill-on-bad-exit=1 "),
        "",
        "# Failed or out of time: back into the queue, to continue from the last checkpoint.",
        "# What fails in its first minutes is a mistake, and would fail again.",
        "again() {",
        "    status=$?",
        '    if [ "$status" -ne 0 ] && [ "$SECONDS" -gt 300 ] && '
        f'[ "${{SLURM_RESTART_COUNT:-0}}" -lt {AGAIN} ]; then',
        '        scontrol requeue "$SLURM_JOB_ID"',
        "    fi",
        "}",
        *_measure_first(job),
        "trap again EXIT",
        *[f"minglm {shlex.join(command)}" for command in job.commands],
    ]
    return "\n".join(lines) + "\n"


def kubernetes_objects(job: Job, image: str, claim: str) -> str:
    """Return a headless Service and an indexed Job as one List, in JSON, which kubectl reads as it reads YAML.

    image: a container image with minglm installed. claim: a PersistentVolumeClaim that all nodes can write,
    mounted at the working folder, with the configs and the runs in it.
    """
    labels = {"app": job.name}
    script = "\n".join(
        [
            "set -euo pipefail",
            _threads(job),
            *_torchrun_lines(job, '"$MASTER_ADDR"', forward=True),
            *_measure_first(job),
            *[f"minglm {shlex.join(command)}" for command in job.commands],
        ]
    )
    environment = [{"name": name, "value": value} for name, value in SETTINGS.items()]
    # An indexed Job gives its pods the host names NAME-0, NAME-1, ... below the Service.
    environment.append({"name": "MASTER_ADDR", "value": f"{job.name}-0.{job.name}"})
    container = {
        "name": "minglm",
        "image": image,
        "workingDir": "/workspace",
        "command": ["bash", "-c", script],
        "env": environment,
        "ports": [{"containerPort": PORT}],
        "resources": {"limits": {"nvidia.com/gpu": job.per_node}},
        "volumeMounts": [
            {"name": "workspace", "mountPath": "/workspace"},
            {"name": "shared-memory", "mountPath": "/dev/shm"},
        ],
    }
    pod = {
        "subdomain": job.name,
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "containers": [container],
        "volumes": [
            {"name": "workspace", "persistentVolumeClaim": {"claimName": claim}},
            {"name": "shared-memory", "emptyDir": {"medium": "Memory"}},
        ],
    }
    about = {"minglm/about": f"{_where(job)}. First: {shlex.join(['minglm', *job.check])}"}
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": job.name, "labels": labels},
        "spec": {
            "clusterIP": "None",
            # Pods must find each other before they are ready: they become ready by finding each other.
            "publishNotReadyAddresses": True,
            "selector": labels,
            "ports": [{"name": "rendezvous", "port": PORT}],
        },
    }
    batch = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": job.name, "labels": labels, "annotations": about},
        "spec": {
            "completionMode": "Indexed",
            "completions": job.nodes,
            "parallelism": job.nodes,
            "backoffLimit": AGAIN * job.nodes,
            "template": {"metadata": {"labels": labels}, "spec": pod},
        },
    }
    objects: dict[str, Any] = {"apiVersion": "v1", "kind": "List", "items": [service, batch]}
    return json.dumps(objects, indent=2) + "\n"


def _where(job: Job) -> str:
    """Say on what a job runs."""
    if job.nodes == 1:
        return f"one node, {job.per_node} GPU{'s' if job.per_node > 1 else ''}"
    return f"{job.nodes} nodes of {job.per_node} GPUs"


def _measure_first(job: Job) -> list[str]:
    """Return the lines that measure the links, and end, where MINGLM_CHECK is set."""
    return [
        'if [ -n "${MINGLM_CHECK:-}" ]; then',
        f"    minglm {shlex.join(job.check)}",
        "    exit",
        "fi",
    ]


def _exports() -> list[str]:
    """Return the lines that set the environment."""
    return [f"export {name}={shlex.quote(value)}" for name, value in SETTINGS.items()]


def _threads(job: Job) -> str:
    """Return the line that divides the cores of a node among its ranks; torchrun alone would give each one thread."""
    return f'export OMP_NUM_THREADS="${{OMP_NUM_THREADS:-$(( ($(nproc) + {job.per_node} - 1) / {job.per_node} ))}}"'


def _torchrun_lines(
    job: Job, first_node: str, before: str = "", forward: bool = False
) -> list[str]:
    """Return the shell function `minglm`, which starts a verb on every GPU.

    before: words in front of torchrun. forward: pass SIGTERM on to it, which a shell alone in a container does not.
    """
    ranks = f"--nnodes {job.nodes} --nproc-per-node {job.per_node} --max-restarts {RESTARTS}"
    meet = f"--rdzv-backend c10d --rdzv-endpoint {first_node}:{PORT} --rdzv-id {job.name}"
    if job.nodes == 1:
        meet = "--standalone"
    start = [
        f"    {before}python -m torch.distributed.run {ranks} \\",
        f"        {meet} \\",
    ]
    if not forward:
        return ["minglm() {", *start, '        -m minglm "$@"', "}"]
    return [
        "minglm() {",
        *start,
        '        -m minglm "$@" &',
        "    child=$!",
        '    wait "$child"',
        "}",
        """trap 'kill -TERM "$child"; wait "$child"; exit 143' TERM""",
    ]
