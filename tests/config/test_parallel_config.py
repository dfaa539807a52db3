"""The sizes of a layout: they multiply to the ranks, or one line names a size that works."""

import dataclasses
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minglm.config import ModelConfig, ParallelConfig, PostTrainingConfig, RunConfig
from minglm.config.parallel import divisors, expert_ranks, nearest

MODEL = ModelConfig()  # 160 experts
sizes = st.sampled_from([1, 2, 3, 4, 8, 16])


@given(
    world=st.integers(1, 96),
    pp=sizes,
    replicas=sizes,
    fsdp=st.sampled_from([0, 1, 2, 4, 6, 32]),
    ep=sizes,
    cp=sizes,
    interleave=st.sampled_from([1, 2, 8]),
)
def test_sizes_multiply_to_the_ranks_or_the_line_names_a_size_that_works(
    world, pp, replicas, fsdp, ep, cp, interleave
):
    """A layout that is accepted uses every rank once; a refusal names one field, and its remedy mends that field."""
    config = ParallelConfig(
        pp=pp, dp_replicate=replicas, fsdp=fsdp, ep=ep, cp=cp, interleave=interleave
    )
    try:
        layout = config.layout(world, MODEL)
    except ValueError as error:
        message = str(error)
        assert "\n" not in message
        field = re.match(r"parallel\.(\w+)", message)[1]
        remedy = int(re.search(r"use (?:a product of )?(\d+)", message)[1])
        if field == "pp":
            mended = dataclasses.replace(config, pp=remedy, dp_replicate=1)
        else:
            mended = dataclasses.replace(config, **{field: remedy})
        try:
            mended.layout(world, MODEL)
        except ValueError as other:  # then another field is at fault
            assert re.match(r"parallel\.(\w+)", str(other))[1] != field
        return
    assert layout.world == world == layout.pp * layout.dp_replicate * layout.efsdp * layout.ep
    assert layout.data_groups * layout.cp * layout.pp == world


def accepts(ranks, ep):
    """Return whether a run of this many ranks may divide its experts over `ep` of them."""
    try:
        config = ParallelConfig(ep=ep)
        config.check(MODEL)
        config.layout(ranks, MODEL)
    except ValueError:
        return False
    return True


@given(ranks=st.integers(1, 3000))
def test_a_search_of_the_experts_ranks_leaves_none_out(ranks):
    """What the planner tries without asking the config is what the config accepts, no more and no less."""
    assert expert_ranks(ranks, MODEL) == [ep for ep in divisors(ranks) if accepts(ranks, ep)]


@given(number=st.integers(1, 5000), size=st.integers(1, 5000))
def test_divisors_and_the_nearest_of_them(number, size):
    """Divisors are exactly the numbers that divide; no other of them is nearer."""
    found = divisors(number)
    assert found == [n for n in range(1, number + 1) if number % n == 0]
    best = nearest(size, found)
    assert all(abs(best - size) <= abs(other - size) for other in found)


def test_one_process_has_the_layout_of_one_rank():
    """Without torchrun every size is 1, and a config that asks for more says how many ranks to start."""
    assert ParallelConfig().layout(1, MODEL) == (1, 1, 1, 1, 1, 1)
    with pytest.raises(ValueError, match=r"fsdp = 8: .* there is 1 rank; use 1, or start 8 ranks"):
        ParallelConfig(fsdp=8).layout(1, MODEL)


@given(
    heads=st.integers(1, 24),
    groups=st.integers(1, 8),
    latent=st.booleans(),
    cp=st.integers(1, 48),
)
def test_ranks_that_share_a_sequence_divide_its_heads(heads, groups, latent, cp):
    """Every rank gets as many query heads, and whole key/value heads that are theirs alone; else a size that works."""
    model = dataclasses.replace(
        MODEL,
        num_attention_heads=heads * groups,
        num_key_value_heads=heads,
        kv_lora_rank=8 if latent else 0,
    )
    try:
        ParallelConfig(cp=cp).check(model)
    except ValueError as error:
        remedy = int(re.search(r"use (\d+)$", str(error))[1])
        ParallelConfig(cp=remedy).check(model)
        return
    queries_per_key = 1 if latent else groups
    for rank in range(cp):
        mine = range(rank * heads * groups // cp, (rank + 1) * heads * groups // cp)
        keys = {query // queries_per_key for query in mine}
        assert heads * groups % cp == 0 and len(mine) == heads * groups // cp
        assert len(keys) == 1 or len(mine) == len(keys) * queries_per_key


def test_rows_are_cut_into_equal_parts():
    """A stage whose rows cannot be cut evenly is refused before the run starts."""
    config = RunConfig(
        name="cut", model=MODEL, parallel=ParallelConfig(cp=8), posttraining=PostTrainingConfig()
    )
    general = dataclasses.replace(config.stages.general, sequence_length=4092)
    stages = dataclasses.replace(config.stages, general=general)
    with pytest.raises(ValueError, match=r"stages\.general\.sequence_length = 4092: .*cp = 8"):
        dataclasses.replace(config, stages=stages)._check_lengths()
