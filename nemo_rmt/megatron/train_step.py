"""One optimizer step, or one forward-only pass, at any tensor, pipeline and data-parallel layout."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor, nn

from nemo_rmt import profiling, pulse
from nemo_rmt.config import Model, Optim, Parallel
from nemo_rmt.data.batch import TokenBatch
from nemo_rmt.megatron.attention import row_structure
from nemo_rmt.megatron.cpu import redirected
from nemo_rmt.megatron.distillation import teacher_of
from nemo_rmt.megatron.guard import Guard
from nemo_rmt.megatron.head import TokenScores
from nemo_rmt.megatron.model import LogprobGPT
from nemo_rmt.megatron.optimizer import build_optimizer, build_scheduler, update_weights
from nemo_rmt.megatron.runtime import broadcast_from_last_stage, max_over_ranks
from nemo_rmt.objectives import LossOutput

Objective = Callable[[TokenScores, TokenBatch], LossOutput]
"""A loss over one micro-batch: pure torch on the head's scores and the batch's tensors."""

Forward = Callable[[nn.Module, TokenBatch], Tensor | TokenScores]
"""What a model chunk makes of one micro-batch."""


class ScoredModel:
    """A model that can score batches: forward only, through the pipeline, on every layout."""

    def __init__(self, chunks: list[nn.Module], parallel: Parallel):
        self.chunks = chunks
        self.parallel = parallel

    @property
    def modules(self) -> list[LogprobGPT]:
        """The bare model chunks, without DDP."""
        return [chunk.module if isinstance(chunk, DistributedDataParallel) else chunk for chunk in self.chunks]

    @torch.no_grad()
    def score(
        self,
        batch: TokenBatch,
        micro_batch_size: int,
        *,
        temperature: float = 1.0,
        with_entropy: bool = False,
        top_k: int = 0,
    ) -> TokenScores | None:
        """Score this data-parallel rank's rows.

        Args:
            batch: rows of this rank, a multiple of ``micro_batch_size``.
            micro_batch_size: rows per forward.
            temperature: of the softmax; where documents branch, in the branches, and 1 in the documents.
            with_entropy, top_k: see LogprobGPT.forward.

        Returns:
            TokenScores ``[rows, sequence]`` on the last pipeline stage, None on the others.
        """
        forward = functools.partial(_scores, temperature=temperature, with_entropy=with_entropy, top_k=top_k)
        outputs = self._run_forward(batch, micro_batch_size, forward, lambda scores, micro, non_loss_data: scores)
        if not outputs:
            return None
        return TokenScores(*(None if parts[0] is None else torch.cat(parts) for parts in zip(*outputs, strict=True)))

    def _run_forward(self, batch: TokenBatch, micro_batch_size: int, forward: Forward, collect: Callable) -> list:
        """Send a batch through the pipeline; what ``collect`` returned of each micro-batch on the last stage."""
        with profiling.part("scoring"):
            return self._run(batch.micro_batches(micro_batch_size), forward, collect, forward_only=True)

    def _run(self, micro_batches: list[TokenBatch], forward: Forward, loss: Callable, *, forward_only: bool) -> list:
        """Send micro-batches through Megatron's schedule; what ``loss`` returned on the last stage, else []."""
        doing = f"{'scoring' if forward_only else 'training on'} {len(micro_batches)} micro-batches"

        def forward_step(batches: Iterator[TokenBatch], model: nn.Module):
            pulse.tick(doing)
            micro = next(batches)
            return forward(model, micro), functools.partial(_on_output, loss, micro)

        chunked = self.parallel.virtual_pipeline is not None
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(micro_batches) for _ in self.chunks] if chunked else iter(micro_batches),
            model=self.chunks if chunked else self.chunks[0],
            num_microbatches=len(micro_batches),
            seq_length=micro_batches[0].tokens.shape[1],
            micro_batch_size=micro_batches[0].tokens.shape[0],
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )


def _inputs(micro: TokenBatch) -> tuple[Tensor, Tensor, Tensor]:
    """What every forward reads: tokens, positions, and what each token sees."""
    return micro.tokens, micro.position_ids, row_structure(micro.segment_ids, micro.branch_ids, micro.fork_columns)


