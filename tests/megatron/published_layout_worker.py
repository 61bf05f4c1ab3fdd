"""Read published folders in one layout, compare, score, and write them again.

usage: published_layout_worker.py LAYOUT PARALLEL (as JSON) FOLDER ...

Each FOLDER is a Hugging Face folder; beside it FOLDER.LAYOUT is what was exported and FOLDER.LAYOUT.json the
log-probabilities of all tokens and the logits after the last ones.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from published_worker import rows
from safetensors.torch import load_file

from nemo_rmt.config import Parallel
from nemo_rmt.families import model_from_config
from nemo_rmt.megatron import generation
from nemo_rmt.megatron.hugging_face import export_folder, load_published
from nemo_rmt.megatron.model import LogprobGPT, build_model
from nemo_rmt.megatron.published import published_shapes, published_stream
from nemo_rmt.megatron.runtime import broadcast_from_last_stage, distributed
from nemo_rmt.megatron.safetensors_files import PublishedFiles
from nemo_rmt.megatron.train_step import ScoredModel

PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16"}
SHARD_BYTES = {"tp1": 5 * 10**9}
"""Largest file by layout, several files for the others."""


class Counted(PublishedFiles):
    """Counts the values it gives."""

    given = 0

    def read(self, name, part):
        found = super().read(name, part)
        self.given += found.numel()
        return found


def last_logits(chunks: list[LogprobGPT], tokens: torch.Tensor) -> torch.Tensor | None:
    """After each row's last token, ``[batch, vocabulary]`` on the last pipeline stage."""
    with torch.no_grad(), generation._inference(chunks, tokens.shape[1]):
        return generation._forward(chunks, tokens, torch.arange(tokens.shape[1]).expand_as(tokens), None)


def measured(folder: Path, layout: str, parallel: Parallel) -> dict[str, list[list[float]]]:
    """The whole way, with what must hold on every rank on the way."""
    weights = load_file(folder / "model.safetensors")
    dtype = next(iter(weights.values())).dtype
    settings = model_from_config(folder).model_copy(update={"precision": PRECISIONS[dtype]})
    chunks = build_model(settings, parallel, settings.vocab_size, initialize=False)
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.data.fill_(torch.nan)  # whatever is not read shows

    files = Counted(folder)
    files.require(published_shapes(settings, settings.vocab_size), set())
    load_published(files, settings, chunks)
    assert files.given <= sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())
    assert all(parameter.isfinite().all() for chunk in chunks for parameter in chunk.parameters())

    names = []
    for name, tensor in published_stream(chunks, settings):
        names.append((name, tensor.dtype, tuple(tensor.shape)))
        assert torch.equal(tensor, weights[name]), name
        assert tensor.is_contiguous() and not tensor.requires_grad
    assert names == published_shapes(settings, settings.vocab_size)
    assert sorted(name for name, _, _ in names) == sorted(weights)

    scores, logits = ScoredModel(chunks, parallel).score(rows(), 2), last_logits(chunks, rows().tokens)
    said = scores and {"logprobs": scores.logprobs.tolist(), "logits": logits.tolist()}
    target = folder.with_name(f"{folder.name}.{layout}")
    export_folder(chunks, settings, target, folder, settings.vocab_size, SHARD_BYTES.get(layout, 100_000))
    return broadcast_from_last_stage(said)


if __name__ == "__main__":
    layout, parallel, *folders = sys.argv[1:]
    parallel = Parallel.model_validate_json(parallel)
    with distributed(parallel, seed=5) as place:
        for folder in map(Path, folders):
            found = measured(folder, layout, parallel)
            if place.rank == 0:
                folder.with_name(f"{folder.name}.{layout}.json").write_text(json.dumps(found))
