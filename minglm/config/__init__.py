"""The configuration of a run: frozen dataclasses, loaded from a Python file and overridden by name.

run = load_config("configs/toy.py", ["--seed", "1"])
"""

from minglm.config.data import DataConfig, Quality
from minglm.config.model import ModelConfig
from minglm.config.parallel import Layout, ParallelConfig, TokenExchange
from minglm.config.posttraining import (
    Aggregation,
    CurriculumConfig,
    DynamicTemperatureConfig,
    EvaluationConfig,
    ExpertConfig,
    ExtremeTier,
    LossType,
    MiningConfig,
    OutsideConfig,
    PolicyLossConfig,
    PostTrainingConfig,
    RatioLevel,
    RewardConfig,
    RLConfig,
    SFTConfig,
    Split,
    Unification,
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
    "CurriculumConfig",
    "DataConfig",
    "DynamicTemperatureConfig",
    "EvaluationConfig",
    "ExpertConfig",
    "ExtremeTier",
    "Kernels",
    "Layout",
    "LossType",
    "MiningConfig",
    "ModelConfig",
    "OptimizerConfig",
    "OutsideConfig",
    "Packing",
    "ParallelConfig",
    "PolicyLossConfig",
    "Polynomial",
    "PostTrainingConfig",
    "Precision",
    "Quality",
    "RLConfig",
    "RatioLevel",
    "RewardConfig",
    "RolloutPrecision",
    "RunConfig",
    "SFTConfig",
    "Schedule",
    "Split",
    "StageConfig",
    "StagesConfig",
    "TokenExchange",
    "Tracker",
    "Unification",
    "load_config",
]
