"""Held-out measurements of every model an iteration made: text, tokens by difficulty, and the tasks."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from pathlib import Path

import torch

from nemo_rmt import profiling
from nemo_rmt.config import TIERS
from nemo_rmt.data.batch import TokenBatch
from nemo_rmt.manifest import checkpoint_step, step_folders
from nemo_rmt.megatron.datasets import held_out_rows
from nemo_rmt.megatron.runtime import broadcast_from_last_stage, sum_over_data_parallel
from nemo_rmt.megatron.train_step import ScoredModel
from nemo_rmt.objectives import assign_tiers
from nemo_rmt.stages.difficulty import scorer_checkpoint
from nemo_rmt.stages.held_out_positions import HeldOutPositions
from nemo_rmt.stages.held_out_tasks import evaluate_tasks
from nemo_rmt.stages.lm_eval import harness
from nemo_rmt.stages.session import Session


def run(session: Session) -> None:
    """Measure each checkpoint; the last one's figures have plain names, the others their stage's as a prefix.

    Where the recipe asks for it lm-eval measures the last one too.
    """
    began = time.perf_counter()
    if session.recipe.evaluate.lm_eval.enabled:
        harness.require_exportable(session)
    roles = [role for role in session.job.inputs if role != "data"]
    positions = held_out_positions(session, roles)
    metrics = json.loads((session.data_folder / "result.json").read_text())["metrics"]
    metrics = {name: value for name, value in metrics.items() if name.endswith("/unigram_nll")}
    tokens, model = 0, None
    for role, checkpoint in measured_checkpoints(session, roles):
        with profiling.part("checkpoint"):
            if model is None:
                model = session.frozen_model(checkpoint)
            else:
                session.load_weights(checkpoint, model.modules)
        language, scored = evaluate_text(session, model)
        tasks, sampled = evaluate_tasks(session, model)
        reasoned, thought = positions.measure(model) if positions and role in roles else ({}, 0)
        prefix = "" if role == roles[-1] else f"{role}/"
        metrics |= {f"{prefix}{name}": value for name, value in {**language, **reasoned, **tasks}.items()}
        tokens += scored + sampled + thought
        if session.layout.rank == 0:
            print(f"[{session.job.iteration}/evaluate] {role}: lm/all/nll {language['lm/all/nll']:.3f}", flush=True)
    if session.recipe.evaluate.lm_eval.enabled:
        harness.export(session, model.modules)
        del model, positions  # lm-eval needs the memory
        torch.cuda.empty_cache()
        metrics |= harness.measure(session)
    session.finish(metrics, checkpoint=None, wall_s=time.perf_counter() - began, tokens=tokens)


def measured_checkpoints(session: Session, roles: list[str]) -> list[tuple[str, Path]]:
    """What to measure, under which name: every role's checkpoint, and those that the anneal kept before its last one as
    anneal@STEP where the recipe asks for them."""
    found = []
    for role in roles:
        last = session.require_input(role)
        if role == "anneal" and session.recipe.evaluate.along:
            earlier = [folder for folder in reversed(step_folders(last.parent.parent)) if folder.name < last.name]
            found += [(f"anneal@{checkpoint_step(folder)}", folder) for folder in earlier]
        found.append((role, last))
    return found


def held_out_positions(session: Session, roles: list[str]) -> HeldOutPositions | None:
    """The positions to predict after a thought, by the difficulty they have for the model RMT starts from."""
    rmt = session.recipe.rmt
    if not rmt.enabled or not session.recipe.evaluate.positions:
        return None
    start = session.require_input("anneal" if "anneal" in roles else roles[0])
    with profiling.part("checkpoint"):
        scorer = session.frozen_model(scorer_checkpoint(rmt, start))
    return HeldOutPositions(session, scorer)


def evaluate_text(session: Session, model: ScoredModel) -> tuple[dict[str, float], int]:
    """Nats per held-out token of every domain, and next-token accuracy by the model's own entropy."""
    settings, totals, scored = session.recipe.evaluate, defaultdict(float), 0
    for corpus in session.recipe.data.corpora:
        with profiling.part("data"):
            prefix = session.data_folder / corpus.name / "held_out"
            rows = held_out_rows(prefix, settings.sequence_length, settings.max_tokens)
            batch = whole_batches(session, rows, settings.micro_batch_size)
        scores = model.score(batch, settings.micro_batch_size, with_entropy=True)
        sums = {}
        if scores is not None:
            mask = batch.loss_mask.bool()
            sums[f"{corpus.name}/nll"] = -scores.logprobs[mask].double().sum().item()
            sums[f"{corpus.name}/count"] = mask.sum().item()
            tiers = assign_tiers(scores.entropy[mask], settings.tier_edges)
            for tier, name in enumerate(TIERS):
                sums[f"{name}/hits"] = scores.hits[mask][tiers == tier].sum().item()
                sums[f"{name}/count"] = (tiers == tier).sum().item()
        for name, value in sum_over_data_parallel(broadcast_from_last_stage(sums)).items():
            totals[name] += value
        scored += rows.numel()
    domains = [corpus.name for corpus in session.recipe.data.corpora]
    metrics = {f"lm/{domain}/nll": totals[f"{domain}/nll"] / totals[f"{domain}/count"] for domain in domains}
    count = sum(totals[f"{domain}/count"] for domain in domains)
    metrics["lm/all/nll"] = sum(totals[f"{domain}/nll"] for domain in domains) / count
    for name in TIERS:
        metrics[f"tokens/{name}/share"] = totals[f"{name}/count"] / count
        if totals[f"{name}/count"]:
            metrics[f"tokens/{name}/accuracy"] = totals[f"{name}/hits"] / totals[f"{name}/count"]
    return metrics, scored


def whole_batches(session: Session, rows: torch.Tensor, micro_batch_size: int) -> TokenBatch:
    """This rank's share of the rows, the last ones repeated without loss to fill every rank's micro-batches."""
    size = session.layout.data_size
    missing = session.whole_rows(-(-len(rows) // size), micro_batch_size) * size - len(rows)
    filled = torch.cat([rows, rows[:1].expand(missing, -1)])
    batch = TokenBatch.from_documents(filled, session.tokenizer.eod, session.recipe.data.document_attention)
    batch.loss_mask[len(rows) :] = 0
    return batch.select(list(session.shard(len(filled)))).to(session.layout.device)