def _scores(model: nn.Module, micro: TokenBatch, *, temperature: float, **asked) -> Tensor | TokenScores:
    """A micro-batch through a model chunk and, on the last stage, its head."""
    return model(*_inputs(micro), micro.labels, temperature=_temperatures(temperature, micro), **asked)


def _temperatures(temperature: float, micro: TokenBatch) -> float | Tensor:
    """The temperature; where documents branch, of the branches' predictions only: documents were not sampled."""
    if micro.branch_ids is None or temperature == 1.0:
        return temperature
    return torch.where(micro.branch_ids > 0, temperature, 1.0)


def _on_output(loss: Callable, micro: TokenBatch, output: Tensor | TokenScores, **keywords):
    """Adapt Megatron's one-argument loss call."""
    return loss(output, micro, **keywords)


class FrozenModel(ScoredModel):
    """A model that is scored only, such as a reference: its weights need no room on the GPU between scores.

    Args:
        chunks: with the weights they are to keep.
        offload: keep the weights in pinned host memory, and on the GPU only while they compute. Raises ValueError
            without a GPU.
    """

    def __init__(self, chunks: list[LogprobGPT], parallel: Parallel, *, offload: bool = False):
        super().__init__(chunks, parallel)
        self.offload = offload
        self._parameters = [parameter.requires_grad_(False) for chunk in chunks for parameter in chunk.parameters()]
        if not offload:
            return
        if not torch.cuda.is_available():
            raise ValueError("offload makes room on a GPU, and none is here")
        self._on_host = [parameter.data.cpu().pin_memory() for parameter in self._parameters]
        self._leave()

    @torch.no_grad()
    def hidden_states(self, batch: TokenBatch, micro_batch_size: int) -> Tensor | None:
        """What the head would score this data-parallel rank's rows by, for distillation.

        Returns:
            ``[rows, sequence, hidden]`` after the final norm, of the whole sequence, on the last pipeline stage; None
            on the others.
        """

        def collect(hidden: Tensor, micro: TokenBatch, non_loss_data: bool) -> Tensor:
            whole = gather_from_sequence_parallel_region(hidden) if self.parallel.sequence else hidden
            return whole.transpose(0, 1)

        outputs = self._run_forward(
            batch, micro_batch_size, lambda chunk, micro: chunk.hidden_states(*_inputs(micro)), collect
        )
        return torch.cat(outputs) if outputs else None

    @property
    def output_weight(self) -> Tensor | None:
        """See LogprobGPT on the last pipeline stage; None on the others. Of offloaded weights it is a copy on the GPU,
        which stays as long as it is held."""
        last = self.modules[-1]
        return last.output_weight.to(torch.cuda.current_device()) if last.post_process else None

    def _run_forward(self, *arguments) -> list:
        """As ScoredModel's, with the weights where they compute."""
        with self._on_gpu():
            return super()._run_forward(*arguments)

    @contextlib.contextmanager
    def _on_gpu(self) -> Iterator[None]:
        """Bring offloaded weights to the GPU for the block."""
        if not self.offload:
            yield
            return
        # On the stream of the forward, which thus waits for its weights, and whose last use precedes what comes next.
        for parameter, weights in zip(self._parameters, self._on_host, strict=True):
            parameter.data = weights.to(torch.cuda.current_device(), non_blocking=True)
        try:
            yield
        finally:
            self._leave()

    def _leave(self) -> None:
        """Drop the weights on the GPU."""
        for parameter, weights in zip(self._parameters, self._on_host, strict=True):
            parameter.data = weights


