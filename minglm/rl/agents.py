"""Keep the processes of outside agents running, as many as the config says (paper 3.5).

They get the endpoint's address in MINGLM_ENDPOINT, and a key that every client library is content with. An
agent that ends is started again, at most `MOST_STARTS` times without a finished session in between.
"""

import contextlib
import os
import shlex
import signal
import subprocess
from pathlib import Path

from minglm.envs.base import Misconfigured

MOST_STARTS = 5
"""Times that agents are started again, without a finished session in between."""


class Agents:
    """The processes of outside agents. Their output goes to FOLDER/agent_N.txt."""

    def __init__(self, command: str, processes: int, url: str, folder: Path) -> None:
        self.command = command
        self.url = url
        self.starts = 0
        folder.mkdir(parents=True, exist_ok=True)
        self.outputs = [folder / f"agent_{number}.txt" for number in range(processes)]
        self.running = [self._start(output) for output in self.outputs]

    def _start(self, output: Path) -> "subprocess.Popen[bytes]":
        keys = {"OPENAI_API_KEY": "none", "ANTHROPIC_API_KEY": "none"}
        environment = {**os.environ, **keys, "MINGLM_ENDPOINT": self.url}
        try:
            with open(output, "ab") as file:
                return subprocess.Popen(
                    shlex.split(self.command),
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=file,
                    start_new_session=True,
                )
        except (OSError, ValueError) as error:
            raise ValueError(f"outside.command = {self.command!r}: {error}") from None

    def keep_running(self) -> None:
        """Start agents again that have ended. Raises Misconfigured where that leads nowhere."""
        for number, process in enumerate(self.running):
            if process.poll() is None:
                continue
            self.starts += 1
            if self.starts > MOST_STARTS:
                lines = (
                    self.outputs[number]
                    .read_text(encoding="utf-8", errors="replace")
                    .strip()
                    .splitlines()
                )
                last = lines[-1] if lines else "it says nothing"
                raise Misconfigured(
                    f"outside.command = {self.command!r}: the agent ends with status {process.returncode} "
                    f"before it finishes a task: {last:.200}"
                )
            self.running[number] = self._start(self.outputs[number])

    def close(self) -> None:
        """End the agents, and what they have started."""
        for process in self.running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
