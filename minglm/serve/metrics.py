"""What a server counts, as Prometheus text (no section in the paper)."""

from bisect import bisect_left
from collections import Counter

SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)

HELP = {
    "minglm_requests_total": (
        "counter",
        "Requests by endpoint and HTTP status; 499: the client went away.",
    ),
    "minglm_prompt_tokens_total": ("counter", "Tokens of the prompts that were answered."),
    "minglm_generation_tokens_total": ("counter", "Tokens that were sampled for clients."),
    "minglm_finished_total": ("counter", "Answers by the reason they ended."),
    "minglm_format_errors_total": ("counter", "Answers that broke the chat format, by fault."),
    "minglm_engine_failures_total": ("counter", "Passes of the engine that failed."),
    "minglm_open_answers": ("gauge", "Answers under way or waiting."),
    "minglm_open_answers_limit": ("gauge", "Answers beyond this are refused with status 429."),
    "minglm_first_token_seconds": ("histogram", "From the request to its first token."),
    "minglm_request_seconds": ("histogram", "From the request to the end of its answers."),
}


class Metrics:
    """Counters and histograms, by name and labels. All calls come from the event loop."""

    def __init__(self):
        self.counts, self.times = Counter(), {}

    def count(self, name, by=1, **labels):
        """Add to a counter."""
        self.counts[name, tuple(sorted(labels.items()))] += by

    def time(self, name, seconds):
        """Add an observation to a histogram."""
        buckets, total = self.times.setdefault(name, ([0] * (len(SECONDS) + 1), [0.0]))
        buckets[bisect_left(SECONDS, seconds)] += 1
        total[0] += seconds

    def text(self, **now):
        """The exposition format, version 0.0.4. now: values of the gauges and of counters kept elsewhere."""
        lines = []
        for name, (kind, words) in HELP.items():
            lines += [f"# HELP {name} {words}", f"# TYPE {name} {kind}"]
            if name in now:
                lines.append(f"{name} {now[name]}")
            for (counted, labels), value in sorted(self.counts.items()):
                if counted == name:
                    shown = ",".join(f'{key}="{_escaped(str(label))}"' for key, label in labels)
                    lines.append(f"{name}{{{shown}}} {value}" if shown else f"{name} {value}")
            if name in self.times:
                lines += self._histogram(name)
        return "\n".join(lines) + "\n"

    def _histogram(self, name):
        buckets, (total,) = self.times[name]
        below = 0
        for bound, number in zip((*SECONDS, "+Inf"), buckets, strict=True):
            below += number
            yield f'{name}_bucket{{le="{bound}"}} {below}'
        yield f"{name}_sum {total:.6f}"
        yield f"{name}_count {below}"


def _escaped(text):
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