class TrainedModel(ScoredModel):
    """A model under DDP with Megatron's optimizer and schedule.

    Args:
        chunks: bare model chunks from ``build_model``.
        model, parallel, optim: the recipe's sections.
        steps: length of the stage, for the schedule.
    """

    def __init__(self, chunks: list[LogprobGPT], model: Model, parallel: Parallel, optim: Optim, steps: int):
        config = chunks[0].config
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=parallel.distributed_optimizer,
            # Overlapped parameter gathering is left out: it waits in the forward hooks of the modules, but the head and
            # checkpoints read weights without calling the modules that hold them.
            overlap_grad_reduce=parallel.overlap,
        )
        with redirected():
            wrapped = [
                DistributedDataParallel(config, ddp, chunk, disable_bucketing=index > 0)
                for index, chunk in enumerate(chunks)
            ]
        super().__init__(wrapped, parallel)
        self.optimizer = build_optimizer(optim, model, parallel, wrapped)
        self.scheduler = build_scheduler(optim, self.optimizer, steps)
        self.guard = Guard(optim.skip_spikes)
        config.finalize_model_grads_func = finalize_model_grads
        config.grad_scale_func = self.optimizer.scale_loss
        if parallel.overlap:
            chunked = parallel.virtual_pipeline is not None
            config.no_sync_func = [c.no_sync for c in wrapped] if chunked else wrapped[0].no_sync

    def train_step(
        self,
        micro_batches: list[TokenBatch],
        objective: Objective,
        *,
        temperature: float = 1.0,
        with_entropy: bool = False,
        teacher_weight: Tensor | None = None,
    ) -> dict[str, float | list[float]]:
        """One optimizer step over this data-parallel rank's micro-batches (the same number on every rank).

        The gradient is that of the summed loss over the summed token count of all ranks. ``temperature`` and
        ``with_entropy`` are those of ``score``. Micro-batches whose ``extras`` hold a teacher, see ``teacher_of``, have
        ``TokenScores.divergence``; ``teacher_weight`` is its output embedding. Returns the objective's metrics as
        means, with ``grad_norm`` and the ``lr`` used, the same on every rank.

        A step that ``guard`` does not accept advances the schedule alone: weights and Adam's moments stay as they are.
        """

        def loss(scores: TokenScores, micro: TokenBatch):
            output = objective(scores, micro)
            return output.loss_sum, output.num_tokens.to(torch.int), output.metrics

        def forward(chunk: nn.Module, micro: TokenBatch) -> Tensor | TokenScores:
            teacher = teacher_of(micro.extras, teacher_weight)
            return _scores(chunk, micro, temperature=temperature, with_entropy=with_entropy, teacher=teacher)

        with profiling.part("forward_backward"):
            for chunk in self.chunks:
                chunk.zero_grad_buffer()
            self.optimizer.zero_grad()
            outputs = self._run(micro_batches, forward, loss, forward_only=False)
        lr = self.optimizer.param_groups[0]["lr"]  # all have the same
        with profiling.part("optimizer"):
            pulse.tick("the optimizer's step")
            with redirected():
                self.optimizer.prepare_grads()
                grad_norm = self.optimizer.get_grad_norm()
            metrics = reduce_metrics(outputs)
            if self.guard.accepts(*max_over_ranks([metrics.get("loss", 0.0), grad_norm])):
                update_weights(self.optimizer, grad_norm)
            self.scheduler.step(1)
        return {**metrics, "grad_norm": float(grad_norm), "lr": float(lr)}


def reduce_metrics(outputs: list[dict[str, tuple[Tensor, Tensor]]]) -> dict[str, float | list[float]]:
    """Add (sum, count) pairs over micro-batches and data-parallel ranks, divide, and share with all pipeline stages.

    Args:
        outputs: one dict per micro-batch on the last stage, empty elsewhere. Sums are 0-d, or 1-d for histograms.
    """
    means: dict[str, float | list[float]] = {}
    if parallel_state.is_pipeline_last_stage(ignore_virtual=True) and outputs:
        names = sorted(outputs[0])
        rows = [torch.cat([part.reshape(-1) for name in names for part in output[name]]) for output in outputs]
        flat = torch.stack(rows).double().sum(0)
        dist.all_reduce(flat, group=parallel_state.get_data_parallel_group())
        numbers = iter(flat.tolist())  # the one transfer from the GPU
        for name in names:
            total, _ = outputs[0][name]
            totals, count = [next(numbers) for _ in range(total.numel())], max(next(numbers), 1e-12)
            values = [value / count for value in totals]
            means[name] = values if total.dim() else values[0]
    return broadcast_from_last_stage(means)
