"""Everything that can be known to be wrong before a stage starts. Imports no torch."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path

from nemo_rmt.chain import fixed_differences, plan_chain, recipe_digest
from nemo_rmt.config import FP8_CAPABILITY, VOCAB_MULTIPLE, Recipe
from nemo_rmt.errors import UserError
from nemo_rmt.families import config_json
from nemo_rmt.plan.activations import element_size
from nemo_rmt.plan.inputs import input_checks, tokenizer_size
from nemo_rmt.plan.parameters import parameter_count
from nemo_rmt.process import gpu_count
from nemo_rmt.recipe_io import load_recipe
from nemo_rmt.reference_cache import cached_reference, open_reference, require_fitting
from nemo_rmt.run_folder import RunFolder, State, check_space, check_writable
from nemo_rmt.stages.lm_eval.tasks import require_installed

CHECKPOINT_BYTES_PER_PARAMETER = 16
"""fp32 weights, fp32 master weights and two Adam moments."""
DATA_BYTES_PER_CHARACTER = 2
"""Token ids of a byte-level vocabulary need fewer; the tokenizer and metrics fit in the rest."""


def check(recipe: Recipe, run: RunFolder, *, download: bool = False, here: bool = True) -> None:
    """Raise UserError for anything that would make a stage fail later; leaves nothing behind.

    Checked: the layout fits this machine, data, tasks, tokenizer, checkpoints given from outside, the run
    folder's earlier state, and that it can be written and has room.
    download: only the data stage is to run, in one process, and may fetch what the recipe names from the Hugging
    Face hub: the machines and checkpoints that training needs are not looked at.
    here: the stages run on this machine; otherwise it is not asked what it has.
    """
    if not download:
        check_lengths(recipe)
        check_published(recipe)
    if here and not download:
        check_machine(recipe)
    state = check_state(recipe, run)
    built = state is not None and state.record(0, "data").status == "done"
    for each in input_checks(recipe, data_built=built, download=download):
        if not download or not each.of_training:
            each.run()
    if built and not download:
        check_reference(recipe, run.stage_dir(0, "data"))
    check_writable(run.path)
    check_space(run.path, space_needed(recipe, run, tokenizer_size(recipe)))


def check_reference(recipe: Recipe, data: Path) -> None:
    """Raise UserError when ReMiT is to read a cache that is not of what the data stage made in ``data``."""
    if (reference := cached_reference(recipe)) is not None:
        require_fitting(open_reference(recipe, Path(reference.cache)), recipe, reference, data)


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


def space_needed(recipe: Recipe, run: RunFolder, vocab_size: int) -> int:
    """Bytes the stages still to come will write: their checkpoints, and one more while it is being saved."""
    remaining = [p.ref for p in plan_chain(recipe) if run.result(p.ref.iteration, p.ref.stage) is None]
    if not remaining:
        return 0
    trained = [ref for ref in remaining if ref.stage not in ("data", "evaluate")]
    checkpoints = len(trained) * recipe.flywheel.keep_checkpoints + bool(trained)
    exported = sum(ref.stage == "evaluate" for ref in remaining) if recipe.evaluate.lm_eval.enabled else 0
    parameters = parameter_count(recipe, vocab_size)
    data = sum(Path(c.path).stat().st_size for c in recipe.data.corpora if c.path and Path(c.path).is_file())
    return (
        checkpoints * parameters * CHECKPOINT_BYTES_PER_PARAMETER
        + exported * parameters * element_size(recipe.model)
        + data * DATA_BYTES_PER_CHARACTER
        + 32 * 2**20  # metrics, logs, generated corpora, report
    )


def check_machine(recipe: Recipe) -> None:
    """Raise UserError unless this machine has what each node of the recipe's cluster needs."""
    gpus = gpu_count()
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
    if recipe.model.layers == "transformer_engine" and not gpus:
        remedy = "model.layers=local" + (" and model.fp8=null" if recipe.model.fp8 else "")
        raise UserError(f"model.layers=transformer_engine needs a GPU and none is visible: set {remedy}")
    guide = recipe.anneal.guide if recipe.anneal.enabled else None
    if guide is not None and guide.offload and not gpus:
        key = f"{recipe.anneal.guide_key}.offload"
        raise UserError(f"{key}=true makes room on a GPU and none is visible: set {key}=false")
    check_accelerator(recipe)
    check_sampler(recipe)
    require_installed(recipe)


