"""Experiments: a grid of recipes and seeds over the flywheel, whose arms share the stages they have in common.

``OUT/stages/`` has every stage once, whoever needs it; ``OUT/NAME/ARM/seed_N/`` is the run folder of an arm, made of
links, and ``OUT/NAME/`` has the results. The driver imports no torch.
"""

from nemo_rmt.experiment.config import as_words
from nemo_rmt.experiment.run import ExperimentOptions, list_experiments, run_experiment

__all__ = ["ExperimentOptions", "as_words", "list_experiments", "run_experiment"]
