"""What is made again in the backward pass is what was made in the forward pass, and nothing else is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from builders import BLOCKS, PRETRAIN, RUNTIME, batch, tiny_mae, tiny_moce
from torch import Tensor, nn

import moce
from moce.models import recompute
from moce.models.mae import MAE
from moce.models.recompute import recomputed, set_checkpointing
from moce.models.token_moe import TokenMoE
from moce.runs import read_tensors


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


# --- whole blocks -----------------------------------------------------------------------------------------


def token_moe() -> TokenMoE:
    torch.manual_seed(3)
    return TokenMoE(tiny_mae(), BLOCKS, 3).train()


MODELS = {
    "mae": lambda: tiny_mae().train(),
    "moce": lambda: tiny_moce(tiny_mae(), different=True).train(),
    "blocks": lambda: tiny_moce(tiny_mae(), different=True, expert_scope="block").train(),
    "token_moe": token_moe,
}


def output_of(name: str, model: nn.Module) -> Tensor:
    images, noise, clusters = batch(6)
    if name == "mae":
        return model(images, noise).loss
    if name != "token_moe":
        output = model(images, noise, clusters)
        return output.reconstruction + 0.1 * output.balance
    generator = torch.Generator().manual_seed(5)
    drawn = torch.randn(6, len(BLOCKS), 5, 3, generator=generator)  # a class token, 4 of 16 patches
    output = model(images, noise, drawn)
    return output.reconstruction + 0.1 * output.balance


@pytest.mark.parametrize("name", MODELS)
def test_checkpointing_gives_the_same_gradients(name: str) -> None:
    """To the last bit, and computes every block twice; layers are left without a graph."""
    model: Any = MODELS[name]()
    mae = model if name == "mae" else model.mae
    passes = []
    for block in (*mae.encoder.blocks, *mae.decoder.blocks):
        block.register_forward_pre_hook(lambda *given: passes.append(1))
    plain = gradients(model, output_of(name, model))
    assert len(passes) == 5
    set_checkpointing(model, True)
    loss = output_of(name, model)
    assert len(passes) == 10
    again = gradients(model, loss)
    assert len(passes) == 15
    for one, other in zip(plain, again, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)
    layers = [] if name == "mae" else model.experts
    assert all(getattr(layer, n) is None for layer in layers for n in layer.OF_A_PASS)


@pytest.mark.parametrize("verb", ["pretrain", "finetune"])
def test_runs_with_checkpointing_are_the_same(verb: str, runs, tmp_path: Path) -> None:
    """Drop path, too, drops the same the second time."""
    made = []
    for again in (False, True):
        update = {"out": tmp_path / f"{verb}_{again}", "grad_checkpointing": again, "steps": 2}
        if verb == "pretrain":
            moce.pretrain(runs.data, **{**PRETRAIN, **update})
        else:
            update |= {"drop_path": 0.5, "batch_size": 12, "rand_augment": "", **RUNTIME}
            moce.finetune(runs.backbone, runs.task, **update)
        made.append(read_tensors(update["out"] / "model.safetensors"))
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])
