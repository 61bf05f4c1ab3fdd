"""One training step against plain torch autograd, and what must not change its result."""

from __future__ import annotations

import pytest
import torch
from dense_masks import document_mask, tree_mask
from tiny_model import VOCAB, next_token, random_batch, random_rows, tiny_recipe, trained, world
from torch.overrides import _get_current_function_mode
from tree_worker import random_trees

from nemo_rmt.config import Optim
from nemo_rmt.data.batch import TokenBatch
from nemo_rmt.data.tree import BRANCH_MASK, pack_trees
from nemo_rmt.megatron.cpu import redirected
from nemo_rmt.megatron.train_step import reduce_metrics
from nemo_rmt.objectives import LossOutput

CLOSE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(scope="module", autouse=True)
def alone():
    with world():
        yield


def gradients(model) -> dict[str, torch.Tensor]:
    """The last step's, over all its micro-batches."""
    return {name: value.main_grad.clone() for name, value in model.modules[0].named_parameters()}


def free(recipe, seed: int = 1):
    """A model whose gradients are not clipped."""
    return trained(recipe, Optim(lr=1e-2, clip_grad=0), seed=seed)


def full_logits_gradients(module, batch: TokenBatch, visible=None, temperatures=1.0) -> tuple[dict, float]:
    """Autograd of Σ w·nll / number of tokens through float32 logits of every position; also the mean nll.

    visible: ``[batch, 1, sequence, sequence]``, None for documents. temperatures: ``[batch, sequence, 1]``, or for all.
    """
    for parameter in module.parameters():
        parameter.grad = None
    captured = {}
    handle = module.decoder.register_forward_hook(lambda _, __, output: captured.update(hidden=output))
    module(
        batch.tokens, batch.position_ids, document_mask(batch.segment_ids) if visible is None else visible, batch.labels
    )
    handle.remove()
    tied = module.share_embeddings_and_output_weights
    weight = module.embedding.word_embeddings.weight if tied else module.output_layer.weight
    logits = torch.einsum("sbh,vh->bsv", captured["hidden"], weight[:VOCAB]) / temperatures
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="none")
    weights = batch.extras.get("weights", torch.ones_like(batch.loss_mask))
    mask = batch.loss_mask.flatten()
    loss = (weights.flatten() * nll * mask).sum() / mask.sum()
    grads = torch.autograd.grad(loss, list(module.parameters()))
    names = [name for name, _ in module.named_parameters()]
    return dict(zip(names, grads, strict=True)), float((nll.detach() * mask).sum() / mask.sum())


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("tied", [True, False])
def test_the_gradient_is_that_of_cross_entropy_over_the_token_count(weighted, tied):
    model, batch = free(tiny_recipe(model={"tie_embeddings": tied})), random_batch(4)
    if weighted:
        batch.extras["weights"] = 3 * torch.rand(batch.tokens.shape, generator=torch.Generator().manual_seed(1))
    bare = free(tiny_recipe(model={"tie_embeddings": tied})).modules[0]
    expected, loss = full_logits_gradients(bare, batch)
    metrics = model.train_step(batch.micro_batches(2), next_token)
    assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **CLOSE, msg=name)
    norm = torch.stack([value.norm() for value in expected.values()]).norm()
    assert metrics["grad_norm"] == pytest.approx(float(norm), rel=1e-5)


@pytest.mark.parametrize("size", [1, 2, 8])
def test_micro_batches_of_unequal_token_counts_do_not_change_loss_or_gradient(size):
    batch = random_batch(8)
    batch.loss_mask[0, 5:] = 0
    batch.loss_mask[3] = 0
    whole, split = free(tiny_recipe()), free(tiny_recipe())
    expected = whole.train_step(batch.micro_batches(8), next_token)
    found = split.train_step(batch.micro_batches(size), next_token)
    for name in ("loss", "grad_norm"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5)
    for name, value in gradients(whole).items():
        torch.testing.assert_close(gradients(split)[name], value, **CLOSE)


def test_packed_documents_score_as_they_do_in_rows_of_their_own():
    model = free(tiny_recipe())
    generator = torch.Generator().manual_seed(2)
    documents = [[*torch.randint(1, VOCAB, (size,), generator=generator).tolist(), 0] for size in (7, 3, 12)]
    stream = [token for document in documents for token in document]
    packed = TokenBatch.from_documents(torch.tensor([[*stream, 5]]), eod=0, document_attention=True)
    alone = TokenBatch.from_examples([(document, [1.0] * len(document)) for document in documents], 0, 16)
    together, separate = model.score(packed, 1).logprobs[0], model.score(alone, 3).logprobs
    start = 0
    for row, document in enumerate(documents):
        count = len(document) - 1
        torch.testing.assert_close(together[start : start + count], separate[row, :count], rtol=0, atol=1e-5)
        start += len(document)
    assert packed.num_tokens() == alone.num_tokens() == sum(len(document) - 1 for document in documents)


def test_padding_on_the_right_and_rows_without_loss_change_nothing():
    examples = [(row.tolist(), [1.0] * len(row)) for row in random_rows(2, sequence=12)]
    padded = [*examples, (examples[0][0], [0.0] * 13), ([3, 4], [0.0, 0.0])]
    narrow, wide = TokenBatch.from_examples(examples, 0, 12), TokenBatch.from_examples(padded, 0, 20)
    expected, found = free(tiny_recipe()), free(tiny_recipe())
    before = expected.train_step(narrow.micro_batches(2), next_token)
    after = found.train_step(wide.micro_batches(2), next_token)
    assert after["loss"] == pytest.approx(before["loss"], rel=1e-5)
    for name, value in gradients(expected).items():
        torch.testing.assert_close(gradients(found)[name], value, **CLOSE)


