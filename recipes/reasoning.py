"""reasoning: problems that a small model half learns, to measure whether the flywheel teaches anything.

Real text beside worked solutions of three reasoning-gym families, half of which have no working: a model that answers
at once errs, also under greedy decoding, and problems longer than any trained on are there to be reached. Needs
``nemo-rmt[reasoning]``.
"""

from __future__ import annotations

from nemo_rmt.recipes.tiny import tiny

from nemo_rmt.config import RMT, Corpus, Data, Recipe, Task

FAULTS = {"error_rate": 0.05, "direct": 0.5}  # steps that are wrong; solutions without working


def reasoning() -> Recipe:
    """Sums, equations and words backward, half of them answered without working; two turns, set up to measure ReMiT."""
    recipe = tiny()
    recipe.name, recipe.run_dir = "reasoning", "runs/reasoning"
    recipe.rmt = RMT(enabled=False)
    recipe.data = Data(
        corpora=[
            Corpus(name="stdlib", kind="stdlib", weight=0.15, options={"max_document_characters": 2000}),
            _solutions("sums", 0.35),
            _solutions("equations", 0.25),
            _solutions("backward", 0.25),
        ],
        tasks=[
            Task(
                name="sums",
                family="reasoning_gym:chain_sum",
                options={"min_terms": 2, "max_terms": 4, "min_digits": 1, "max_digits": 1},
                longer={"min_terms": 5, "max_terms": 6},
            ),
            Task(
                name="equations",
                family="reasoning_gym:simple_equations",
                options={"min_terms": 2, "max_terms": 3, "min_value": 1, "max_value": 6},
                longer={"min_terms": 4, "max_terms": 5},
            ),
            Task(
                name="backward",
                family="reasoning_gym:spell_backward",
                options={"min_word_len": 3, "max_word_len": 4},
                longer={"min_word_len": 5, "max_word_len": 6},
            ),
        ],
        sft_options=FAULTS,
    )
    recipe.pretrain.steps = 3000
    # the anneal's whole course is kept, to see how soon an objective gets where
    recipe.anneal.checkpoint_interval, recipe.flywheel.keep_checkpoints = 75, 4
    recipe.evaluate.problems = 60  # of each family
    return recipe


def _solutions(task: str, weight: float) -> Corpus:
    """Solutions of a task, with their faults."""
    return Corpus(name=task, kind="solutions", weight=weight, num_documents=30_000, options={"task": task, **FAULTS})
