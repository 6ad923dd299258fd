"""A batch in chunks on several threads gives the gradients of the whole batch, the same in every run."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import batch, demo_images, tiny_encoder, tiny_mae, tiny_moce
from test_training import run_command, same_losses, same_weights, stop_after
from timm.layers import DropPath
from torch import Tensor, nn
from torch.testing import assert_close

from moce.config import FinetuneSettings, TrainSettings
from moce.data.loader import Batch
from moce.errors import Interrupted
from moce.evaluation.finetune import FinetuneObjective
from moce.models.experts import ExpertBlock
from moce.models.mae import MAE
from moce.models.token_moe import TokenMoE
from moce.runtime import threads as runtime_threads
from moce.runtime.device import bincount
from moce.training.drop_path import draw_drop_path, forget_drop_path, use_keyed_drop_path
from moce.training.objectives import MoCEObjective, chunk_size
from moce.training.thread_parallel import ThreadParallel, chunks_of, draws_in_turn, replica
from moce.training.trainer import Step

IMAGES = 10


def mae_loss() -> Callable[[nn.Module, slice], dict[str, Tensor]]:
    images, noise, _ = batch(IMAGES)
    return lambda model, chunk: {"loss": model(images[chunk], noise[chunk]).loss}


def moce_loss(moce) -> Callable[[nn.Module, slice], dict[str, Tensor]]:
    images, noise, clusters = batch(IMAGES)
    counts = bincount(clusters, len(moce.clusters))

    def loss(model, chunk: slice) -> dict[str, Tensor]:
        output = model(images[chunk], noise[chunk], clusters[chunk], None, counts)
        total = output.reconstruction + output.balance + output.imbalance
        return {"loss": total, "balance": output.balance}

    return loss


def gradients(module: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("count", [1, 2, 7, 64])
@pytest.mark.parametrize("size", [1, 3, 100])
@pytest.mark.parametrize("number", [1, 2, 4])
def test_chunks_cover_the_batch_evenly(count: int, size: int, number: int) -> None:
    chunks = chunks_of(count, size, number)
    assert [i for chunk in chunks for i in range(chunk.start, chunk.stop)] == list(range(count))
    lengths = {chunk.stop - chunk.start for chunk in chunks}
    assert max(lengths) - min(lengths) <= 1 and max(lengths) <= size and min(lengths) > 0
    assert len(chunks) % number == 0 or len(chunks) == count


@pytest.mark.parametrize("size", [1, 3, 100])
def test_gradients_are_those_of_the_whole_batch(threads: int, size: int) -> None:
    mae, loss = tiny_mae().train(), mae_loss()
    whole = loss(mae, slice(None))["loss"]
    (whole * 0.5).backward()
    expected = gradients(mae)
    with ThreadParallel(mae) as several:
        found = several.backward(loss, IMAGES, size, scale=0.5)
    assert_close(found["loss"], whole.detach())
    assert_close(gradients(mae), expected, atol=1e-6, rtol=1e-4)


def test_gates_and_experts_get_their_gradients_once(threads: int) -> None:
    moce = tiny_moce(tiny_mae(), different=True).train()
    loss = moce_loss(moce)
    whole = loss(moce, slice(None))
    whole["loss"].backward()
    expected = gradients(moce)
    with ThreadParallel(moce) as several:
        found = several.backward(loss, IMAGES, 2)
    assert_close(found, {name: value.detach() for name, value in whole.items()})
    ours = gradients(moce)
    assert ours.keys() == expected.keys(), "an idle expert has no gradient"
    assert_close(ours, expected, atol=1e-6, rtol=1e-4)


def test_gradients_are_the_same_each_time_and_are_added(threads: int) -> None:
    mae, loss = tiny_mae().train(), mae_loss()
    with ThreadParallel(mae) as several:
        several.backward(loss, IMAGES, 1)
        first = gradients(mae)
        several.backward(loss, IMAGES, 1)
        second = {name: value.clone() for name, value in gradients(mae).items()}
        several.backward(loss, IMAGES, 1)
        several.backward(loss, IMAGES, 1)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert_close(gradients(mae), {name: 2 * value for name, value in first.items()})


def test_a_replica_has_the_same_weights_and_gradients_of_its_own() -> None:
    mae = tiny_mae()
    other = replica(mae)
    mae_loss()(other, slice(None))["loss"].backward()
    assert all(parameter.grad is None for parameter in mae.parameters())
    with torch.no_grad():
        for parameter in mae.parameters():
            parameter.add_(1)
    both = zip(mae.state_dict().values(), other.state_dict().values(), strict=True)
    assert all(torch.equal(one, its) for one, its in both)
    trained = [p.requires_grad for p in mae.parameters()]
    assert [p.requires_grad for p in other.parameters()] == trained


def test_the_number_of_threads_is_restored_after_an_error(threads: int) -> None:
    def wrong(model: nn.Module, chunk: slice) -> dict[str, Tensor]:
        raise ValueError("no")

    with ThreadParallel(tiny_mae()) as several, pytest.raises(ValueError, match="no"):
        several.backward(wrong, IMAGES, 2)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("by", ["error", "ctrl_c"])
def test_no_thread_starts_another_chunk_after_an_error_or_ctrl_c(by: str) -> None:
    loss, done = mae_loss(), []

    def stopping(model: nn.Module, chunk: slice) -> dict[str, Tensor]:
        if chunk.start == 1:  # the first chunk of the second thread
            if by == "error":
                raise ValueError("no")
            os.kill(os.getpid(), signal.SIGINT)
        done.append(chunk)
        time.sleep(0.1)
        return loss(model, chunk)

    before, handler = torch.get_num_threads(), signal.getsignal(signal.SIGINT)
    torch.set_num_threads(2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with ThreadParallel(tiny_mae()) as several, pytest.raises((ValueError, KeyboardInterrupt)):
            several.backward(stopping, IMAGES, 1)
    finally:
        signal.signal(signal.SIGINT, handler)
        torch.set_num_threads(before)
    assert len(done) <= 5 < IMAGES


def test_few_workers_share_many_threads(monkeypatch) -> None:
    monkeypatch.setattr(runtime_threads, "MAX_WORKERS", 2)
    before, seen = torch.get_num_threads(), []
    torch.set_num_threads(5)  # two workers with two threads each
    loss = mae_loss()

    def noted(model: nn.Module, chunk: slice) -> dict[str, Tensor]:
        seen.append(torch.get_num_threads())
        return loss(model, chunk)

    try:
        with ThreadParallel(tiny_mae()) as several:
            several.backward(noted, IMAGES, 5)
    finally:
        torch.set_num_threads(before)
    assert several.num_threads == 2 and seen == [2, 2]


def dropping_experts() -> nn.Module:
    """Experts that are whole blocks see part of the images each: their drop path stays timm's."""
    experts = ExpertBlock(tiny_encoder().build(drop_path_rate=0.5).blocks[-1], 2)
    use_keyed_drop_path(nn.Sequential(experts))
    return experts


