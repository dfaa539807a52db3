"""How fast: our parts beside named baselines, in one run, interleaved (no counterpart in the paper).

A benchmark is a function `name(config, options) -> record`, registered in BENCHES, and `draw_name(record, axis)`, in
DRAWN (with that of `bench kernels`, which has options of its own). The record goes to figures/bench_NAME.json with
versions, device and commit. What a machine does meanwhile falls on both sides alike, because they take turns; the best
of the turns is reported, and speeds are to be read as ratios. Seconds are those of the processor (all threads
together): a machine that does other work meanwhile spoils them least.
"""

import tempfile
import time
from pathlib import Path

import torch

from minglm.bench.compile import compile_kernels
from minglm.bench.train import train
from minglm.common.files import write_json
from minglm.common.version import versions
from minglm.inference import Engine, Request
from minglm.kernels.cpu import build
from minglm.model.glm import GLM


def interleaved(sides, repeats):
    """CPU-seconds of each of `sides`, {name: function}, best of so many turns: {name: seconds}."""
    seconds = {name: [] for name in sides}
    for _ in range(repeats):
        for name, run in sides.items():
            began = time.process_time()
            run()
            seconds[name].append(time.process_time() - began)
    return {name: min(turns) for name, turns in seconds.items()}


def transformers_generate(model):
    """The same weights in transformers: a function (prompts, new tokens) -> ids, sampling at temperature 1."""
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
        twin = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def generate(prompts, tokens):
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


def products(model, texts, length, batch, tokens):
    """The matrix products that any of both sides needs for its trunk, and nothing else: a floor for this machine."""
    c, matrices = model.config, []
    for layer in model.model.layers[: c.num_hidden_layers]:
        matrices += [p for p in layer.parameters() if p.dim() > 1]

    @torch.inference_mode()
    def run():
        for T in [texts * length] + [batch] * (tokens - 1):
            for w in matrices:
                if w.dim() == 2:
                    torch.mm(torch.ones(T, w.shape[1]), w.T)
                else:
                    torch.bmm(
                        torch.ones(len(w), -(-T * c.num_experts_per_tok // len(w)), w.shape[2]),
                        w.mT,
                    )
            model.lm_head(torch.ones(batch, c.hidden_size))

    return run


def generate(config, options):
    """Tokens a CPU-second of the engine and of transformers' `generate`, against the batch: prompts all different, and,
    as in a rollout, eight samples of each; and what drafts do to the number of passes. The weights are not trained.
    """
    model = GLM(config.model).eval()
    engine, theirs = Engine(model), transformers_generate(model)
    length, tokens = options.prompt, options.tokens
    record = {
        "prompt": length,
        "tokens": tokens,
        "curve": [],
        "drafts": [],
        "c": build.library() is not None,
    }
    record["baseline"] = (
        "transformers generate: do_sample at temperature 1 without top-k, its cache and kernels as set"
    )
    for batch in options.batches:
        for samples in (1, 8):
            if batch % samples:
                continue
            drawn = torch.Generator().manual_seed(batch)
            unique = torch.randint(
                config.model.vocab_size, (batch // samples, length), generator=drawn
            ).tolist()
            prompts = [prompt for prompt in unique for _ in range(samples)]
            requests = [
                Request(prompt, tokens, seed=i, stop_ids=()) for i, prompt in enumerate(prompts)
            ]
            sides = {
                # told of new weights, the engine packs them and knows nothing of the texts of the turn before
                "minglm": lambda r=requests: engine.update_weights() or engine.generate(r),
                "transformers": lambda p=prompts: theirs(p, tokens),
                "products": products(model, len(unique), length, batch, tokens),
            }
            speeds = {
                name: batch * tokens / s for name, s in interleaved(sides, options.repeats).items()
            }
            speeds["ratio"] = speeds["minglm"] / speeds["transformers"]
            record["curve"].append({"batch": batch, "samples": samples, **speeds})
            print(*(f"{k} {v:.4g}" for k, v in record["curve"][-1].items()), flush=True)
    for drafts in range(5 if model.mtp is not None else 0):
        engine = Engine(model, draft_tokens=drafts)
        answers = engine.generate([Request(prompts[0], tokens, seed=0, stop_ids=())])
        share = engine.drafter.accepted / max(1, engine.drafter.drafted) if drafts else None
        passes = engine.passes / len(answers[0].tokens)
        record["drafts"].append({"drafts": drafts, "accepted": share, "passes_per_token": passes})
        print(*(f"{k} {v}" for k, v in record["drafts"][-1].items()), flush=True)
    return record


BENCHES = {"generate": generate, "train": train, "compile": compile_kernels}


def run(name, config, options):
    """Run one benchmark, write its record and draw it. Returns the paths."""
    record = {
        "bench": name,
        "config": config.name,
        "versions": versions(),
        "repeats": options.repeats,
    }
    record |= BENCHES[name](config, options)
    path = Path(options.out) / f"bench_{name}.json"
    write_json(path, record)
    from minglm.bench.plots import redraw

    return path, redraw(path)
