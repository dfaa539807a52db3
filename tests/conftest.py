"""What every test shares: one thread for each worker, no display, and how many examples hypothesis draws.

`pytest` draws the same 25 examples of each property every time; `HYPOTHESIS_PROFILE=nightly pytest` draws 300 new ones.
"""

import gc
import os
import signal
from pathlib import Path

# Before torch and matplotlib are imported. The workers of pytest-xdist share the cores, so each gets one thread.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MPLBACKEND"] = "Agg"
# Before triton is imported, which may be by any test: without a GPU its kernels run in the interpreter.
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"

# A shell switches Ctrl-C off in what it starts in the background; the tests send it to themselves.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
from hypothesis import HealthCheck, Phase, settings

# No deadline and no complaint about slow data: a shared machine may stop a test for a second at any time.
settings.register_profile(
    "ci",
    max_examples=25,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "nightly", parent=settings.get_profile("ci"), max_examples=300, derandomize=False
)
settings.register_profile(  # of tests/mutate.py, which asks only whether a property fails
    "mutate", parent=settings.get_profile("ci"), phases=[Phase.explicit, Phase.generate]
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """Return one worker per core, eight at most; none when files are named, so that prints and the debugger work.

    Four where there is a GPU, whose memory they share.
    """
    if any(".py" in Path(word).name for word in config.args):
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(cores or 1, 4 if Path("/dev/nvidiactl").exists() else 8)


# Tests of these files share nothing and take long.
ANY_WORKER = ("tests/kernels/test_compile_gate.py", "tests/launch/test_dry_runs.py")


# What takes minutes comes first, so that no worker begins it when the others are done.
FIRST = (
    "tests/recipe/test_run.py",
    "tests/parallel/",
    "tests/cli/test_main.py",
    "tests/test_readme.py",
    "tests/launch/",
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Keep the tests of a file in one worker, so that its fixtures are set up once.

    The groups of pytest-xdist (`xdist_group`) would say the same, but pytest 9.2 ignores them: it no longer reads the
    attribute in which pytest-xdist 3.8 notes the group.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.partition("::")[0]
            return nodeid if file in ANY_WORKER else file

    return ByFile(config, log)


@pytest.fixture(autouse=True)
def gpu_memory(request):
    """Give back, after a test of a GPU, the memory that torch keeps for the next one: other workers need it."""
    yield
    if request.node.get_closest_marker("gpu"):
        import torch

        gc.collect()
        torch.cuda.empty_cache()


@pytest.fixture
def poisoned():
    """Let torch fill memory that is allocated and never written with NaN, which it does in deterministic mode."""
    import torch

    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def pytest_collection_modifyitems(items):
    """Put the longest files first; skip tests marked `gpu` where there is no CUDA device."""
    import torch

    items.sort(key=lambda item: not item.nodeid.startswith(FIRST))  # within a file nothing moves
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


BOTH_FORMS = (
    "tests/kernels/test_kernels.py",
    "tests/model/test_attention.py",
    "tests/model/test_moe.py",
)


def pytest_generate_tests(metafunc):
    """Run the tests of some files twice: with the forms of this machine, and with those of PyTorch."""
    if any(metafunc.definition.nodeid.startswith(file) for file in BOTH_FORMS):
        metafunc.fixturenames.insert(0, "forms")
        metafunc.parametrize("forms", ["auto", "torch"], indirect=True, scope="module")


@pytest.fixture(scope="module")
def forms(request):
    """Choose the forms of operations for the tests of a file."""
    from minglm.kernels import dispatch

    dispatch.use(request.param)
    yield
    dispatch.use("auto")
