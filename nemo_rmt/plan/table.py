"""The plan's tables and the assumptions behind them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rich.table import Table

from nemo_rmt.config import Recipe
from nemo_rmt.plan.memory import GIB, RESERVED, RESERVED_SHARE, Memory, available
from nemo_rmt.plan.parameters import padded_rows, parameter_count
from nemo_rmt.plan.step_time import PRODUCTS_PER_BYTE, StepTime
from nemo_rmt.plan.workload import Workload
from nemo_rmt.preflight import space_needed
from nemo_rmt.run_folder import RunFolder

PARTS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "frozen": "frozen models",
    "activations": "activations",
    "layer": "a layer",
    "head": "logprob head",
    "sampling": "sampling",
    "update": "update",
}
"""Columns of the memory table, by field of Memory."""

VLLM_ASSUMED = {
    ("vllm", "colocated"): " vLLM has rollout.vllm.gpu_memory_utilization of every GPU, and the in-process time.",
    ("vllm", "server"): " The vLLM server's GPUs are not counted, and as fast as the training's.",
}
"""What else is assumed of sampling, by engine and placement."""


def memory_table(recipe: Recipe, memories: dict[Workload, Memory]) -> Table:
    """A row per stage, GiB."""
    room = available(recipe) / GIB
    title = f"GiB on the fullest GPU, of {room:.1f} ({recipe.cluster.gpu_memory_gib:g} less the reserve)"
    table = Table("stage", title=title)
    for heading in (*PARTS.values(), "peak"):
        table.add_column(heading, justify="right")
    table.add_column("fits")
    for workload, memory in memories.items():
        cells = [_gib(getattr(memory, part)) for part in PARTS]
        over = memory.peak - available(recipe)
        fits = "yes" if over <= 0 else f"no: {over / GIB:.1f} over"
        table.add_row(workload.name, *cells, _gib(memory.peak), fits)
    return table


def _gib(size: int) -> str:
    if not size:
        return "-"
    return f"{size / GIB:.1f}" if size >= 0.05 * GIB else "<0.1"


def time_table(times: dict[Workload, StepTime]) -> Table:
    """A row per stage, seconds of a step and hours of the chain."""
    table = Table("stage", title="Seconds of a step")
    for heading in ("turns", "steps", "tokens/step", "train", "score", "sample", "step", "tokens/s", "hours"):
        table.add_column(heading, justify="right")
    for workload, time in times.items():
        parts = (time.training, time.scoring, time.sampling, time.seconds)
        table.add_row(
            workload.name,
            str(workload.times),
            f"{workload.steps:,}",
            f"{time.tokens:,.0f}",
            *(f"{seconds:.3g}" if seconds else "-" for seconds in parts),
            f"{time.tokens_per_second:,.0f}",
            f"{hours(workload, time):,.1f}",
        )
    total = sum(hours(workload, time) for workload, time in times.items())
    table.add_section()
    table.add_row("all", *[""] * 8, f"{total:,.1f}")
    return table


def hours(workload: Workload, time: StepTime) -> float:
    """Of a stage, in all turns."""
    return workload.times * workload.steps * time.seconds / 3600


def layout_lines(recipe: Recipe, vocab_size: int, memories: dict[Workload, Memory]) -> Iterator[str]:
    """Sizes, and what each rank has of them."""
    model, p, cluster = recipe.model, recipe.parallel, recipe.cluster
    yield (
        f"{parameter_count(recipe, vocab_size):,} parameters, {model.precision}"
        + (f", FP8 ({model.fp8}, {model.fp8_recipe})" if model.fp8 else "")
        + f"; {cluster.nodes} × {cluster.gpus_per_node} GPUs = tensor {p.tensor} × pipeline {p.pipeline} × context "
        f"{p.context} × data {recipe.data_parallel}"
    )
    yield (
        f"A rank has {model.num_attention_heads // p.tensor} of {model.num_attention_heads} heads, "
        f"{model.num_query_groups // p.tensor} of {model.num_query_groups} key/value heads, "
        f"{model.num_layers // p.pipeline} of {model.num_layers} layers, {padded_rows(vocab_size) // p.tensor:,} of "
        f"{padded_rows(vocab_size):,} embedding rows ({vocab_size:,} tokens)"
    )
    run = RunFolder(Path(recipe.run_dir))
    yield f"Checkpoints take up to {space_needed(recipe, run, vocab_size) / GIB:,.1f} GiB in run_dir={run.path}"
    for workload in memories:
        counts = f"micro-batches of {workload.rows} × {workload.sequence:,} tokens, {workload.micro_batches} a rank"
        yield f"{workload.name}: {counts}" + (f", {workload.updates} updates a step" if workload.updates > 1 else "")


def assumption_lines(recipe: Recipe, workloads: list[Workload]) -> Iterator[str]:
    """What the figures rest on."""
    c, model, parallel = recipe.cluster, recipe.model, recipe.parallel
    yield (
        f"Reserve: {RESERVED / GIB:g} GiB for CUDA and NCCL, and {RESERVED_SHARE:.0%} of cluster.gpu_memory_gib="
        f"{c.gpu_memory_gib:g} for fragmentation."
    )
    yield (
        "Gradients are float32, and so are Adam's two moments"
        + (" and the main parameters" if model.precision == "bf16" else "")
        + (", sharded over data-parallel ranks." if parallel.distributed_optimizer else ", on every rank.")
        + (
            " Fused Adam, from Transformer Engine."
            if model.layers == "transformer_engine"
            else " update: torch's AdamW, which copies a moment; a fused Adam would not."
        )
    )
    yield (
        "Peak: weights, gradients, optimizer and frozen models, and the largest of activations with a layer's or the "
        "head's backward, sampling, and update, which take turns."
    )
    yield (
        "Activations: what autograd keeps of Megatron's unfused layers with one attention kernel and one norm kernel"
        + (
            " (Transformer Engine's linear layers keep as much"
            + ("; in FP8, inputs in one byte)" if model.fp8 else ")")
            if model.layers == "transformer_engine"
            else ""
        )
        + f"; parallel.recompute={parallel.recompute}. Every row is as long as it may be."
    )
    if model.fp8:
        yield "FP8: two one-byte copies of the layers' weights beside BF16's; no speed-up is counted."
    yield (
        f"Time: {c.gpu_tflops:g} TFLOP/s (BF16's peak) × {c.gpu_efficiency:g} on every GPU; backward is twice forward, "
        f"recomputation one more; communication is in the efficiency."
        + (" In fp32 steps take longer than this." if model.precision == "fp32" else "")
    )
    bandwidth = c.gpu_tflops / PRODUCTS_PER_BYTE
    if any(workload.sampling for workload in workloads):
        yield (
            f"Sampling: a token at a time, bound by reading weights and caches at {bandwidth:.2f} TB/s "
            f"(as many TFLOP/s a TB/s as an H100) × {c.gpu_efficiency:g}, or by arithmetic; in BF16 or fp32."
            + VLLM_ASSUMED.get((recipe.rollout.engine, recipe.rollout.vllm.placement), "")
        )
    if any(workload.stage == "rl" for workload in workloads):
        yield "RL: every response is as long as rollout.max_new_tokens, every prompt as the rest of rl.sequence_length."
    if any(workload.stage == "rmt" for workload in workloads):
        yield (
            f"RMT: documents of {recipe.rmt.longest_document:,} tokens, rmt.curriculum.positions_per_document asked in "
            "each (for memory only one); thoughts as long as the budget, the longest of a batch twice that; no group "
            "dropped or replaced."
        )
    yield "Not counted: the data stage, scoring of difficulty, evaluation, writing checkpoints."
