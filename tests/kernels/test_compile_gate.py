"""Every Triton kernel, in every default configuration, compiles for an H100 inside its budget; no GPU is needed."""

import pytest

from minglm.kernels.toolchain.compile_check import compile_module, faults, modules


@pytest.mark.slow
@pytest.mark.parametrize("module", modules())
def test_kernels_keep_their_budgets(module):
    """Nothing spilled, shared memory and registers within a block's, products by warp groups."""
    records = compile_module(module)
    names = [record["kernel"] for record in records]
    assert names and len(set(names)) == len(names)
    broken = {record["kernel"]: faults(record) for record in records}
    assert not {name: found for name, found in broken.items() if found}


@pytest.mark.slow
def test_each_budget_can_be_broken():
    """The good kernel passes, and each of its overweight twins fails for its own reason."""
    found = {
        record["kernel"]: faults(record)
        for record in compile_module("tests.helpers.overweight_triton")
    }
    assert found["good"] == []
    assert found["narrow"] == ["has no HGMMA", "multiplies by single warps (HMMA)"]
    assert any("spills" in fault for fault in found["spilling"])
    assert any("shared memory" in fault for fault in found["deep"])
    assert found["odd"] == ["copies x in tiles of 64 bytes, which is no multiple of 128"]
    assert "must name each argument once" in found["unnamed"][0]


def test_a_module_that_cannot_be_compiled_is_an_error():
    """A process that dies is reported with its exit status and its last words."""
    with pytest.raises(RuntimeError, match="exit status 1 at import"):
        compile_module("tests.no_such_module")
