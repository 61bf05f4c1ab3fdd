"""Distillation: the head's divergence of a teacher from the model, in value and gradient, and steps at every layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from distillation_worker import VOCABULARIES, bound, check_head, check_ties, distilled, exact_divergence, steps
from megatron.core import dist_checkpointing
from tiny_model import VOCAB, random_batch, tiny_recipe, trained
from torchrun import run_ranks

from nemo_rmt.megatron import distillation, head
from nemo_rmt.megatron.checkpoint import model_state
from nemo_rmt.megatron.cpu import redirected, results_in_process
from nemo_rmt.megatron.distillation import HiddenTeacher, LikeliestTokens, teacher_of
from nemo_rmt.megatron.head import token_scores
from nemo_rmt.megatron.model import build_model
from nemo_rmt.megatron.runtime import distributed
from nemo_rmt.megatron.train_step import FrozenModel

WORKER = Path(__file__).with_name("distillation_worker.py")
LAYOUTS = {"tp2_sp": {"tensor": 2, "sequence": True}, "pp2": {"pipeline": 2}}
TOKENS, WIDTH, ROWS, COLUMNS = 40, 16, 128, 100


@pytest.fixture(scope="module", autouse=True)
def layout():
    with distributed(tiny_recipe().parallel, seed=5) as layout:
        yield layout


@pytest.mark.parametrize("chunk", [None, 5, 1])
@pytest.mark.parametrize("vocab_size", VOCABULARIES)
@pytest.mark.parametrize("likeliest", [0, 1, 7, "all"])
def test_divergence_and_gradients_equal_full_logits(layout, vocab_size, chunk, likeliest):
    check_head(layout, False, vocab_size, chunk, vocab_size if likeliest == "all" else likeliest)


def test_equally_likely_tokens_come_in_their_order(layout):
    check_ties(layout)


def inputs(dtype: torch.dtype = torch.float32, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states ``[TOKENS, 1, WIDTH]`` and an output weight."""
    generator = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(TOKENS, 1, WIDTH, generator=generator), torch.randn(ROWS, WIDTH, generator=generator)
    return (hidden * scale).to(dtype), weight.to(dtype)


def divergence(teacher, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``[TOKENS]``."""
    labels = torch.zeros(1, TOKENS, dtype=torch.int64)
    return token_scores(hidden, weight, labels, vocab_size=COLUMNS, teacher=teacher).divergence[0]


def log_softmax(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """float64 ``[TOKENS, COLUMNS]`` of logits in the precision of their inputs."""
    return (hidden[:, 0] @ weight[:COLUMNS].t()).double().log_softmax(-1)


def test_the_bound_grows_with_the_known_tokens_to_the_exact_divergence():
    (hidden, weight), (_, other) = inputs(), inputs(scale=2.0)
    log_p = log_softmax(hidden.flip(0), other)
    exact = exact_divergence(log_p, log_softmax(hidden, weight))
    bounds = []
    for known in (1, 4, 16, 64, COLUMNS):
        values, tokens = log_p.topk(known)
        bounds.append(divergence(LikeliestTokens(tokens, values.float()), hidden, weight))
    torch.testing.assert_close(bounds[-1], exact.float(), rtol=1e-5, atol=1e-5)
    assert all((low <= high + 1e-5).all() for low, high in zip(bounds, bounds[1:], strict=False))
    assert (bounds[0] < exact - 0.1).all() and bounds[0].min() >= -1e-6


def test_a_model_that_is_its_own_teacher_has_no_divergence():
    hidden, weight = inputs()
    assert divergence(HiddenTeacher(hidden[:, 0], weight), hidden, weight).abs().max() == 0
    values, tokens = log_softmax(hidden, weight).topk(9)
    assert divergence(LikeliestTokens(tokens, values.float()), hidden, weight).abs().max() < 1e-6


def test_rest_of_a_sure_model_keeps_its_digits():
    """1 less the known tokens' sum would be 0 or noise; here the others have 1e-7 to 1e-30 of the model."""
    hidden, weight = inputs(scale=5.0)
    log_q = log_softmax(hidden, weight)
    tokens = log_q.topk(20).indices
    logprobs = torch.full(tokens.shape, 0.045, dtype=torch.float64).log()
    expected = bound(tokens, logprobs, log_q)
    assert (1 - log_q.exp().gather(1, tokens).sum(-1)).max() < 1e-6
    torch.testing.assert_close(
        divergence(LikeliestTokens(tokens, logprobs.float()), hidden, weight), expected.float(), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    "logprobs",
    [
        [0.0, -60.0, -64.0],  # nothing is left for the others
        [-0.6928, -0.6928, -9.0],  # rounded up to a little over 1
        [-30.0, -30.0, -30.0],  # all is left for them
    ],
)
def test_teachers_at_the_ends_of_what_is_possible_give_finite_numbers(logprobs):
    hidden, weight = (tensor.requires_grad_() for tensor in inputs(scale=30.0))
    tokens = torch.tensor([5, 0, 77]).expand(TOKENS, 3)
    found = divergence(LikeliestTokens(tokens, torch.tensor(logprobs).expand(TOKENS, 3)), hidden, weight)
    found.sum().backward()
    assert found.isfinite().all() and found.min() >= -1e-4
    assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()


def test_in_bfloat16_only_the_logits_are_rounded():
    hidden, weight = inputs(torch.bfloat16)
    teacher_hidden = hidden.flip(0)[:, 0].contiguous()
    exact = [tensor.double().requires_grad_() for tensor in (hidden, weight)]
    log_q = (exact[0][:, 0] @ exact[1][:COLUMNS].t()).log_softmax(-1)
    log_p = (teacher_hidden @ weight[:COLUMNS].t()).double().log_softmax(-1)
    exact_divergence(log_p, log_q).sum().backward()
    ours = [tensor.requires_grad_() for tensor in (hidden, weight)]
    found = divergence(HiddenTeacher(teacher_hidden, weight.detach()), *ours)
    expected = exact_divergence(log_p, log_softmax(*inputs(torch.bfloat16)))
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)
    found.sum().backward()
    for tensor, reference in zip(ours, exact, strict=True):
        assert (tensor.grad.double() - reference.grad).norm() < 0.01 * reference.grad.norm()