def test_layers_that_draw_random_numbers_are_detected() -> None:
    mae: MAE = tiny_mae().train()
    assert not draws_in_turn(mae)
    assert draws_in_turn(nn.Sequential(mae, nn.Dropout(0.1)).train())
    assert draws_in_turn(nn.Sequential(mae, DropPath(0.1)).train())
    assert not draws_in_turn(nn.Sequential(mae, nn.Dropout(0.1)).eval())
    keyed = nn.Sequential(mae, DropPath(0.1)).train()
    use_keyed_drop_path(keyed)
    assert not draws_in_turn(keyed)
    tokens = TokenMoE(tiny_mae(), (1,), 2).mae.encoder.train()
    assert draws_in_turn(tokens), "the gates' noise"
    assert draws_in_turn(dropping_experts().train())


def test_chunks_of_a_mixture_have_images_of_few_routes(tmp_path) -> None:
    moce = tiny_moce(tiny_mae(), different=True)
    images = demo_images(count=12)
    cluster_of = torch.randint(
        len(moce.clusters), (len(images),), generator=torch.Generator().manual_seed(0)
    )
    settings = TrainSettings(mae=tmp_path, clusters=tmp_path, data=tmp_path, out=tmp_path)
    objective = MoCEObjective(moce, tiny_encoder(), images, cluster_of, settings)
    rows = torch.randperm(len(images))
    places = objective.chunk_order(Batch(rows, torch.zeros_like(rows), images.take(rows)))
    assert sorted(places.tolist()) == list(range(len(images)))
    routes = [tuple(route) for route in moce.routes()[cluster_of[rows[places]]].tolist()]
    assert routes == sorted(routes) and len(set(routes)) > 1
    assert objective.chunk_size == chunk_size(moce.mae) > 1


