"""The sizes of a layout: they multiply to the ranks, or one line names a size that works."""

import dataclasses
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minglm.config import ModelConfig, ParallelConfig
from minglm.config.parallel import divisors, nearest

MODEL = ModelConfig()  # 160 experts
sizes = st.sampled_from([1, 2, 3, 4, 8, 16])


@given(
    world=st.integers(1, 96),
    pp=sizes,
    replicas=sizes,
    fsdp=st.sampled_from([0, 1, 2, 4, 6, 32]),
    ep=sizes,
    cp=sizes,
)
def test_sizes_multiply_to_the_ranks_or_the_line_names_a_size_that_works(
    world, pp, replicas, fsdp, ep, cp
):
    """A layout that is accepted uses every rank once; a refusal names one field, and its remedy mends that field."""
    config = ParallelConfig(pp=pp, dp_replicate=replicas, fsdp=fsdp, ep=ep, cp=cp)
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


@given(number=st.integers(1, 5000), size=st.integers(1, 5000))
def test_divisors_and_the_nearest_of_them(number, size):
    """Divisors are exactly the numbers that divide; no other of them is nearer."""
    found = divisors(number)
    assert found == [n for n in range(1, number + 1) if number % n == 0]
    best = nearest(size, found)
    assert all(abs(best - size) <= abs(other - size) for other in found)


def test_one_process_has_the_layout_of_one_rank():
    """Without torchrun every size is 1, and a config that asks for more says how many ranks to start."""
    assert ParallelConfig().layout(1, MODEL) == (1, 1, 1, 1, 1)
    with pytest.raises(ValueError, match=r"fsdp = 8: .* there is 1 rank; use 1, or start 8 ranks"):
        ParallelConfig(fsdp=8).layout(1, MODEL)
