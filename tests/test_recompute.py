"""What is made again in the backward pass is what was made in the forward pass, and nothing else is."""

from __future__ import annotations

import pytest
import torch
from builders import batch, tiny_mae
from torch import Tensor, nn

from moce.models import recompute
from moce.models.mae import MAE
from moce.models.recompute import recomputed


def gradients(module: nn.Module, loss: Tensor) -> list[Tensor]:
    parameters = [p for p in module.parameters() if p.requires_grad]
    return list(torch.autograd.grad(loss, parameters, allow_unused=True))


def loss_of(mae: MAE, autocast: bool = False) -> Tensor:
    images, noise, _ = batch(6)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return mae(images, noise).loss


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bf16"])
def test_gradients_are_the_same_to_the_last_bit(autocast: bool, monkeypatch) -> None:
    mae = tiny_mae().train()
    ours = gradients(mae, loss_of(mae, autocast))
    monkeypatch.setattr(recompute, "_pack", lambda tensor, known: tensor)
    plain = gradients(mae, loss_of(mae, autocast))
    assert all(torch.equal(one, other) for one, other in zip(ours, plain, strict=True))


def test_norms_and_activations_are_not_kept(monkeypatch) -> None:
    """Two norms and an activation in each of 4 + 1 blocks, and the two final norms."""
    pack, again = recompute._pack, []

    def counted(tensor: Tensor, known: dict) -> object:
        packed = pack(tensor, known)
        again.append(not isinstance(packed, Tensor))
        return packed

    monkeypatch.setattr(recompute, "_pack", counted)
    loss_of(tiny_mae().train())
    assert sum(again) == 3 * 5 + 2


def test_a_part_of_an_output_is_kept_as_it_is() -> None:
    norm, linear = nn.LayerNorm(8), nn.Linear(8, 8)
    inputs = torch.randn(6, 8, requires_grad=True)
    both = nn.ModuleList([norm, linear])
    plain = gradients(both, linear(norm(inputs)[:3]).square().sum())
    with recomputed():
        loss = linear(norm(inputs)[:3]).square().sum()
    assert all(map(torch.equal, gradients(both, loss), plain))


def test_memory_that_is_used_again_is_not_taken_for_an_output() -> None:
    """A freed output leaves its address to other tensors."""
    norm, weight = nn.LayerNorm(64), torch.randn(64, 64, requires_grad=True)
    inputs = torch.randn(64, 64, requires_grad=True)
    with recomputed():
        addresses = set()
        for _ in range(20):
            addresses.add(norm(inputs).data_ptr())  # freed at once
            other = torch.randn(64, 64)
            (gradient,) = torch.autograd.grad((other @ weight).sum(), weight)
            assert torch.allclose(gradient, other.sum(0)[:, None].expand(64, 64), atol=1e-4)
            del other
    assert addresses


def test_nothing_is_left_behind() -> None:
    mae = tiny_mae().train()
    loss_of(mae)
    hooks = torch.nn.modules.module._global_forward_hooks
    assert not hooks
