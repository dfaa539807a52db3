"""How many GPUs a model needs to be served, by precision and context (the model's own README, "Inference").

    bytes = weights + requests * context * cache of a token * copies;   GPUs: the least power of two that holds them

With tensor parallelism over more GPUs than there are key/value heads, a head is on several of them: `copies`.
The latent of MLA is not copied: engines give each GPU other requests. The table holds for engines that cut a
model over several GPUs, vLLM and SGLang, which read what `minglm export` writes; `minglm serve` uses one.

For 8 requests, a cache in bfloat16, and nine tenths of 80 GiB this gives all ten numbers of the README of
GLM-4.5 and those of GLM-4.7-Flash: 16 and 32 H100s for GLM-4.5 in bfloat16, 8 and 16 in float8, and so on.
"""

from typing import NamedTuple

from minglm.config.model import ModelConfig
from minglm.plan.counts import count_parameters, kv_cache_bytes_per_token, unit_counts
from minglm.plan.gpus import GPU, USABLE

GIB = 2**30
REQUESTS = 8
"""Requests at once, as the README's table assumes."""
SHORT = 4096
"""Positions for which a server is still of use."""
MOST_GPUS = 1024


class Serving(NamedTuple):
    """One row of the table."""

    precision: str
    """Of the weights."""
    context: int
    """Positions of each request."""
    gpus: int
    weights: int
    """Bytes, on all GPUs together."""
    cache: int
    """Bytes of keys and values, on all GPUs together, copies included."""


def weight_bytes(c: ModelConfig, float8: bool) -> int:
    """Count the bytes of the released weights: bfloat16, or float8 with embedding, head, routers and MTP's own in bfloat16."""
    count = count_parameters(c)
    total = count["total_with_mtp"]
    if not float8:
        return 2 * total
    moe_layers = c.num_hidden_layers - c.first_k_dense_replace + c.num_nextn_predict_layers
    wide = count["embedding"] + count["head"] + moe_layers * unit_counts(c)["router"]
    wide += c.num_nextn_predict_layers * 2 * c.hidden_size**2
    return total + wide


def contexts(c: ModelConfig) -> list[int]:
    """Return the contexts of the table: short, 32K, 128K, and the longest, as far as the model goes."""
    longest = c.max_position_embeddings
    return sorted({min(length, longest) for length in (SHORT, 32_768, 131_072, longest)})


def serving_table(c: ModelConfig, gpu: GPU, requests: int = REQUESTS) -> list[Serving]:
    """Return the GPUs that serve `requests` requests at once, for each precision and context."""
    rows = []
    for float8 in (False, True) if gpu.float8 else (False,):
        for context in contexts(c):
            rows.append(_serving(c, gpu, float8, context, requests))
    return rows


def _serving(c: ModelConfig, gpu: GPU, float8: bool, context: int, requests: int) -> Serving:
    weights = weight_bytes(c, float8)
    cache = requests * context * kv_cache_bytes_per_token(c)
    usable = USABLE * gpu.memory_gib * GIB
    gpus = 1
    while True:
        copies = 1 if c.kv_lora_rank else max(1, gpus // c.num_key_value_heads)
        if weights + copies * cache <= gpus * usable or gpus >= MOST_GPUS:
            name = "float8" if float8 else "bfloat16"
            return Serving(name, context, gpus, weights, copies * cache)
        gpus *= 2
