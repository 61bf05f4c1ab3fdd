"""The norm's own backward against torch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny_model import tiny_recipe

from nemo_rmt.megatron.layers import RMSNorm
from nemo_rmt.megatron.model import transformer_config


@pytest.mark.parametrize("shape", [(5, 2, 32), (7, 3, 4, 16)])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_the_norm_and_its_gradients_are_torchs(shape, dtype, close):
    generator = torch.Generator().manual_seed(0)
    recipe = tiny_recipe()
    norm = RMSNorm(transformer_config(recipe.model, recipe.parallel), shape[-1], eps=1e-3).to(dtype)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2.0, generator=generator)
    states = torch.randn(shape, generator=generator).to(dtype).requires_grad_()
    grad = torch.randn(shape, generator=generator).to(dtype)
    own = norm(states)
    found = [own, *torch.autograd.grad(own, (states, norm.weight), grad)]
    exact = [tensor.detach().double().requires_grad_() for tensor in (states, norm.weight)]
    torchs = F.rms_norm(exact[0], (shape[-1],), exact[1], 1e-3)
    expected = [torchs, *torch.autograd.grad(torchs, exact, grad.double())]
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one.double(), other, rtol=close, atol=close * float(other.detach().abs().max()))


def test_without_gradients_the_norm_gives_the_same_numbers():
    recipe = tiny_recipe()
    norm = RMSNorm(transformer_config(recipe.model, recipe.parallel), 32)
    states = torch.randn(64, 2, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2.0, generator=torch.Generator().manual_seed(2))
    assert torch.equal(norm(states), norm(states.requires_grad_()))
