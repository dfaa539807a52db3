"""Count what the server does, and print it as Prometheus text (no section in the paper)."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
"""Upper bounds of the histograms' buckets; one more bucket takes the rest."""


class Metric(NamedTuple):
    """The declaration of a metric."""

    type: str
    """Prometheus' word: counter, gauge or histogram."""
    help: str


METRICS = {
    "minglm_requests_total": Metric(
        "counter", "Requests by endpoint and HTTP status; 499: the client went away."
    ),
    "minglm_prompt_tokens_total": Metric("counter", "Tokens of the prompts that were answered."),
    "minglm_generation_tokens_total": Metric("counter", "Tokens that were sampled for clients."),
    "minglm_finished_total": Metric("counter", "Choices by finish reason."),
    "minglm_format_errors_total": Metric(
        "counter", "Choices that broke the chat format, by fault."
    ),
    "minglm_engine_failures_total": Metric("counter", "Forward passes of the engine that failed."),
    "minglm_open_answers": Metric("gauge", "Choices that are being answered or are waiting."),
    "minglm_open_answers_limit": Metric(
        "gauge", "Choices beyond this number are refused with status 429."
    ),
    "minglm_first_token_seconds": Metric("histogram", "From the request to its first token."),
    "minglm_request_seconds": Metric("histogram", "From the request to the end of its response."),
}

Labels = tuple[tuple[str, object], ...]


@dataclass
class Histogram:
    """Observations counted by bucket."""

    buckets: list[int] = field(default_factory=lambda: [0] * (len(SECONDS) + 1))
    total: float = 0.0
    """Their sum, in seconds."""


class Metrics:
    """Counters and histograms, by name and labels. All calls come from the event loop."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, Labels]] = Counter()
        self.histograms: dict[str, Histogram] = {}

    def count(self, name: str, by: int = 1, **labels: object) -> None:
        """Add to a counter."""
        self.counts[name, tuple(sorted(labels.items()))] += by

    def time(self, name: str, seconds: float) -> None:
        """Add an observation to a histogram."""
        histogram = self.histograms.setdefault(name, Histogram())
        histogram.buckets[bisect_left(SECONDS, seconds)] += 1
        histogram.total += seconds

    def text(self, **values: float) -> str:
        """Return the exposition format, version 0.0.4. values: of the gauges and of counters kept elsewhere."""
        lines: list[str] = []
        for name, metric in METRICS.items():
            lines.append(f"# HELP {name} {metric.help}")
            lines.append(f"# TYPE {name} {metric.type}")
            if name in values:
                lines.append(f"{name} {values[name]}")
            for (counted, labels), value in sorted(self.counts.items()):
                if counted == name:
                    lines.append(f"{name}{_braces(labels)} {value}")
            if name in self.histograms:
                lines += self._histogram(name)
        return "\n".join(lines) + "\n"

    def _histogram(self, name: str) -> Iterator[str]:
        histogram = self.histograms[name]
        below = 0  # Prometheus' buckets are cumulative
        for bound, number in zip((*SECONDS, "+Inf"), histogram.buckets, strict=True):
            below += number
            yield f'{name}_bucket{{le="{bound}"}} {below}'
        yield f"{name}_sum {histogram.total:.6f}"
        yield f"{name}_count {below}"


def _braces(labels: Labels) -> str:
    """Return the labels of a sample in braces, or nothing if it has none."""
    if not labels:
        return ""
    return "{" + ",".join(f'{key}="{_escaped(str(value))}"' for key, value in labels) + "}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