def test_a_step_without_any_token_to_learn_from_has_no_gradient():
    model, batch = free(tiny_recipe()), random_batch(2)
    batch.loss_mask.zero_()
    metrics = model.train_step(batch.micro_batches(1), next_token)
    assert (metrics["loss"], metrics["grad_norm"]) == (0.0, 0.0)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_scoring_equals_the_forward_of_training(temperature):
    model, batch, seen = free(tiny_recipe()), random_batch(4), []

    def objective(scores, micro) -> LossOutput:
        seen.append(scores)
        return next_token(scores, micro)

    scored = model.score(batch, 4, temperature=temperature, with_entropy=True)
    model.train_step(batch.micro_batches(2), objective, temperature=temperature, with_entropy=True)
    for name in ("logprobs", "entropy", "hits"):
        found = torch.cat([getattr(scores, name).detach() for scores in seen])
        torch.testing.assert_close(found, getattr(scored, name), **CLOSE)
    assert scored.entropy.min() > 0 and not scored.logprobs.requires_grad


def test_in_a_tree_the_temperature_is_that_of_the_branches():
    batch = pack_trees(random_trees(), 101, pad=0)
    batch.loss_mask = batch.loss_mask + batch.extras[BRANCH_MASK]
    temperatures = torch.full((*batch.tokens.shape, 1), 1.0)
    temperatures[batch.branch_ids > 0] = 0.5
    visible = tree_mask(batch.segment_ids, batch.branch_ids, batch.fork_columns)
    expected, loss = full_logits_gradients(free(tiny_recipe()).modules[0], batch, visible, temperatures)
    model = free(tiny_recipe())
    scored = model.score(batch, 1, temperature=0.5).logprobs
    assert -(scored * batch.loss_mask).sum() / batch.loss_mask.sum() == pytest.approx(loss, rel=1e-5)
    assert model.train_step(batch.micro_batches(1), next_token, temperature=0.5)["loss"] == pytest.approx(
        loss, rel=1e-5
    )
    for name, value in gradients(model).items():
        torch.testing.assert_close(value, expected[name], **CLOSE, msg=name)


def test_recomputing_activations_gives_the_same_gradients():
    batches = random_batch(4).micro_batches(2)
    kept, recomputed = free(tiny_recipe()), free(tiny_recipe(parallel={"recompute": "full"}))
    expected, found = (model.train_step(batches, next_token) for model in (kept, recomputed))
    assert found["loss"] == expected["loss"]
    for name, value in gradients(kept).items():
        torch.testing.assert_close(gradients(recomputed)[name], value, **CLOSE)


def test_a_step_changes_the_weights():
    model = free(tiny_recipe())
    before = {name: value.clone() for name, value in model.modules[0].named_parameters()}
    model.train_step(random_batch(2).micro_batches(2), next_token)
    assert not any(torch.equal(value, before[name]) for name, value in model.modules[0].named_parameters())


@pytest.mark.parametrize("clip_grad", [0.0, 0.5])
def test_a_step_that_is_taken_is_the_optimizers_own_bit_for_bit(clip_grad):
    guarded, plain = (trained(tiny_recipe(), Optim(lr=1e-2, clip_grad=clip_grad)) for _ in range(2))
    norms = []
    for seed in range(3):
        batches = random_batch(4, seed=seed).micro_batches(2)
        metrics = guarded.train_step(batches, next_token)
        plain.guard.accepts = lambda *_: False
        plain.train_step(batches, next_token)  # gradients alone
        with redirected():
            norms.append((metrics["grad_norm"], plain.optimizer.step()[1]))
    assert [one for one, _ in norms] == [other for _, other in norms]
    for one, other in zip(guarded.modules[0].parameters(), plain.modules[0].parameters(), strict=True):
        assert torch.equal(one, other)


def test_nothing_intercepts_torch_in_the_models_forward_and_backward():
    model, modes = free(tiny_recipe()), []
    module = model.modules[0].decoder
    module.register_forward_hook(lambda *_: modes.append(_get_current_function_mode()))
    module.register_full_backward_hook(lambda *_: modes.append(_get_current_function_mode()))
    batch = random_batch(2)
    model.train_step(batch.micro_batches(1), next_token)
    model.score(batch, 2)
    assert modes == [None] * 5


def test_metrics_are_sums_over_counts_of_all_micro_batches():
    def pair(total, count):
        return torch.as_tensor(total), torch.tensor(float(count))

    outputs = [
        {"loss": pair(2.0, 4), "histogram": pair([1.0, 2.0, 0.0], 3)},
        {"loss": pair(1.0, 1), "histogram": pair([0.0, 4.0, 3.0], 7)},
        {"loss": pair(0.0, 0), "histogram": pair([0.0, 0.0, 0.0], 0)},
    ]
    assert reduce_metrics(outputs) == {"loss": 3.0 / 5, "histogram": [0.1, 0.6, 0.3]}
    assert reduce_metrics([outputs[2]]) == {"loss": 0.0, "histogram": [0.0, 0.0, 0.0]}
    assert reduce_metrics([]) == {}
