"""Load a served model with streams, large bodies and small requests at once, and print what happened.

    python tests/stress_server.py --seconds 180 --streams 64

A tiny random model of 4,096 positions is served by `python -m minglm serve` in a process of its own. Meanwhile
- each stream asks for a chat answer, reads it to the end, and asks again;
- large bodies come one after the other: some megabytes that are refused, a prompt that just fits, a list of a million
  ids, a body of empty objects;
- small requests come ten times a second: /health, and a completion of one token. Their longest waits are what the run
  is for. They come from a process of their own: one that reads 64 streams is too busy to measure.

The clients have one core, and the server has the others.

Exit status 1 if a stream broke off, an answer had a status that its request does not deserve, or a small request waited
longer than --most seconds. Not part of the default run: it says something only where nothing else runs.
"""

import argparse
import asyncio
import http.client
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import httpx

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

MEGABYTES = 7_800_000
LARGE = (  # path, body, the only status that is right
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a" * MEGABYTES}]}, 400),
    ("/v1/completions", {"prompt": "order is cancelled " * 600, "max_tokens": 1}, 200),
    ("/v1/completions", {"prompt": [0] * 1_000_000}, 400),
    ("/v1/completions", {"prompt": [{}] * 1_000_000}, 413),
    ("/v1/completions", {"prompt": [[]] * 1_500_000}, 413),
    ("/v1/completions", {"prompt": "a" * 2 * MEGABYTES}, 413),
)
SMALL = {"/health": None, "/v1/completions": b'{"prompt": "x", "max_tokens": 1}'}
"""Path, and body if it is posted."""


class Small(NamedTuple):
    """What small requests met."""

    waits: dict[str, list[float]]
    """Seconds, by path."""
    faults: list[str]


class Tally:
    """What happened to streams and large bodies."""

    def __init__(self) -> None:
        self.streams = 0
        self.characters = 0
        self.large: Counter[str] = Counter()
        self.faults: list[str] = []


async def stream(client: httpx.AsyncClient, tally: Tally, end: float, number: int) -> None:
    """Read one answer after the other."""
    turn = 0
    while time.monotonic() < end:
        turn += 1
        body = {
            "messages": [{"role": "user", "content": f"stream {number}"}],
            "stream": True,
            "max_tokens": 200,
            "ignore_eos": True,
            "seed": number * 1000 + turn,
        }
        last = ""
        async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            async for line in answer.aiter_lines():
                if line.startswith("data: "):
                    last = line
                    tally.characters += len(line)
                    if '"error"' in line:
                        tally.faults.append(f"stream {number}: {line[:200]}")
        if answer.status_code != 200 or last != "data: [DONE]":
            tally.faults.append(f"stream {number}: status {answer.status_code}, last {last[:200]}")
        tally.streams += 1


async def send_large(client: httpx.AsyncClient, tally: Tally, end: float) -> None:
    """Send one large body after the other."""
    bodies = [(path, json.dumps(body).encode(), right) for path, body, right in LARGE]
    headers = {"content-type": "application/json"}
    while time.monotonic() < end:
        for path, body, right in bodies:
            answer = await client.post(path, content=body, headers=headers)
            tally.large[f"{len(body)} bytes: {answer.status_code}"] += 1
            if answer.status_code != right:
                tally.faults.append(f"{len(body)} bytes: {answer.status_code}, not {right}")


def ask_small(url: str, seconds: float) -> Small:
    """Ask ten times a second, and measure."""
    small = Small({path: [] for path in SMALL}, [])
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=120)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for path, body in SMALL.items():
            started = time.perf_counter()
            method = "GET" if body is None else "POST"
            connection.request(method, path, body, {"content-type": "application/json"})
            answer = connection.getresponse()
            text = answer.read()
            small.waits[path].append(time.perf_counter() - started)
            if answer.status != 200:
                small.faults.append(f"{path}: {answer.status} {text[:200]!r}")
        time.sleep(0.1)
    return small


async def load(url: str, seconds: float, streams: int) -> Tally:
    """Do all of it for some seconds."""
    tally = Tally()
    end = time.monotonic() + seconds
    limits = httpx.Limits(max_connections=streams + 8)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        await asyncio.gather(
            *(stream(client, tally, end, number) for number in range(streams)),
            send_large(client, tally, end),
            send_large(client, tally, end),
        )
        tally.faults += [
            line
            for line in (await client.get("/metrics")).text.splitlines()
            if line.startswith("minglm_engine_failures_total") and not line.endswith(" 0")
        ]
    return tally


def share_cores(server: int) -> None:
    """Keep this process, and those that it starts, on one core, and the server's process on the others."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) > 1:
        for thread in Path(f"/proc/{server}/task").iterdir():
            os.sched_setaffinity(int(thread.name), cores[:-1])
        os.sched_setaffinity(0, cores[-1:])


def save_model(folder: Path) -> None:
    """Write a tiny random model as a Hugging Face folder."""
    from helpers.scripted import word_tokenizer

    from minglm.testing.model import tiny_model

    tokenizer = word_tokenizer()
    model = tiny_model(0, vocab_size=tokenizer.vocab_size, max_position_embeddings=4096)
    model.save_pretrained(folder)
    tokenizer.save(folder / "tokenizer.json")


def report(tally: Tally, small: Small, seconds: float, memory: int, most: float) -> int:
    """Print what happened, and return the exit status."""
    print(f"{tally.streams} streams in {seconds:.0f} s, {tally.characters:,} characters of events")
    for name, number in sorted(tally.large.items()):
        print(f"large: {name}, {number} times")
    for path, waits in small.waits.items():
        middle = statistics.median(waits)
        print(f"{path}: {len(waits)} times, median {middle:.3f} s, longest {max(waits):.3f} s")
    print(f"largest memory of the server: {memory / 2**20:.0f} MiB")
    faults = tally.faults + small.faults
    for fault in faults[:20]:
        print(f"FAULT {fault}")
    longest = max(max(waits) for waits in small.waits.values())
    return int(bool(faults) or longest > most)


def main() -> int:
    """Serve, load, stop, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--most", type=float, default=0.5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="stress-") as name:
        folder = Path(name) / "tiny"
        save_model(folder)
        words = [sys.executable, "-m", "minglm", "serve", str(folder), "--port", "0"]
        words += ["--device", "cpu", "--max-batch", str(options.streams + 16)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        server = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True)
        try:
            lines = [server.stdout.readline() for _ in range(2)]
            url = lines[1].split()[-1]
            share_cores(server.pid)
            with multiprocessing.get_context("spawn").Pool(1) as other:
                asking = other.apply_async(ask_small, (url, options.seconds))
                tally = asyncio.run(load(url, options.seconds, options.streams))
                small = asking.get()
            status = Path(f"/proc/{server.pid}/status").read_text(encoding="utf-8")
            (peak,) = [line for line in status.splitlines() if line.startswith("VmHWM")]
            server.terminate()
            if server.wait(20) != 0:
                tally.faults.append(f"the server ended with status {server.returncode}")
        finally:
            server.kill()
    return report(tally, small, options.seconds, int(peak.split()[1]) * 1024, options.most)


if __name__ == "__main__":
    sys.exit(main())