def check_published(recipe: Recipe) -> None:
    """Raise UserError when vLLM or lm-eval is to have a model that no published architecture expresses."""
    asking = {
        "rollout.engine=vllm": recipe.rollout.engine == "vllm",
        "evaluate.lm_eval.enabled=true": recipe.evaluate.lm_eval.enabled,
    }
    if any(asking.values()):
        try:
            config_json(recipe.model, VOCAB_MULTIPLE, eos=0)
        except UserError as error:
            raise UserError(f"{' and '.join(key for key, asked in asking.items() if asked)}: {error}") from None


def check_sampler(recipe: Recipe) -> None:
    """Raise UserError unless what samples is installed, and a server that the run starts has GPUs of its own."""
    rollout, gpus = recipe.rollout, gpu_count()
    if rollout.engine != "vllm":
        return
    if importlib.util.find_spec("vllm") is None:
        raise UserError(
            "rollout.engine=vllm, but vLLM is not installed: pip install 'nemo-rmt[vllm]', or set "
            "rollout.engine=megatron"
        )
    if gpus and rollout.vllm.placement == "server" and rollout.vllm.url is None:
        needed = recipe.cluster.gpus_per_node + rollout.vllm.tensor * rollout.vllm.data
        if needed > gpus:
            raise UserError(
                f"rollout.vllm.placement=server takes rollout.vllm.tensor × data = {rollout.vllm.tensor} × "
                f"{rollout.vllm.data} GPUs beside cluster.gpus_per_node={recipe.cluster.gpus_per_node}, and this "
                f"machine has {gpus}: lower one of them, or give rollout.vllm.url"
            )


def check_accelerator(recipe: Recipe) -> None:
    """Raise UserError unless Transformer Engine is installed and the GPUs can do FP8, where the recipe asks for them.

    The compute capability is that of the GPUs visible here, else cluster.gpu_compute_capability.
    """
    model = recipe.model
    if model.layers != "transformer_engine":
        return
    if importlib.util.find_spec("transformer_engine") is None:
        raise UserError(
            f"model.layers=transformer_engine{f' with model.fp8={model.fp8}' if model.fp8 else ''}, but Transformer "
            "Engine is not installed: pip install 'nemo-rmt[fp8]' or set model.layers=local"
            + (" and model.fp8=null" if model.fp8 else "")
        )
    if model.fp8 is None:
        return
    seen, needed = compute_capability(), _number(FP8_CAPABILITY[model.fp8_recipe])
    found = recipe.cluster.gpu_compute_capability if seen is None else seen
    if found < needed:
        blocks = found >= _number(FP8_CAPABILITY["tensorwise"])
        which = "cluster.gpu_compute_capability is" if seen is None else "the visible GPU has"
        raise UserError(
            f"model.fp8={model.fp8} with model.fp8_recipe={model.fp8_recipe} needs GPUs of compute capability {needed} "
            f"or more, {which} {found}: set model.{'fp8_recipe=tensorwise' if blocks else 'fp8=null'}"
        )


def _number(capability: tuple[int, int]) -> float:
    return capability[0] + capability[1] / 10


def compute_capability() -> float | None:
    """The lowest of the GPUs visible to processes started from here; None without one, or without nvidia-smi."""
    if not gpu_count():
        return None
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        listing = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
        return min(float(line) for line in listing.split())
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def check_lengths(recipe: Recipe) -> None:
    """Raise UserError for rows that leave no room, or are longer than the model's positions."""
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
