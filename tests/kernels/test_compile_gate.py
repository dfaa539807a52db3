"""Every Triton kernel, in every default configuration, compiles for an H100 inside its budget; no GPU is needed.

Most of it takes minutes, and is left out of the default run; `.ci/run` makes it.
"""

import pytest

from minglm.kernels.toolchain.compile_check import compile_modules, faults, modules

# A process takes seconds to import torch and Triton, so each compiles several modules.
PARTS = [modules()[start::4] for start in range(4)]


@pytest.mark.ci
@pytest.mark.parametrize("part", PARTS, ids=lambda part: ", ".join(part))
def test_kernels_keep_their_budgets(part):
    """Nothing spilled, shared memory and registers within a block's, products by warp groups."""
    records = compile_modules(*part)
    assert {f"minglm.kernels.{record['module']}" for record in records} == set(part)
    names = [(record["module"], record["kernel"]) for record in records]
    assert len(set(names)) == len(names)
    broken = {name: faults(record) for name, record in zip(names, records, strict=True)}
    assert not {name: found for name, found in broken.items() if found}


@pytest.mark.ci
def test_each_budget_can_be_broken():
    """The good kernel passes, and each of its overweight twins fails for its own reason."""
    found = {
        record["kernel"]: faults(record)
        for record in compile_modules("tests.helpers.overweight_triton")
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
        compile_modules("tests.no_such_module")
