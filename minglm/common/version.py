"""Name the versions that a record was made with: commit, packages, machine (no section in the paper)."""

import contextlib
import subprocess
import sys
import time
from pathlib import Path

from minglm.common.threads import threads_in_use


def versions():
    """Versions, device and commit, for the head of a log or report."""
    import numpy as np
    import torch

    return {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "numpy": np.__version__,
        "threads": threads_in_use(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "commit": commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def commit():
    """The git commit of this source tree, with a plus when it has changes; 'unknown' outside a checkout."""
    here = Path(__file__).parent
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        run = {"cwd": here, "capture_output": True, "text": True, "timeout": 10, "check": True}
        head = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], **run).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "-uno"], **run).stdout.strip()
        return head + ("+" if changed else "")
    return "unknown"
