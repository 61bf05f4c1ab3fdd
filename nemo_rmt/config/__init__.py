"""The typed recipe: every value a run depends on, with its default, unit and meaning.

The docstring under a key is what ``nemo-rmt recipes show`` prints beside it. Combinations that
cannot work are refused when the recipe is built, long before a process starts. Reading YAML and
``key=value`` overrides is in ``nemo_rmt.recipe_io``.
"""

from nemo_rmt.config.data import TOGETHER, Corpus, Data, Task, Tokenizer
from nemo_rmt.config.evaluation import LMEval
from nemo_rmt.config.layout import FP8_CAPABILITY, LOGITS_AT_ONCE, VOCAB_MULTIPLE, Cluster, Model, Parallel
from nemo_rmt.config.recipe import Flywheel, Recipe, Tracking
from nemo_rmt.config.rmt import RMT, TIERS, Budget, Curriculum, Difficulty, Prompt, Reward
from nemo_rmt.config.rollout import VLLM, Rollout
from nemo_rmt.config.section import Section
from nemo_rmt.config.stages import (
    EARLIER_MODELS,
    GRPO,
    RL,
    SFT,
    Anneal,
    CachedReference,
    Distill,
    Evaluate,
    Guided,
    Optim,
    Pretrain,
    ReMiT,
    Rho1,
    Stage,
)

__all__ = [
    "Anneal",
    "Budget",
    "CachedReference",
    "Cluster",
    "Corpus",
    "Curriculum",
    "Data",
    "Difficulty",
    "Distill",
    "EARLIER_MODELS",
    "Evaluate",
    "FP8_CAPABILITY",
    "Flywheel",
    "LMEval",
    "LOGITS_AT_ONCE",
    "GRPO",
    "Guided",
    "Model",
    "Optim",
    "Parallel",
    "Pretrain",
    "Prompt",
    "RL",
    "RMT",
    "ReMiT",
    "Recipe",
    "Reward",
    "Rho1",
    "Rollout",
    "SFT",
    "Section",
    "Stage",
    "TIERS",
    "TOGETHER",
    "Task",
    "Tokenizer",
    "Tracking",
    "VLLM",
    "VOCAB_MULTIPLE",
]
