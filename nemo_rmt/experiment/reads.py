"""What of a recipe each stage reads.

A stage that several arms share is known by what it was made from. So that this can be trusted, its stage.yaml holds
nothing else: keys that the stage does not read have their defaults, whatever the arm's recipe says.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from nemo_rmt.config import RMT, SFT, Anneal, Guided, Pretrain, Recipe, Section
from nemo_rmt.recipe_io import validate

_CORPORA = ("data.corpora", "data.tasks")
_MODEL = ("seed", "model", "parallel", "cluster", "tracking", "tokenizer", *_CORPORA, "data.document_attention")
_SAVING = ("flywheel.keep_checkpoints", "flywheel.async_save", "flywheel.restarts")

READS: dict[str, tuple[str, ...]] = {
    "data": ("seed", "cluster", "tracking", "tokenizer", *_CORPORA),
    "pretrain": (*_MODEL, *_SAVING, "pretrain"),
    "anneal": (*_MODEL, *_SAVING, "anneal", "flywheel.start_from"),
    "rmt": (*_MODEL, *_SAVING, "rmt", "rollout"),
    "sft": (*_MODEL, *_SAVING, "sft", "data"),
    "rl": (*_MODEL, *_SAVING, "rl", "rollout"),
    "evaluate": (*_MODEL, "evaluate", "rmt", "rollout"),
}
"""Sections, and single keys of sections, that decide what a stage does."""


def reads_iteration(stage: str, recipe: Recipe) -> bool:
    """Whether a stage's result depends on which turn of the flywheel it is in, besides its inputs."""
    return stage in ("rmt", "sft", "rl") or (stage == "anneal" and recipe.flywheel.start_from == "previous")


def what_is_read(recipe: Recipe, stage: str, inputs: Collection[str]) -> Recipe:
    """The recipe with the keys that a stage reads, and all others at their defaults; not validated as a whole.

    inputs: the roles of what it reads. An anneal without a reference or a cache is uniform.
    """
    values: dict[str, Any] = {"iterations": 1}
    for key in READS[stage]:
        section, _, name = key.partition(".")
        given = getattr(recipe, section)
        if not name:
            values[section] = given.model_copy(deep=True) if isinstance(given, Section) else given
        elif isinstance(values.setdefault(section, type(given)()), Section):
            values[section] = values[section].model_copy(update={name: getattr(given, name)}, deep=True)
    if stage == "anneal":
        values["anneal"] = _active(values["anneal"], guided=bool({"reference", "cache"} & set(inputs)))
    if "rmt" in values and not recipe.rmt.enabled:
        values["rmt"] = RMT(enabled=False)
    return Recipe().model_copy(update=values)


def _active(anneal: Anneal, *, guided: bool) -> Anneal:
    """The anneal with the settings of its own objective alone."""
    if not guided:
        anneal = anneal.model_copy(update={"objective": "uniform"})
    idle = {
        name: type(value)()
        for name in Anneal.model_fields
        if isinstance(value := getattr(anneal, name), Guided) and value is not anneal.guide
    }
    return anneal.model_copy(update=idle)


def runnable(read: Recipe, stage: str) -> Recipe:
    """What ``what_is_read`` left, as a recipe that may be: the other stages are disabled, or as small as can be.

    A recipe needs a stage besides pre-training; SFT, which asks for nothing else, stands for it.
    """
    parallel = read.parallel
    smallest = {
        "micro_batch_size": 1,
        "global_batch_size": read.data_parallel * parallel.pipeline,
        "sequence_length": 16 * parallel.tensor,
    }
    values = read.model_dump()
    for name, kind in (("pretrain", Pretrain), ("sft", SFT)):
        if name not in READS[stage]:
            values[name] = kind(**smallest).model_dump()
    for name in ("anneal", "rmt", "rl"):
        if name not in READS[stage]:
            values[name]["enabled"] = False
    return validate(Recipe, values)
