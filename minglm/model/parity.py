"""Where two implementations part: the output of every module, in the order of the computation (paper 2.1).

    python -m minglm.model.parity FOLDER     a released checkpoint: minglm beside transformers

    error of a module = largest difference of its outputs / largest output of the reference

A wrong logit says that something is wrong; this says what. Both models compute the same tokens, whatever modules have
the same name in both are listened to, and the first whose error is above the tolerance is the culprit, or uses
something that is no module (the rotation shows in `o_proj`, the experts in `mlp`). A router's output is compared as a
table of weights, tokens by experts, so that the order of the chosen ones does not matter.
"""

import argparse
from dataclasses import dataclass

import torch

FLOAT32 = 1e-4  # tolerance: float32 rounds at 6e-8, and a hundred layers add to it


@dataclass(frozen=True)
class Row:
    """A module's name and its relative error."""

    name: str
    error: float


def _plain(output):
    """The tensor that a module's output is compared by, flat and float64."""
    parts = output if isinstance(output, tuple) else (output,)
    whole = [part for part in parts if isinstance(part, torch.Tensor)]
    chosen = next((part for part in whole if part.dtype == torch.int64), None)
    if (
        chosen is not None
    ):  # a router: chosen experts (T, K), their weights (T, K), and scores of all (T, E)
        weights = next(part for part in whole if part is not chosen and part.shape == chosen.shape)
        experts = max(part.shape[-1] for part in whole)
        whole = [weights.new_zeros(len(chosen), experts).scatter_add(1, chosen, weights)]
    return whole[0].detach().double().flatten()


@torch.no_grad()
def outputs(model, tokens_BS):
    """{name: flat output} of every module that is called in one pass, in that order; and of embedding and logits."""
    found, handles = {}, []

    def listen(name):
        def hook(
            module, given, output
        ):  # returns None: anything else would take the output's place
            found.setdefault(name, _plain(output))

        return hook

    def embedded(module, given, named):
        found.setdefault(
            "model.embed_tokens", _plain(given[0] if given else named["hidden_states"])
        )

    for name, module in model.named_modules():
        if name == "model.layers.0":
            handles.append(module.register_forward_pre_hook(embedded, with_kwargs=True))
        if name not in ("", "model", "model.embed_tokens", "lm_head"):
            handles.append(module.register_forward_hook(listen(name)))
    try:
        logits = model(tokens_BS)
    finally:
        for handle in handles:
            handle.remove()
    found["lm_head"] = _plain(getattr(logits, "logits", logits))
    return found


def compare(model, reference, tokens_BS):
    """One `Row` for each module that both have, in the order in which `model` computes.

    model, reference: a GLM and Hugging Face's model, or any two with modules of the same names. tokens int64 (B, S).
    """
    ours, theirs = outputs(model, tokens_BS), outputs(reference, tokens_BS)
    rows = []
    for name, tensor in ours.items():
        if name in theirs and theirs[name].numel() == tensor.numel():
            size = theirs[name].abs().max().clamp(min=1e-30)
            rows.append(Row(name, ((tensor - theirs[name]).abs().max() / size).item()))
    return rows


def first_difference(rows, tolerance=FLOAT32):
    """The name of the first module with an error above the tolerance; None when there is none. NaN is above."""
    return next((row.name for row in rows if not row.error <= tolerance), None)


def load_pair(folder):
    """(GLM, Hugging Face's model) of a released checkpoint, both in float32. Needs `pip install minglm[hf]`."""
    from minglm.model.glm import GLM

    try:
        import transformers
    except ImportError:
        raise ValueError("this compares with transformers: pip install 'minglm[hf]'") from None
    model = GLM.from_pretrained(folder, torch.float32)
    options = {
        "dtype": torch.float32,
        "attn_implementation": "eager",
        "experts_implementation": "eager",
    }
    return model.eval(), transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def main(argv=None):
    """Compare a folder on random tokens; prints a line for each module, then the first that differs."""
    parser = argparse.ArgumentParser(prog="python -m minglm.model.parity", description=main.__doc__)
    parser.add_argument(
        "folder", help="folder of a released checkpoint that fits into memory twice"
    )
    parser.add_argument(
        "--positions", type=int, default=16, help="length of the two rows of tokens"
    )
    parser.add_argument("--tolerance", type=float, default=FLOAT32)
    words = parser.parse_args(argv)
    model, reference = load_pair(words.folder)
    numbers = torch.Generator().manual_seed(0)
    tokens_BS = torch.randint(model.config.vocab_size, (2, words.positions), generator=numbers)
    rows = compare(model, reference, tokens_BS)
    for row in rows:
        print(f"{row.error:8.1e}  {row.name}")
    print(f"first difference above {words.tolerance:g}: {first_difference(rows, words.tolerance)}")


if __name__ == "__main__":
    main()
