"""Run Bridge's pretrain with ReMiT's forward step and check every micro-batch against Bridge's loss and the formula.

usage: pretrain_worker.py TENSOR_PARALLEL FOLDER

FOLDER has the Hugging Face models ``rl``, and ``deeper`` with one layer more.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from bridge_on_cpu import training_on_cpu  # before anything else imports megatron.bridge
from megatron.bridge.training.gpt_step import forward_step
from megatron.bridge.training.pretrain import pretrain
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from megatron.core.utils import unwrap_model
from tiny_bridge import remit_sum, tiny_config, token_logprobs
from transformers import AutoModelForCausalLM

from nemo_rmt.adapters.bridge import ReMiTForwardStep, remit_config
from nemo_rmt.config import Parallel
from nemo_rmt.errors import UserError
from nemo_rmt.megatron.runtime import distributed

STABLE, ANNEAL, EPSILON, SCALE = 2, 2, 0.3, 0.7
SAVED = STABLE + 1


class Checked:
    """ReMiT's forward step, each of its losses checked before training goes on with it."""

    def __init__(self, reference: Path, checkpoints: Path, other: Path) -> None:
        self.step = ReMiTForwardStep(reference, stable_steps=STABLE, epsilon=EPSILON, scale=SCALE)
        self.reference = AutoModelForCausalLM.from_pretrained(reference)
        self.checkpoints, self.other = checkpoints, other
        self.seen = dict.fromkeys(("plain", "weighted", "validation", "equal"), 0)

    def __call__(self, state, data_iterator, model, return_schedule_plan=False):
        batch = next(data_iterator)
        generator = torch.Generator().manual_seed(state.train_state.step)
        batch["loss_mask"] = (torch.rand(batch["loss_mask"].shape, generator=generator) < 0.8).float()
        mask, random_state = batch["loss_mask"].clone(), torch.get_rng_state()
        output, loss_function = self.step(state, iter([batch]), model, return_schedule_plan)
        loss, tokens, metrics = loss_function(output)
        assert torch.equal(batch["loss_mask"], mask)
        assert torch.equal(torch.get_rng_state(), random_state)
        assert tokens.dtype == torch.int and tokens == int(mask.sum())

        own_loss, _, own_metrics = plain_step(state, batch, model)
        torch.testing.assert_close(metrics["lm loss"], own_metrics["lm loss"], rtol=0, atol=0)
        if state.train_state.step < STABLE or not model.training:
            self.seen["plain" if model.training else "validation"] += 1
            assert loss == own_loss and metrics.keys() == own_metrics.keys()
            assert model.training is False or self.step._model is None, "loaded before it is needed"
        else:
            self.seen["weighted"] += 1
            self.check_weighted(batch, model, loss, own_loss)
            if state.train_state.step == SAVED:
                self.check_equal(state, batch, model, own_loss)
            return self.step(state, iter([batch]), model, return_schedule_plan)
        return output, loss_function

    def check_weighted(self, batch, model, loss, own_loss) -> None:
        tokens, labels, mask = batch["tokens"], batch["labels"], batch["loss_mask"]
        logits = unwrap_model(model)(tokens, batch["position_ids"], None)
        policy = token_logprobs(gather_from_tensor_model_parallel_region(logits), labels)
        with torch.no_grad():
            reference = token_logprobs(self.reference(tokens).logits, labels)
        expected = remit_sum(policy, reference, mask, torch.zeros_like(labels), EPSILON, SCALE)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
        assert abs(loss - own_loss) > 1e-3 * own_loss
        # Megatron's cross-entropy overwrites what it saved: training gets a graph of its own.
        found, wanted = (torch.autograd.grad(value, list(model.parameters())) for value in (loss, expected))
        for (name, _), ours, theirs in zip(model.named_parameters(), found, wanted, strict=True):
            assert (ours - theirs).norm() <= 1e-4 * theirs.norm(), name

    def check_equal(self, state, batch, model, own_loss) -> None:
        """The last checkpoint is the model as it is: weights of exactly 1."""
        self.seen["equal"] += 1
        step = ReMiTForwardStep(self.checkpoints, stable_steps=STABLE)
        output, loss_function = step(state, iter([batch]), model)
        loss, _, metrics = loss_function(output)
        assert loss == own_loss and metrics["remit/weight_mean"][0] == metrics["remit/weight_mean"][1]
        assert not any(parameter.requires_grad for parameter in step._model.parameters())
        with pytest.raises(UserError, match="num_layers=3 and the trained model 2"):
            ReMiTForwardStep(self.other, stable_steps=STABLE)(state, iter([batch]), model)


def plain_step(state, batch, model):
    output, loss_function = forward_step(state, iter([batch]), model)
    return loss_function(output)


def main(tensor: int, folder: Path) -> None:
    cfg = tiny_config(str(folder / "rl"), eval_interval=SAVED)
    cfg.model.tensor_model_parallel_size, cfg.model.sequence_parallel = tensor, tensor > 1
    checkpoints = folder / f"checkpoints_{tensor}"
    cfg.checkpoint.save, cfg.checkpoint.save_interval = str(checkpoints), SAVED
    checked = Checked(folder / "rl", checkpoints, folder / "deeper")
    with distributed(Parallel(tensor=tensor, sequence=tensor > 1), seed=5), training_on_cpu():
        pretrain(remit_config(cfg, stable_steps=STABLE, anneal_steps=ANNEAL), checked)
    assert checked.seen == {"plain": 4, "weighted": 4, "validation": 6, "equal": 2}, checked.seen


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
