"""Check the step on context-parallel ranks, and on packed documents, against the formula on whole rows.

usage: context_worker.py CONTEXT_PARALLEL FOLDER

FOLDER is a Hugging Face model: it names the reference and gives the configuration, its weights are not loaded.

Megatron's attention without Transformer Engine takes no context parallelism, so the models here look at one token only;
what is tested is how Bridge cuts the batch and how the step puts the gap together again.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace

import torch
from bridge_on_cpu import training_on_cpu  # before anything else imports megatron.bridge
from megatron.bridge.training.initialize import init_rerun_state
from megatron.bridge.training.state import GlobalState
from megatron.core.process_groups_config import ProcessGroupCollection
from tiny_bridge import SEQUENCE, VOCAB, remit_sum, tiny_config, token_logprobs
from torch import nn

from nemo_rmt.adapters.bridge import ReMiTForwardStep
from nemo_rmt.config import Parallel
from nemo_rmt.megatron.runtime import distributed

EPSILON, SCALE = 0.4, 1.5


class Bigram(nn.Module):
    """A language model that knows the previous token."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.config = SimpleNamespace()
        self.pg_collection = ProcessGroupCollection.use_mpu_process_groups()
        self.table = nn.Parameter(torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(seed)))

    def forward(self, input_ids, position_ids, attention_mask, labels):
        return -token_logprobs(self.table[input_ids], labels)


class WithBigramReference(ReMiTForwardStep):
    def _load(self, config, model):
        return Bigram(2)


def main(context: int, reference: str) -> None:
    generator = torch.Generator().manual_seed(context)
    tokens = torch.randint(0, VOCAB, (2, SEQUENCE + 1), generator=generator)
    starts = torch.tensor([[0, 7, 8, 19], [0, 5, 12, 13]])
    positions = torch.stack(
        [torch.cat([torch.arange(n) for n in row.diff(append=torch.tensor([SEQUENCE]))]) for row in starts]
    )
    batch = {
        "tokens": tokens[:, :-1],
        "labels": tokens[:, 1:],
        "loss_mask": (torch.rand(2, SEQUENCE, generator=generator) < 0.7).float(),
        "position_ids": positions,
    }
    state = GlobalState()
    state.cfg = tiny_config(reference)
    state.train_state.step = 1
    with distributed(Parallel.model_construct(context=context), seed=5), training_on_cpu():
        init_rerun_state(state.cfg.rerun_state_machine)
        policy, logprobs = Bigram(1), {}
        for name, model in (("policy", policy), ("reference", Bigram(2))):
            logprobs[name] = token_logprobs(model.table[batch["tokens"]], batch["labels"])
        step = WithBigramReference(reference, stable_steps=1, epsilon=EPSILON, scale=SCALE)
        row = torch.zeros_like(positions)
        # As they come, and without position ids: centred per document, and per row.
        for given, documents in (
            (positions, (positions == 0).cumsum(-1)),
            (None, row),
            (torch.arange(SEQUENCE).expand(2, -1), row),
        ):
            output, loss_function = step(state, iter([{**batch, "position_ids": given}]), policy)
            loss, count, _ = loss_function(output)
            assert output.shape == (2, SEQUENCE // context)
            total = torch.stack([loss.detach().double(), count.double()])
            torch.distributed.all_reduce(total)
            expected = remit_sum(
                logprobs["policy"], logprobs["reference"], batch["loss_mask"], documents, EPSILON, SCALE
            )
            torch.testing.assert_close(
                total, torch.stack([expected, batch["loss_mask"].sum().double()]), rtol=1e-6, atol=0
            )
            (found,) = torch.autograd.grad(loss, policy.table)
            torch.distributed.all_reduce(found)
            (wanted,) = torch.autograd.grad(expected, policy.table, retain_graph=True)
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
