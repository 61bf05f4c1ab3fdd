"""Everything that can be known to be wrong before a stage starts. Imports no torch."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path

from nemo_rmt.chain import fixed_differences, plan_chain, recipe_digest
from nemo_rmt.compatibility import require_compatible
from nemo_rmt.config import Recipe
from nemo_rmt.errors import UserError
from nemo_rmt.process import gpu_count
from nemo_rmt.recipe_io import load_recipe
from nemo_rmt.run_folder import RunFolder, State, check_space, check_writable

logger = logging.getLogger(__name__)

CHECKPOINT_BYTES_PER_PARAMETER = 16
"""fp32 weights, fp32 master weights and two Adam moments."""
DATA_BYTES_PER_CHARACTER = 2
"""Token ids of a byte-level vocabulary need fewer; the tokenizer and metrics fit in the rest."""


def check(recipe: Recipe, run: RunFolder) -> None:
    """Raise UserError for anything that would make a stage fail later; leaves nothing behind.

    Checked: the layout fits this machine, data, tasks, tokenizer, checkpoints given from outside, the run
    folder's earlier state, and that it can be written and has room.
    """
    _check_machine(recipe)
    _check_lengths(recipe)
    state = check_state(recipe, run)
    if state is None or state.record(0, "data").status != "done":
        _check_corpora(recipe)
    _check_tasks(recipe)
    _check_scores(recipe)
    vocab_size = _check_tokenizer_and_checkpoints(recipe)
    check_writable(run.path)
    check_space(run.path, space_needed(recipe, run, vocab_size))


def check_state(recipe: Recipe, run: RunFolder) -> State | None:
    """The run's state, None if it has not started. Raises UserError when it is another recipe's."""
    state = run.load_state()
    if state is None:
        if any(run.path.glob("iteration_*")):
            raise UserError(f"run_dir={run.path} has iteration folders but no state.json: choose another run_dir")
        return None
    if run.recipe_path.is_file():
        earlier = load_recipe(None, [run.recipe_path], [])
        if differences := fixed_differences(earlier, recipe):
            raise UserError(
                f"run_dir={run.path} holds a run of another recipe; these keys differ: {'; '.join(differences)}. "
                "Choose another run_dir, or undo the change"
            )
    if state.recipe != recipe_digest(recipe):
        raise UserError(
            f"run_dir={run.path} holds a run of another recipe (state.json was made by one with another digest than "
            f"{run.recipe_path.name} and this one have): choose another run_dir"
        )
    return state


def parameter_count(recipe: Recipe, vocab_size: int) -> int:
    """Parameters of the model, from its configuration."""
    m = recipe.model
    head = m.head_dim or m.hidden_size // m.num_attention_heads
    attention = m.hidden_size * head * 2 * (m.num_attention_heads + m.num_query_groups)
    layer = attention + 3 * m.hidden_size * m.ffn_hidden_size + 2 * m.hidden_size
    return m.num_layers * layer + vocab_size * m.hidden_size * (1 if m.tie_embeddings else 2) + m.hidden_size


def space_needed(recipe: Recipe, run: RunFolder, vocab_size: int) -> int:
    """Bytes the stages still to come will write: their checkpoints, and one more while it is being saved."""
    remaining = [p.ref for p in plan_chain(recipe) if run.result(p.ref.iteration, p.ref.stage) is None]
    if not remaining:
        return 0
    trained = [ref for ref in remaining if ref.stage not in ("data", "evaluate")]
    checkpoints = len(trained) * recipe.flywheel.keep_checkpoints + bool(trained)
    data = sum(Path(c.path).stat().st_size for c in recipe.data.corpora if c.path and Path(c.path).is_file())
    return (
        checkpoints * parameter_count(recipe, vocab_size) * CHECKPOINT_BYTES_PER_PARAMETER
        + data * DATA_BYTES_PER_CHARACTER
        + 32 * 2**20  # metrics, logs, generated corpora, report
    )


def _check_machine(recipe: Recipe) -> None:
    gpus = gpu_count()
    if recipe.cluster.nodes > 1:
        raise UserError(
            f"cluster.nodes={recipe.cluster.nodes}: this version starts stages on one machine only (it has no Slurm "
            "launcher yet): set cluster.nodes=1"
        )
    if gpus and recipe.cluster.gpus_per_node > gpus:
        raise UserError(
            f"cluster.gpus_per_node={recipe.cluster.gpus_per_node}, but this machine has {gpus} visible GPU(s): lower "
            "it, or set CUDA_VISIBLE_DEVICES= to run CPU processes"
        )
    if recipe.tracking.wandb_project and importlib.util.find_spec("wandb") is None:
        raise UserError(
            f"tracking.wandb_project={recipe.tracking.wandb_project}, but wandb is not installed: "
            "pip install 'nemo-rmt[wandb]', or set tracking.wandb_project=null"
        )
    if recipe.model.layers == "transformer_engine":
        if importlib.util.find_spec("transformer_engine") is None:
            raise UserError(
                "model.layers=transformer_engine, but Transformer Engine is not installed: pip install 'nemo-rmt[fp8]' "
                "or set model.layers=local"
            )
        if not gpus:
            raise UserError("model.layers=transformer_engine needs a GPU and none is visible: set model.layers=local")


def _check_lengths(recipe: Recipe) -> None:
    if recipe.rl.enabled and recipe.rollout.max_new_tokens >= recipe.rl.sequence_length:
        raise UserError(
            f"rollout.max_new_tokens={recipe.rollout.max_new_tokens} leaves no room for a prompt in "
            f"rl.sequence_length={recipe.rl.sequence_length}: raise rl.sequence_length"
        )
    if recipe.evaluate.sequence_length > recipe.model.max_position:
        raise UserError(
            f"evaluate.sequence_length={recipe.evaluate.sequence_length} exceeds "
            f"model.max_position={recipe.model.max_position}"
        )


def _check_corpora(recipe: Recipe) -> None:
    from nemo_rmt.data.corpora import check_corpus  # data code is loaded for runs only

    if not recipe.data.corpora:
        raise UserError("data.corpora is empty: name at least one corpus, or start from a recipe such as tiny")
    for corpus in recipe.data.corpora:
        check_corpus(corpus, recipe.data)


def _check_tasks(recipe: Recipe) -> None:
    from nemo_rmt.data.sft import SFTExamples
    from nemo_rmt.data.tasks import make_task

    if recipe.rl.enabled and not recipe.data.tasks:
        raise UserError("data.tasks is empty: RL needs at least one task, for example [{name: chains}]")
    for task in recipe.data.tasks:
        make_task(task)
    if recipe.sft.enabled:
        SFTExamples(recipe.data, recipe.seed)  # reads every line of sft_path


def _check_scores(recipe: Recipe) -> None:
    scores = recipe.rmt.difficulty.scores
    if recipe.rmt.enabled and scores is not None and not (Path(scores) / "difficulty.json").is_file():
        raise UserError(
            f"rmt.difficulty.scores={scores} has no difficulty.json: give the folder of an earlier run's scores "
            "(iteration_000/data/difficulty/...), or null to score the corpora"
        )


def _check_tokenizer_and_checkpoints(recipe: Recipe) -> int:
    """Check tokenizer.path and the checkpoints given as folders; returns the vocabulary's size."""
    given = {}
    if recipe.pretrain.checkpoint is not None:
        given["pretrain.checkpoint"] = recipe.pretrain.checkpoint
    if recipe.anneal.enabled and recipe.anneal.objective == "remit":
        if recipe.anneal.remit.reference != "previous":
            given["anneal.remit.reference"] = recipe.anneal.remit.reference
        elif recipe.iterations == 1:
            logger.info("note: with iterations=1 there is no earlier RL model, so the only anneal is uniform")
    scorer = recipe.rmt.difficulty.scorer
    if recipe.rmt.enabled and scorer != "start":
        given["rmt.difficulty.scorer"] = scorer
    if recipe.tokenizer.path is None:
        for key, folder in given.items():
            raise UserError(
                f"{key}={folder} needs the tokenizer it was trained with, and tokenizer.path is null (a new one would "
                "be trained): set tokenizer.path to that run's iteration_000/data/tokenizer"
            )
        return recipe.tokenizer.vocab_size
    from nemo_rmt.data.thoughts import branch_prompt
    from nemo_rmt.data.tokenizer import Tokenizer

    if not (Path(recipe.tokenizer.path) / "tokenizer.json").is_file():
        raise UserError(f"tokenizer.path={recipe.tokenizer.path} is not a tokenizer folder: it has no tokenizer.json")
    tokenizer = Tokenizer.load(Path(recipe.tokenizer.path))
    if recipe.rmt.enabled and recipe.rmt.objective == "rmt":
        branch_prompt(tokenizer, recipe.rmt.prompt, recipe.rmt.budget.initial)  # needs <think> and </think>
    for key, folder in given.items():
        require_compatible(Path(folder), recipe.model, tokenizer.vocab_size, tokenizer.fingerprint, key)
    return tokenizer.vocab_size
