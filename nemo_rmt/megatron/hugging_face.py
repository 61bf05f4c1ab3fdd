"""Published weights in and out: a Hugging Face folder as a checkpoint, and model chunks as a Hugging Face folder.

At any layout each rank reads the parts of tensors that are its own, and one writes tensors that all put together, one
at a time: no process ever has the whole of a model that is spread over several.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.parallel_state import (
    get_data_parallel_rank,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)

from nemo_rmt.compatibility import IMPORTED
from nemo_rmt.config import VOCAB_MULTIPLE, Model, Parallel
from nemo_rmt.data.tokenizer import Tokenizer
from nemo_rmt.errors import UserError
from nemo_rmt.families import config_json, model_from_config, read_object
from nemo_rmt.manifest import inspect_checkpoint
from nemo_rmt.megatron.checkpoint import load_weights, require_sound, save_weights
from nemo_rmt.megatron.model import DTYPES, LogprobGPT, build_model
from nemo_rmt.megatron.published import (
    OUTPUT,
    Counterpart,
    counterparts,
    own_parameters,
    published_shapes,
    published_stream,
)
from nemo_rmt.megatron.runtime import distributed
from nemo_rmt.megatron.safetensors_files import PublishedFiles, write_safetensors
from nemo_rmt.megatron.writing import complete_draft, failing_together, on_every_rank, raise_first, rank_0
from nemo_rmt.run_folder import sync, write_json

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
SHARD_BYTES = 5 * 10**9
"""Largest file of an exported model, as transformers makes them."""
PATIENCE = datetime.timedelta(days=1)
"""How long ranks wait for one that reads or writes; when it ends the others are ended too."""


def import_checkpoint(source: Path, target: Path, precision: str, parallel: Parallel | None = None) -> None:
    """Make a checkpoint, without optimizer state, of a Hugging Face folder; its tokenizer goes to ``target/tokenizer``.

    Called by every rank of the layout ``parallel`` (None: by one process alone). precision: of the weights written,
    fp32 or bf16.

    Raises UserError when the folder is not that of a model we support, or ``target`` exists.
    """
    source, target, parallel = Path(source), Path(target), parallel or Parallel()
    _refuse_existing(target, target.exists())
    settings = model_from_config(source).model_copy(update={"precision": _known(precision)})
    require_layout(settings, parallel)
    tokenizer = _tokenizer(source)
    vocab_size = settings.vocab_size
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"source={source}: its tokenizer has {tokenizer.vocab_size} tokens and its model {vocab_size}: "
            "the tokenizer does not belong to the model"
        )
    files = published_files(source, settings)
    identity = {
        "stage": IMPORTED,
        "iteration": 0,
        "step": 0,
        "model": settings.model_dump(mode="json"),
        "vocab_size": vocab_size,
        "tokenizer": tokenizer.fingerprint,
    }
    deferred: list[OSError] = []
    with distributed(parallel, seed=0, timeout=PATIENCE), drafted(target) as draft:
        chunks = build_model(settings, parallel, vocab_size, initialize=False)
        load_published(files, settings, chunks)
        with failing_together(deferred):
            save_weights(draft, chunks)
        rank_0(lambda: raise_first(deferred))
        rank_0(lambda: _copy_tokenizer(source, draft / "tokenizer"))
        rank_0(lambda: complete_draft(draft, target, identity, {}))


def published_files(folder: Path, settings: Model) -> PublishedFiles:
    """A folder's weights. Raises UserError when they are not those that ``settings``, made of its config.json, asks
    for."""
    files = PublishedFiles(folder)
    # Where the embedding is tied, some folders have a copy of it.
    files.require(
        published_shapes(settings, settings.vocab_size), {"lm_head.weight"} if settings.tie_embeddings else set()
    )
    return files


@torch.no_grad()
def load_published(files: PublishedFiles, settings: Model, chunks: list[LogprobGPT]) -> None:
    """Fill this rank's chunks from published weights. Each rank reads its own parts; no communication."""
    entries = {entry.parameter: entry for entry in counterparts(settings, chunks[0].true_vocab_size)}
    if settings.tie_embeddings:
        entries[OUTPUT] = entries["embedding.word_embeddings.weight"]
    for name, parameter in own_parameters(chunks):
        _fill(parameter, entries[name], files)


def _fill(parameter: torch.Tensor, entry: Counterpart, files: PublishedFiles) -> None:
    rank, size = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    for tensor, part in zip(entry.tensors, entry.parts(parameter, size), strict=True):
        found = files.read(tensor.name, tensor.local_range(rank, size))
        rows = len(found) // len(part)
        part[:, :rows].copy_(found.unflatten(0, (len(part), rows)))
        part[:, rows:].zero_()  # padding of the vocabulary


