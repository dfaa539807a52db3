"""Property tests for components of your own (no counterpart in the paper).

One contract per kind of component: `check_router(route)`, `check_packer(best_fit)` and so on take any
callable with the documented signature, draw inputs with hypothesis, and raise AssertionError with the first
input that breaks a property. The project's own tests call the same contracts, and show that each fails on a
deliberately broken twin.
"""

from minglm.testing.chat import check_parser, check_template
from minglm.testing.cleaning import (
    check_decontamination,
    check_near_duplicates,
    check_scorer,
    check_semantic_duplicates,
)
from minglm.testing.data import check_batch, check_fim, check_packer, check_stream, check_tokenizer
from minglm.testing.envs import check_environment, check_sandbox
from minglm.testing.inference import check_sampler, check_verifier
from minglm.testing.model import (
    check_attention,
    check_balance,
    check_dispatcher,
    check_experts,
    check_rope,
    check_router,
)
from minglm.testing.optim import check_optimizer, check_schedule
from minglm.testing.parallel import (
    check_layout,
    check_sequence_exchange,
    check_sharded_optimizer,
    check_token_exchange,
)
from minglm.testing.rl import (
    check_advantages,
    check_aggregation,
    check_detectors,
    check_pass_at_k,
    check_plateau,
    check_policy_loss,
    check_temperature_choice,
)

__all__ = [
    "check_advantages",
    "check_aggregation",
    "check_attention",
    "check_balance",
    "check_batch",
    "check_decontamination",
    "check_detectors",
    "check_environment",
    "check_dispatcher",
    "check_experts",
    "check_fim",
    "check_layout",
    "check_near_duplicates",
    "check_optimizer",
    "check_packer",
    "check_parser",
    "check_pass_at_k",
    "check_policy_loss",
    "check_rope",
    "check_router",
    "check_sampler",
    "check_sandbox",
    "check_schedule",
    "check_scorer",
    "check_semantic_duplicates",
    "check_sequence_exchange",
    "check_sharded_optimizer",
    "check_token_exchange",
    "check_stream",
    "check_plateau",
    "check_temperature_choice",
    "check_template",
    "check_tokenizer",
    "check_verifier",
]
