"""Measure tokens a second of the engine beside transformers' `generate`, interleaved (no counterpart in the paper).

Whatever else the machine does falls on both sides alike, because they take turns; the best of the turns is
reported, and speeds are to be read as ratios. Seconds are CPU-seconds of the process (all threads together):
a machine that does other work at the same time distorts them least. The weights are not trained.
"""

import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any, TypedDict

import torch
from torch import Tensor

from minglm.bench.options import BenchOptions
from minglm.config.run import RunConfig
from minglm.inference import Engine, Request
from minglm.model.glm import GLM

BASELINE = (
    "transformers generate: do_sample at temperature 1 without top-k, its cache and kernels as set"
)

Prompts = list[list[int]]


class CurvePoint(TypedDict):
    """Tokens a CPU-second of each side, for one number of answers at once."""

    batch: int
    """Answers at once."""
    samples: int
    """Answers for each prompt."""
    minglm: float
    transformers: float
    products: float
    """The matrix products alone: a bound for this machine."""
    ratio: float
    """minglm / transformers."""


class DraftPoint(TypedDict):
    """Effect of speculative decoding with one number of drafted tokens."""

    drafts: int
    accepted: float | None
    """Share of the drafted tokens that was accepted; None without drafts."""
    passes_per_token: float


def interleaved(sides: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Return the CPU-seconds of each side, {name: function}: the best of `repeats` turns."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, run in sides.items():
            began = time.process_time()
            run()
            seconds[name].append(time.process_time() - began)
    return {name: min(turns) for name, turns in seconds.items()}


def transformers_generate(model: GLM) -> Callable[[Prompts, int], Tensor]:
    """Return a function (prompts, new tokens) -> ids of transformers, with the same weights, at temperature 1.

    Raises ValueError where transformers is not installed.
    """
    try:
        from transformers import AutoModelForCausalLM, GenerationConfig
        from transformers.utils import logging
    except ImportError:
        raise ValueError(
            "bench generate compares with transformers: pip install transformers"
        ) from None
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, "float32")
        twin: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def generate(prompts: Prompts, tokens: int) -> Tensor:
        tokens_BS = torch.tensor(prompts)
        config = GenerationConfig(
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=True,
            top_k=0,
            pad_token_id=0,
            eos_token_id=None,
        )
        return twin.generate(
            tokens_BS, attention_mask=torch.ones_like(tokens_BS), generation_config=config
        )

    return generate


def products(model: GLM, texts: int, length: int, batch: int, tokens: int) -> Callable[[], None]:
    """Return a function that makes the matrix products of one generation, and nothing else: a bound for this machine.

    texts: different prompts, each of `length` tokens; batch: answers at once, each of `tokens` tokens.
    """
    c = model.config
    matrices = [
        parameter
        for layer in model.model.layers[: c.num_hidden_layers]
        for parameter in layer.parameters()
        if parameter.dim() > 1
    ]

    @torch.inference_mode()
    def run() -> None:
        # One pass over the prompts, then one for each further token.
        for T in [texts * length] + [batch] * (tokens - 1):
            for w in matrices:
                if w.dim() == 2:
                    torch.mm(torch.ones(T, w.shape[1]), w.T)
                else:
                    # The experts' matrices, with the tokens' choices spread evenly over them.
                    E, _, D = w.shape
                    rows = -(-T * c.num_experts_per_tok // E)
                    torch.bmm(torch.ones(E, rows, D), w.mT)
            model.lm_head(torch.ones(batch, c.hidden_size))

    return run


def random_prompts(vocabulary: int, texts: int, length: int, seed: int) -> Prompts:
    """Draw `texts` prompts of `length` tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (texts, length), generator=generator).tolist()


def curve_point(
    engine: Engine,
    theirs: Callable[[Prompts, int], Tensor],
    options: BenchOptions,
    batch: int,
    samples: int,
) -> CurvePoint:
    """Measure both sides with `batch` answers at once, `samples` of each prompt."""
    model = engine.model
    unique = random_prompts(model.config.vocab_size, batch // samples, options.prompt, seed=batch)
    prompts = [prompt for prompt in unique for _ in range(samples)]
    requests = [
        Request(prompt, options.tokens, seed=seed, stop_ids=())
        for seed, prompt in enumerate(prompts)
    ]

    def ours() -> None:
        # `update_weights` repacks and clears the prefix cache, so no run benefits from the one before.
        engine.update_weights()
        engine.generate(requests)

    sides = {
        "minglm": ours,
        "transformers": lambda: theirs(prompts, options.tokens),
        "products": products(model, len(unique), options.prompt, batch, options.tokens),
    }
    seconds = interleaved(sides, options.repeats)
    speeds = {name: batch * options.tokens / side for name, side in seconds.items()}
    return {
        "batch": batch,
        "samples": samples,
        "minglm": speeds["minglm"],
        "transformers": speeds["transformers"],
        "products": speeds["products"],
        "ratio": speeds["minglm"] / speeds["transformers"],
    }


def draft_point(model: GLM, prompt: list[int], tokens: int, drafts: int) -> DraftPoint:
    """Count the passes a token takes with `drafts` drafted tokens, and the share of drafts that is accepted."""
    engine = Engine(model, draft_tokens=drafts)
    (answer,) = engine.generate([Request(prompt, tokens, seed=0, stop_ids=())])
    assert answer is not None  # nothing was cancelled
    accepted = None
    if engine.drafter is not None:
        accepted = engine.drafter.accepted / max(1, engine.drafter.drafted)
    return {
        "drafts": drafts,
        "accepted": accepted,
        "passes_per_token": engine.passes / len(answer.tokens),
    }


def generate(config: RunConfig, options: BenchOptions) -> dict[str, Any]:
    """Measure generation of the engine and of transformers against the number of answers at once; return the record.

    Prompts are all different, or, as in a rollout, eight answers share one. Then count the passes of the
    engine with 0 to 4 drafted tokens, if the model has an MTP layer.
    """
    from minglm.kernels.dispatch import has_c_library

    model = GLM(config.model).eval()
    engine = Engine(model)
    theirs = transformers_generate(model)
    curve: list[CurvePoint] = []
    for batch in options.batches:
        for samples in (1, 8):
            if batch % samples:
                continue
            point = curve_point(engine, theirs, options, batch, samples)
            curve.append(point)
            print(*(f"{name} {value:.4g}" for name, value in point.items()), flush=True)
    drafts: list[DraftPoint] = []
    last_batch = options.batches[-1]
    (prompt, *_) = random_prompts(
        config.model.vocab_size, last_batch, options.prompt, seed=last_batch
    )
    for count in range(5 if model.mtp is not None else 0):
        point = draft_point(model, prompt, options.tokens, count)
        drafts.append(point)
        print(*(f"{name} {value}" for name, value in point.items()), flush=True)
    return {
        "prompt": options.prompt,
        "tokens": options.tokens,
        "curve": curve,
        "drafts": drafts,
        "c": has_c_library(),
        "baseline": BASELINE,
    }