def test_no_more_of_the_teachers_logits_than_of_the_models_exists_at_once(monkeypatch):
    shapes = []
    logits_of = head.logits_of
    monkeypatch.setattr(
        distillation, "logits_of", lambda *given: shapes.append(logits_of(*given).shape) or logits_of(*given)
    )
    monkeypatch.setattr(head, "LOGITS_AT_ONCE", 7 * ROWS)
    hidden, weight = (tensor.requires_grad_() for tensor in inputs())
    divergence(HiddenTeacher(hidden.detach()[:, 0], weight.detach()), hidden, weight).sum().backward()
    assert set(shapes) == {(7, COLUMNS), (TOKENS % 7, COLUMNS)} and len(shapes) == 2 * 6


def test_a_teacher_whose_vocabulary_is_divided_otherwise_is_refused():
    hidden, weight = inputs()
    with pytest.raises(ValueError, match="the teacher has 64 rows of vocabulary here, the model 128"):
        divergence(HiddenTeacher(hidden[:, 0], weight[:64]), hidden, weight)
    with pytest.raises(ValueError, match="needs the teacher's output embedding, teacher_weight"):
        teacher_of({"teacher_hidden": hidden}, None)


def test_distilling_from_its_own_weights_leaves_a_model_as_it_is():
    recipe = tiny_recipe()
    model = trained(recipe, seed=1)
    torch.manual_seed(1)
    frozen = FrozenModel(build_model(recipe.model, recipe.parallel, VOCAB), recipe.parallel)
    batch = random_batch(4)
    batch.extras["teacher_hidden"] = frozen.hidden_states(batch, 2)
    whole = lambda scores, micro: distilled(scores._replace(logprobs=scores.logprobs.detach()), micro)  # noqa: E731
    metrics = model.train_step(batch.micro_batches(2), whole, teacher_weight=frozen.output_weight)
    assert metrics["distill/divergence"] == 0 and metrics["grad_norm"] < 1e-6
    batch.extras["teacher_hidden"] = -batch.extras["teacher_hidden"]
    metrics = model.train_step(batch.micro_batches(2), whole, teacher_weight=frozen.output_weight)
    assert metrics["distill/divergence"] > 1e-3 and metrics["grad_norm"] > 1e-3


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> list[Path]:
    """Those of a model and of its teacher, for any layout."""
    folders = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        chunks = build_model(tiny_recipe().model, tiny_recipe().parallel, VOCAB)
        with torch.no_grad():
            for parameter in chunks[0].parameters():
                parameter.mul_(2)  # less even distributions, so that errors show
        folders.append(tmp_path_factory.mktemp("weights"))
        with redirected(), results_in_process():
            dist_checkpointing.save(model_state(chunks), str(folders[-1]))
    return folders


@pytest.fixture(scope="module")
def one_rank(weights) -> dict[str, list[dict[str, float]]]:
    return steps(tiny_recipe(), *weights)


@pytest.mark.parametrize("name", LAYOUTS)
def test_steps_of_every_layout_equal_one_ranks(weights, one_rank, tmp_path, name):
    recipe = tiny_recipe(parallel=LAYOUTS[name], cluster={"gpus_per_node": 2})
    run_ranks(WORKER, 2, recipe.model_dump_json(), *map(str, weights), str(tmp_path / "steps.json"))
    found = json.loads((tmp_path / "steps.json").read_text())
    assert found.keys() == one_rank.keys()
    for kind, expected in one_rank.items():
        for ours, theirs in zip(found[kind], expected, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-7), kind


def test_the_steps_distill_so_that_parity_means_something(one_rank):
    whole, likeliest = (one_rank[kind] for kind in ("hidden states", "likeliest tokens"))
    for exact, known in zip(whole, likeliest, strict=True):
        assert exact["distill/divergence"] > known["distill/divergence"] > 0.01 and known["grad_norm"] > 0.01
    assert whole[1]["loss"] != pytest.approx(likeliest[1]["loss"], rel=1e-5)
