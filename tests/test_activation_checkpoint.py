"""Activation checkpointing gives the same gradients, and computes every block once more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from builders import BLOCKS, PRETRAIN, RUNTIME, batch, tiny_mae, tiny_moce
from torch import Tensor, nn

import moce
from moce.models.activation_checkpoint import set_checkpointing
from moce.models.token_moe import TokenMoE
from moce.runs.files import read_tensors


def gradients(module: nn.Module, loss: Tensor) -> list[Tensor]:
    parameters = [p for p in module.parameters() if p.requires_grad]
    return list(torch.autograd.grad(loss, parameters, allow_unused=True))


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
    """To the last bit, and computes every block twice."""
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


@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_runs_with_checkpointing_are_the_same(command: str, runs, tmp_path: Path) -> None:
    """Drop path, too, draws the same random numbers again."""
    made = []
    for again in (False, True):
        update = {"out": tmp_path / f"{command}_{again}", "grad_checkpointing": again, "steps": 2}
        if command == "pretrain":
            moce.pretrain(runs.data, **{**PRETRAIN, **update})
        else:
            update |= {"drop_path": 0.5, "batch_size": 12, "rand_augment": "", **RUNTIME}
            moce.finetune(runs.backbone, runs.task, **update)
        made.append(read_tensors(update["out"] / "model.safetensors"))
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])
