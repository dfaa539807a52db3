"""Load a served model with streams, large bodies and small requests at once, and print what happened.

    python tests/stress_server.py --seconds 180 --streams 64

A tiny random model of 4,096 positions is served by `python -m minglm serve` in a process of its own. Meanwhile
- each stream asks for a chat answer, reads it to the end, and asks again;
- large bodies come one after the other: some megabytes that are refused, a prompt that just fits, a list of a million
  ids, a body of empty objects;
- small requests come ten times a second: /health, and a completion of one token. Their longest waits are what the run
  is for.

Exit status 1 if a stream broke off, an answer had a status that its request does not deserve, or /health waited longer
than --most seconds. Not part of the default run.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

MEGABYTES = 7_800_000
LARGE = (  # path, body, the only status that is right
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a" * MEGABYTES}]}, 400),
    ("/v1/completions", {"prompt": "order is cancelled " * 600, "max_tokens": 1}, 200),
    ("/v1/completions", {"prompt": [0] * 1_000_000}, 400),
    ("/v1/completions", {"prompt": [{}] * 1_000_000}, 400),
    ("/v1/completions", {"prompt": "a" * 2 * MEGABYTES}, 413),
)


class Tally:
    """What happened."""

    def __init__(self) -> None:
        self.streams = 0
        self.characters = 0
        self.large: Counter[str] = Counter()
        self.waits: dict[str, list[float]] = {"/health": [], "/v1/completions": []}
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


async def ask_small(client: httpx.AsyncClient, tally: Tally, end: float) -> None:
    """Ask ten times a second, and measure."""
    while time.monotonic() < end:
        started = time.perf_counter()
        answers = [await client.get("/health")]
        tally.waits["/health"].append(time.perf_counter() - started)
        started = time.perf_counter()
        body = {"prompt": "x", "max_tokens": 1}
        answers.append(await client.post("/v1/completions", json=body))
        tally.waits["/v1/completions"].append(time.perf_counter() - started)
        for answer in answers:
            if answer.status_code != 200:
                tally.faults.append(f"{answer.url}: {answer.status_code} {answer.text[:200]}")
        await asyncio.sleep(0.1)


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
            ask_small(client, tally, end),
        )
        tally.faults += [
            line
            for line in (await client.get("/metrics")).text.splitlines()
            if line.startswith("minglm_engine_failures_total") and not line.endswith(" 0")
        ]
    return tally


def save_model(folder: Path) -> None:
    """Write a tiny random model as a Hugging Face folder."""
    from helpers.scripted import word_tokenizer

    from minglm.testing.model import tiny_model

    tokenizer = word_tokenizer()
    model = tiny_model(0, vocab_size=tokenizer.vocab_size, max_position_embeddings=4096)
    model.save_pretrained(folder)
    tokenizer.save(folder / "tokenizer.json")


def report(tally: Tally, seconds: float, memory: int, most: float) -> int:
    """Print what happened, and return the exit status."""
    print(f"{tally.streams} streams in {seconds:.0f} s, {tally.characters:,} characters of events")
    for name, number in sorted(tally.large.items()):
        print(f"large: {name}, {number} times")
    for path, waits in tally.waits.items():
        middle = statistics.median(waits)
        print(f"{path}: {len(waits)} times, median {middle:.3f} s, longest {max(waits):.3f} s")
    print(f"largest memory of the server: {memory / 2**20:.0f} MiB")
    for fault in tally.faults[:20]:
        print(f"FAULT {fault}")
    return int(bool(tally.faults) or max(tally.waits["/health"]) > most)


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
            tally = asyncio.run(load(url, options.seconds, options.streams))
            status = Path(f"/proc/{server.pid}/status").read_text(encoding="utf-8")
            (peak,) = [line for line in status.splitlines() if line.startswith("VmHWM")]
            server.terminate()
            if server.wait(20) != 0:
                tally.faults.append(f"the server ended with status {server.returncode}")
        finally:
            server.kill()
    return report(tally, options.seconds, int(peak.split()[1]) * 1024, options.most)


if __name__ == "__main__":
    sys.exit(main())
