"""The configuration of a run: frozen dataclasses, loaded from a Python file and overridden by name.

run = load_config("configs/toy.py", ["--seed", "1"])
"""

from minglm.config.data import DataConfig, Quality
from minglm.config.model import ModelConfig
from minglm.config.parallel import Layout, ParallelConfig, TokenExchange
from minglm.config.posttraining import (
    Aggregation,
    EvaluationConfig,
    ExpertConfig,
    PostTrainingConfig,
    RLConfig,
    SFTConfig,
)
from minglm.config.run import (
    Kernels,
    Precision,
    RolloutPrecision,
    RunConfig,
    Tracker,
    load_config,
)
from minglm.config.training import (
    BalanceConfig,
    OptimizerConfig,
    Packing,
    Polynomial,
    Schedule,
    StageConfig,
    StagesConfig,
)

__all__ = [
    "Aggregation",
    "BalanceConfig",
    "DataConfig",
    "EvaluationConfig",
    "ExpertConfig",
    "Kernels",
    "Layout",
    "ModelConfig",
    "OptimizerConfig",
    "Packing",
    "ParallelConfig",
    "Polynomial",
    "PostTrainingConfig",
    "Precision",
    "Quality",
    "RLConfig",
    "RolloutPrecision",
    "RunConfig",
    "SFTConfig",
    "Schedule",
    "StageConfig",
    "StagesConfig",
    "TokenExchange",
    "Tracker",
    "load_config",
]