@pytest.mark.parametrize(
    "changes",
    [{}, {"mixup": 0, "cutmix": 0, "class_weights": "balanced"}, {"random_erasing": 1}],
)
def test_gradients_of_fine_tuning_are_those_of_the_whole_batch(
    changes: dict, threads: int, tmp_path: Path
) -> None:
    """Mixed images, labels of unequal weight and dropped paths are the same in chunks of any size."""
    vit = (
        tiny_encoder()
        .build(num_classes=3, global_pool="avg", fc_norm=True, drop_path_rate=0.5)
        .train()
    )
    images = demo_images(count=12)
    labels = np.arange(12) % 4 % 3
    settings = FinetuneSettings(backbone="b", data="d", out=tmp_path, freeze=1, **changes)
    objective = FinetuneObjective(vit, tiny_encoder(), images, labels, settings)
    use_keyed_drop_path(vit)
    rows = torch.arange(12)
    step = Step(3, rows)
    prepared = objective.prepared(Batch(rows, rows // 5, images.take(rows)), step)

    def loss(model: nn.Module, chunk: slice) -> dict[str, Tensor]:
        part = prepared.take(chunk)
        draw_drop_path(model, 0, part)
        return objective.loss(model, part, step)

    whole = loss(vit, slice(None))
    whole["loss"].backward()
    expected = gradients(vit)
    with ThreadParallel(vit) as several:
        for size in (1, 5):
            assert_close(several.backward(loss, 12, size)["loss"], whole["loss"].detach())
            assert_close(gradients(vit), expected, atol=1e-6, rtol=1e-4)
    assert not any(name.startswith("blocks.0.") for name in expected), "frozen"


def test_paths_are_dropped_by_image_and_epoch() -> None:
    tokens, rows = torch.ones(1000, 2, 3), torch.arange(1000)
    layers = nn.Sequential(DropPath(0.25), nn.Sequential(DropPath(0.25, scale_by_keep=False)))
    use_keyed_drop_path(layers)

    def drawn(rows: Tensor, epochs: Tensor, seed: int = 0) -> list[Tensor]:
        draw_drop_path(layers, seed, Batch(rows, epochs, tokens))
        return [layer(tokens[: len(rows)]) for layer in (layers[0], layers[1][0])]

    first, second = drawn(rows, rows * 0)
    assert first.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert second.unique().tolist() == [0, 1]
    assert (first == 0).float().mean().item() == pytest.approx(0.25, abs=0.04)
    assert (first[:, :1] == first).all() and not torch.equal(first == 0, second == 0)
    assert torch.equal(drawn(rows[700:], rows[700:] * 0)[0], first[700:])
    for other in (drawn(rows, rows * 0 + 1)[0], drawn(rows, rows * 0, seed=1)[0]):
        assert not torch.equal(other, first)
    forget_drop_path(layers)
    torch.manual_seed(0)
    one = layers(tokens)
    torch.manual_seed(0)
    timms = nn.Sequential(DropPath(0.25), DropPath(0.25, scale_by_keep=False))
    assert torch.equal(one, timms(tokens)), "as timm's"
    assert torch.equal(layers.eval()(tokens), tokens)


@pytest.mark.parametrize("command", ["pretrain", "moce", "finetune"])
def test_a_run_on_several_threads_resumes_alike(
    command: str, threads: int, runs, tmp_path: Path
) -> None:
    """To the last bit; with another number of threads sums are rounded differently."""
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    given = {"steps": 8, "save_every": 3, "threads": threads}
    run_command(command, runs, straight, **given)
    watcher = stop_after(stopped, 1)
    with pytest.raises(Interrupted):
        run_command(command, runs, stopped, **given)
    watcher.join()
    run_command(command, runs, stopped, resume=True, **given)
    same_losses(straight, stopped)
    same_weights(straight, stopped)