def export_checkpoint(
    source: Path, target: Path, tokenizer: Path, precision: str | None = None, parallel: Parallel | None = None
) -> None:
    """Make a Hugging Face folder of a checkpoint. Called by every rank of the layout, as ``import_checkpoint``.

    tokenizer: folder of the tokenizer that the checkpoint was trained with. precision: None for the checkpoint's.

    Raises UserError when the checkpoint is damaged, no published architecture expresses its model, the tokenizer is
    another, or ``target`` exists.
    """
    source, target, parallel = Path(source), Path(target), parallel or Parallel()
    _refuse_existing(target, target.exists())
    info = inspect_checkpoint(source)
    settings = Model(**{key: value for key, value in info.model.items() if key in Model.model_fields})
    # Layers of either kind save the same weights, and here may be no GPU for Transformer Engine's.
    plain = {"layers": "local", "fp8": None, "fp8_bf16_layers": (0, 0)}
    settings = settings.model_copy(update={**plain, "precision": _known(precision or settings.precision)})
    require_layout(settings, parallel)
    found = _tokenizer(tokenizer)
    if found.fingerprint != info.tokenizer:
        raise UserError(
            f"tokenizer={tokenizer} is not the tokenizer that {source} was trained with (fingerprint "
            f"{found.fingerprint[:12]}, the checkpoint's is {info.tokenizer[:12]}): give that one's folder"
        )
    config_json(settings, info.vocab_size, eos=found.eod)  # refuses before anything is read
    with distributed(parallel, seed=0, timeout=PATIENCE):
        require_sound(source)
        chunks = build_model(settings, parallel, info.vocab_size, initialize=False)
        load_weights(source, chunks)
        export_folder(chunks, settings, target, tokenizer, info.vocab_size)


def export_folder(
    chunks: list[LogprobGPT],
    settings: Model,
    target: Path,
    tokenizer_folder: Path,
    vocab_size: int,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a model in use as a Hugging Face folder: weights, config.json, generation_config.json, tokenizer.

    Collective over all ranks; rank 0 writes. vocab_size: tokens the model predicts over. shard_bytes: largest file.

    Raises on every rank: UserError when no published architecture expresses the model, the tokenizer has more tokens
    than it, or ``target`` exists; OSError when it cannot be written. Nothing is left then.
    """
    target = Path(target)
    tokenizer = _tokenizer(tokenizer_folder)
    config = config_json(settings, vocab_size, eos=tokenizer.eod, pad=tokenizer.pad)
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"tokenizer {tokenizer_folder} has {tokenizer.vocab_size} tokens, the model predicts over {vocab_size}: "
            "the tokenizer does not belong to the model"
        )
    _refuse_existing(target, any(on_every_rank(target.exists)))
    with drafted(target) as draft:
        on_every_rank(lambda: _stream_out(chunks, settings, draft, vocab_size, shard_bytes))

        def complete() -> None:
            write_json(draft / "config.json", config)
            write_json(draft / "generation_config.json", {"eos_token_id": tokenizer.eod, "pad_token_id": tokenizer.pad})
            _copy_tokenizer(tokenizer_folder, draft)
            os.replace(draft, target)
            sync(target.parent)

        rank_0(complete)


def _stream_out(chunks: list[LogprobGPT], settings: Model, folder: Path, vocab_size: int, shard_bytes: int) -> None:
    """Write the weights, on rank 0, and take part in putting them together, on the model-parallel group it is in."""
    if get_data_parallel_rank():
        return
    tensors = published_stream(chunks, settings)
    try:
        if dist.get_rank() == 0:
            write_safetensors(folder, published_shapes(settings, vocab_size), tensors, shard_bytes)
    finally:
        for _ in tensors:  # also when writing failed: the others wait for this rank at each of them
            pass


def require_layout(settings: Model, parallel: Parallel) -> None:
    """Raise UserError unless the model can be split over that many tensor-parallel ranks and pipeline stages."""
    sizes = {key: getattr(settings, key) for key in ("num_attention_heads", "num_query_groups", "ffn_hidden_size")}
    for key, value in {**sizes, "vocabulary rows": VOCAB_MULTIPLE}.items():
        if value % parallel.tensor:
            raise UserError(f"tensor={parallel.tensor} does not divide the model's {key}={value}: choose one that does")
    if settings.num_layers % parallel.pipeline:
        raise UserError(
            f"pipeline={parallel.pipeline} does not divide the model's num_layers={settings.num_layers}: "
            "choose one that does"
        )


@contextlib.contextmanager
def drafted(target: Path) -> Iterator[Path]:
    """A new folder beside ``target``, which the block fills and renames; nothing is left when it fails. Collective."""
    draft = target.with_name(f"{target.name}.tmp")

    def make() -> None:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)

    rank_0(make)
    try:
        yield draft
    except BaseException:
        if dist.get_rank() == 0:
            shutil.rmtree(draft, ignore_errors=True)
        raise


def _copy_tokenizer(source: Path, target: Path) -> None:
    """A tokenizer's files, from which transformers' AutoTokenizer makes the same one."""
    target.mkdir(exist_ok=True)
    settings = source / "tokenizer_config.json"
    if not settings.is_file() or "tokenizer_class" not in read_object(settings, "download it again"):
        Tokenizer.load(source).save(target)
        return
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
            sync(target / name)


def _tokenizer(folder: Path) -> Tokenizer:
    """A folder's tokenizer. Raises UserError when it has none, or one that brings code of its own."""
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder} has no tokenizer.json: download the model again, with its tokenizer")
    settings = folder / "tokenizer_config.json"
    if settings.is_file() and "auto_map" in read_object(settings, "download it again"):
        raise UserError(f"{settings} has auto_map: the tokenizer brings code of its own, which is never run")
    return Tokenizer.load(folder)


def _known(precision: str) -> str:
    if precision not in DTYPES:
        raise UserError(f"precision={precision} is not one of {', '.join(DTYPES)}")
    return precision


def _refuse_existing(target: Path, exists: bool) -> None:
    if exists:
        raise UserError(f"target={target} exists: give a new folder, or delete it")
