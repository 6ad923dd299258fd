"""Experts routed by cluster: what they compute, which of them learn, and that training is sound."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from builders import (
    BLOCKS,
    CLUSTERS,
    DENSE,
    EXPERTS,
    TRAIN,
    batch,
    customize,
    demo_images,
    tiny_encoder,
    tiny_mae,
    tiny_moce,
    tiny_spec,
)
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.testing import assert_close

import moce
from moce.config import TrainSettings
from moce.errors import MoceError
from moce.models.encoder import encode_tokens
from moce.models.experts import ExpertFFN, ExpertLayer, replace_ffn
from moce.models.moce import MoCE, MoCESpec, check_blocks, default_blocks
from moce.runs.files import read_tensors
from moce.training.objectives import MoCEObjective, augmented, gate_noise, mask_noise
from moce.training.optimizer import parameter_groups
from moce.training.trainer import Objective, fit

CPU = torch.device("cpu")


def settings_for(out: Path, steps: int, **changes: object) -> TrainSettings:
    """Settings of a few steps over the 64 images of `demo_images`."""
    out.mkdir(exist_ok=True)
    values = {**TRAIN, "data": "-", "mae": "-", "out": out, "epochs": steps / 2, **changes}
    return TrainSettings.model_validate(values)


# --- what is computed -------------------------------------------------------------------------


def test_fresh_mixture_computes_what_its_mae_computed() -> None:
    mae = tiny_mae()
    images, noise, clusters = batch(12)
    expected = mae(images, noise)
    mixture = tiny_moce(copy.deepcopy(mae)).eval()
    output = mixture(images, noise, clusters)
    assert_close(output.reconstruction, expected.loss, atol=1e-6, rtol=0)
    assert_close(output.prediction, expected.prediction, atol=1e-6, rtol=0)
    assert torch.equal(output.removed, expected.removed)


def test_alike_experts_equal_dense_whatever_the_gate_says() -> None:
    mae = tiny_mae()
    images, noise, clusters = batch(12)
    expected = mae(images, noise).prediction
    for seed in range(3):
        torch.manual_seed(seed)
        mixture = tiny_moce(copy.deepcopy(mae))
        for gate in mixture.gates:
            nn.init.normal_(gate.weight, std=3.0)
        noisy = torch.randn(len(BLOCKS), CLUSTERS, EXPERTS)
        prediction = mixture(images, noise, clusters, noisy).prediction
        assert_close(prediction, expected, atol=1e-6, rtol=0)


class _Scaled(nn.Module):
    """An FFN whose output is scaled."""

    def __init__(self, ffn: nn.Module, scale: Tensor) -> None:
        super().__init__()
        self.ffn, self.scale = ffn, scale

    def forward(self, tokens: Tensor) -> Tensor:
        return self.ffn(tokens) * self.scale


@pytest.mark.parametrize("gate_scale", ["straight_through", "prob"])
@pytest.mark.parametrize("noisy", [False, True])
def test_every_image_goes_to_the_expert_of_its_clusters_row(gate_scale: str, noisy: bool) -> None:
    mixture = tiny_moce(tiny_mae(), gate_scale=gate_scale, different=True)
    images, noise, clusters = batch(16)
    torch.manual_seed(1)
    extra = torch.randn(len(BLOCKS), CLUSTERS, EXPERTS) if noisy else None
    with torch.no_grad():
        together = mixture(images, noise, clusters, extra).prediction
        experts_seen = set()
        for image in range(len(images)):
            dense = copy.deepcopy(mixture.mae)
            for number, layer in enumerate(BLOCKS):
                logits = mixture.gates[number].weight @ mixture.clusters[clusters[image]]
                if extra is not None:
                    logits = logits + extra[number, clusters[image]]
                p = logits.softmax(dim=0)
                expert = int(p.argmax())
                experts_seen.add((layer, expert))
                ffn = mixture.experts[number].experts[expert]
                scale = p[expert] if gate_scale == "prob" else torch.ones(())
                block = dense.encoder.blocks[layer]
                dense.encoder.blocks[layer] = replace_ffn(block, _Scaled(ffn, scale), Block)
            alone = dense(images[image : image + 1], noise[image : image + 1]).prediction[0]
            assert_close(together[image], alone, atol=1e-5, rtol=1e-5)
    assert len(experts_seen) == len(BLOCKS) * EXPERTS  # otherwise the comparison shows little


def test_prob_scales_an_experts_output_by_its_probability() -> None:
    mixture = tiny_moce(tiny_mae(), gate_scale="prob", different=True)
    layer, tokens = mixture.experts[0], torch.randn(2, 5, 32)
    clusters = torch.tensor([2, 5])
    probability, expert = mixture.tables()[0][clusters].max(dim=1)
    routed = layer(tokens, mixture.route(clusters)[BLOCKS[0]])
    for image in range(2):
        plain = layer.experts[int(expert[image])](tokens[image])
        assert_close(routed[image], probability[image] * plain)
    assert probability.max() < 0.999


def test_permuting_the_batch_permutes_the_outputs() -> None:
    mixture = tiny_moce(tiny_mae(), different=True)
    images, noise, clusters = batch(16)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(3))
    straight = mixture(images, noise, clusters)
    permuted = mixture(images[order], noise[order], clusters[order])
    assert_close(permuted.prediction, straight.prediction[order], atol=1e-6, rtol=1e-5)
    assert_close(permuted.reconstruction, straight.reconstruction, atol=1e-6, rtol=0)
    assert_close(permuted.balance + permuted.imbalance, straight.balance + straight.imbalance)


def test_features_of_an_image_do_not_depend_on_its_batch() -> None:
    mixture = tiny_moce(tiny_mae(), different=True)
    images, _, clusters = batch(8)
    together = mixture.features(images, clusters)
    alone = torch.cat([mixture.features(images[i : i + 1], clusters[i : i + 1]) for i in range(8)])
    assert_close(together, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("expert_scope", ["ffn", "block"])
def test_moe_blocks_need_a_routing(expert_scope: str) -> None:
    mixture = tiny_moce(tiny_mae(), expert_scope=expert_scope)
    with pytest.raises(TypeError, match="routing"):
        encode_tokens(mixture.mae.encoder, batch(2)[0])


def test_gate_losses_are_those_of_the_whole_batch_whatever_part_is_passed() -> None:
    mixture = tiny_moce(tiny_mae(), balance_scope="batch")
    images, noise, clusters = batch(16)
    counts = clusters.bincount(minlength=CLUSTERS)
    whole = mixture(images, noise, clusters)
    part = mixture(images[:5], noise[:5], clusters[:5], counts=counts)
    assert_close(part.balance, whole.balance)
    assert_close(part.imbalance, whole.imbalance)


# --- gradients --------------------------------------------------------------------------------


def test_very_confident_gates_give_finite_gradients() -> None:
    for gate_scale in ("straight_through", "prob"):
        mixture = tiny_moce(tiny_mae(), gate_scale=gate_scale)
        mixture.clusters.copy_(torch.eye(CLUSTERS, 32))
        for gate in mixture.gates:
            sign = torch.arange(EXPERTS * 32).reshape(EXPERTS, 32) % 2 * 2.0 - 1
            gate.weight.data = 1e4 * sign
        images, noise, clusters = batch(8)
        output = mixture(images, noise, clusters, torch.zeros(2, CLUSTERS, EXPERTS))
        total = output.reconstruction + output.balance + output.imbalance
        total.backward()
        assert torch.isfinite(total)
        for name, parameter in mixture.named_parameters():
            assert parameter.grad is None or torch.isfinite(parameter.grad).all(), name


def gradients_of_steps(out: Path, steps: int, **changes: object) -> list[list[Tensor]]:
    """The gradients each optimizer step of the real training loop is given."""
    mixture = tiny_moce(tiny_mae(), different=True, balance_scope="batch")
    images = demo_images()
    cluster_of = torch.arange(len(images)) % CLUSTERS
    settings = settings_for(out, steps, **changes)
    seen: list[list[Tensor]] = []

    def record(optimizer: torch.optim.Optimizer, *_: object) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        seen.append([p.grad.clone() for p in parameters if p.grad is not None])

    handle = register_optimizer_step_pre_hook(record)
    try:
        fit(MoCEObjective(mixture, tiny_encoder(), images, cluster_of, settings), settings, CPU,
            "float32")  # fmt: skip
    finally:
        handle.remove()
    return seen


def test_micro_batches_give_the_gradient_of_the_whole_batch(tmp_path: Path) -> None:
    losses = {"balance_weight": 1.0, "imbalance_weight": 1.0, "batch_size": 32}
    whole = gradients_of_steps(tmp_path / "a", 1, **losses)
    for size in (8, 5):  # 5 leaves a smaller last part
        parts = gradients_of_steps(tmp_path / str(size), 1, micro_batch_size=size, **losses)
        assert len(parts) == len(whole) == 1  # one optimizer step, so gate losses count once
        assert len(parts[0]) == len(whole[0])
        for one, other in zip(parts[0], whole[0], strict=True):
            assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_logged_losses_do_not_depend_on_micro_batches(tmp_path: Path) -> None:
    from moce.runs.model import read_metrics

    rows = []
    for name, size in (("whole", None), ("parts", 5)):
        gradients_of_steps(tmp_path / name, 1, micro_batch_size=size)
        rows.append(read_metrics(tmp_path / name)[-1])
    for loss in ("loss", "reconstruction", "balance", "imbalance"):
        assert rows[0][loss] == pytest.approx(rows[1][loss], abs=1e-5)


# --- training ---------------------------------------------------------------------------------


def test_one_expert_without_gate_losses_trains_as_the_dense_model(runs, tmp_path: Path) -> None:
    options = {**DENSE, "mae": runs.mae, "epochs": 1, "batch_size": 16}
    moce.train(runs.data, out=tmp_path / "dense", method="mae", **options)
    moce.train(
        runs.data,
        out=tmp_path / "one",
        clusters=runs.clusters,
        balance_weight=0,
        imbalance_weight=0,
        num_experts=1,
        **options,
    )
    dense = read_tensors(tmp_path / "dense" / "model.safetensors")
    before = read_tensors(runs.mae / "model.safetensors")
    one = read_tensors(tmp_path / "one" / "model.safetensors")
    one = {name.removeprefix("model.mae.").replace("mlp.experts.0.", "mlp."): value
           for name, value in one.items() if name.startswith("model.mae.")}  # fmt: skip
    assert one.keys() == dense.keys()
    for name, value in dense.items():
        assert_close(one[name], value, atol=1e-6, rtol=0, msg=name)
    moved = dense["encoder.blocks.1.mlp.fc1.weight"] - before["encoder.blocks.1.mlp.fc1.weight"]
    assert moved.abs().max() > 1e-3


def test_an_idle_expert_stays_where_it_is(tmp_path: Path) -> None:
    """Neither AdamW's momentum nor its decay moves an expert that was active once."""
    mixture = tiny_moce(tiny_mae(), different=True)
    images, spec = demo_images(), tiny_encoder()
    settings = settings_for(tmp_path, 6, gate_noise=False, weight_decay=0.5)
    busy = (mixture.routes()[:, 0] != 0).nonzero()[:, 0]
    before: list[list[Tensor]] = []

    class IdleFromStep3(Objective):
        def loss(self, model: nn.Module, batch, step):
            before.append([p.detach().clone() for p in idle.parameters()])
            count = len(batch.rows)
            clusters = torch.arange(count) % CLUSTERS if step.number < 3 else busy[:1].expand(count)
            output = model(
                augmented(batch, settings, spec, (16, 16)),
                mask_noise(batch, settings, mixture.mae),
                clusters,
                gate_noise(mixture, settings, step.number),
            )
            return {"loss": output.reconstruction}

    idle = mixture.experts[0].experts[0]
    groups = parameter_groups(mixture.parameters(), settings.weight_decay)
    fit(IdleFromStep3("test", mixture, images, groups), settings, CPU, "float32")
    after = [p.detach() for p in idle.parameters()]
    assert any(not torch.equal(a, b) for a, b in zip(before[0], before[3], strict=True))
    for step in (4, 5):
        assert all(torch.equal(a, b) for a, b in zip(before[3], before[step], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before[3], after, strict=True))


def test_gates_are_not_decayed_and_have_their_own_rate(tmp_path: Path) -> None:
    mixture = tiny_moce(tiny_mae())
    settings = settings_for(tmp_path, 1, weight_decay=0.3, gate_lr_scale=7.0)
    images = demo_images()
    cluster_of = torch.zeros(len(images), dtype=torch.int64)
    objective = MoCEObjective(mixture, tiny_encoder(), images, cluster_of, settings)
    gates = {id(p) for p in mixture.gates.parameters()}
    seen = 0
    for group in objective.parameter_groups:
        inside = [id(p) in gates for p in group["params"]]
        assert all(inside) or not any(inside)
        if any(inside):
            seen += len(inside)
            assert group["weight_decay"] == 0 and group["lr_scale"] == 7.0
        else:
            assert group["lr_scale"] == 1.0
    assert seen == len(BLOCKS)


def test_gate_noise_is_per_cluster_and_step_with_deviation_one_over_experts(tmp_path) -> None:
    mixture = tiny_moce(tiny_mae(), num_experts=4)
    mixture.clusters = torch.zeros(4000, 32)
    settings = settings_for(tmp_path, 1)
    first, second = (gate_noise(mixture, settings, step) for step in (0, 1))
    assert first.shape == (len(BLOCKS), 4000, 4)
    assert first.std().item() == pytest.approx(1 / 4, rel=0.02)
    assert torch.equal(first, gate_noise(mixture, settings, 0))
    assert not torch.equal(first, second)
    assert gate_noise(mixture, settings_for(tmp_path, 1, gate_noise=False), 0) is None


# --- structure --------------------------------------------------------------------------------


def test_shared_gate_is_one_gate_with_at_most_one_route_per_expert() -> None:
    spec = MoCESpec(tiny_spec(), BLOCKS, EXPERTS, CLUSTERS, 32, shared_gate=True)
    mixture = spec.build()
    assert len(mixture.gates) == 1
    source = tiny_moce(tiny_mae(), num_gates=1)
    mixture.load_state_dict(source.state_dict())
    routes = mixture.routes()
    assert routes.shape == (CLUSTERS, len(BLOCKS))
    assert torch.equal(routes[:, 0], routes[:, 1])
    assert 1 < len(routes.unique(dim=0)) <= EXPERTS
    separate = tiny_moce(tiny_mae()).routes()
    assert len(separate.unique(dim=0)) > EXPERTS


def test_a_mixture_survives_its_spec_and_weights() -> None:
    source = tiny_moce(tiny_mae(), gate_scale="prob", different=True)
    spec = MoCESpec(tiny_spec(), BLOCKS, EXPERTS, CLUSTERS, 32, "prob")
    again: MoCE = MoCESpec.from_dict(spec.to_dict()).build().eval()
    again.load_state_dict(source.state_dict())
    images, noise, clusters = batch(6)
    one, other = source(images, noise, clusters), again(images, noise, clusters)
    assert_close(one.prediction, other.prediction)
    assert_close(one.balance, other.balance)
    assert again.gate_scale == "prob"


def test_only_the_chosen_blocks_have_experts() -> None:
    mixture = tiny_moce(tiny_mae())
    has_experts = [isinstance(block.mlp, ExpertFFN) for block in mixture.mae.encoder.blocks]
    assert has_experts == [layer in BLOCKS for layer in range(4)]


@pytest.mark.parametrize(
    ("depth", "blocks"), [(12, (9, 11)), (4, (1, 3)), (3, (1,)), (2, (1,)), (1, (0,))]
)
def test_default_blocks_are_the_last_two_odd_ones(depth: int, blocks: tuple[int, ...]) -> None:
    assert default_blocks(depth) == blocks


@pytest.mark.parametrize("blocks", [(), (1, 1), (4,), (-1,)])
def test_impossible_blocks_are_refused(blocks: tuple[int, ...]) -> None:
    with pytest.raises(moce.MoceError, match="moe_blocks"):
        check_blocks(blocks, 4)


def test_shared_gate_run_loads_and_routes_alike(runs, tmp_path: Path) -> None:
    moce.train(
        runs.data, mae=runs.mae, clusters=runs.clusters, out=tmp_path / "run", shared_gate=True,
        epochs=0.2, **TRAIN,
    )  # fmt: skip
    bank = moce.load(tmp_path / "run")
    assert all(len(set(route)) == 1 for route in bank.routes)
    customize(tmp_path / "run", runs.task, out=tmp_path / "dense")


# --- experts that are whole blocks ------------------------------------------------------------------


def test_whole_block_experts_start_as_the_mae_and_end_as_a_dense_vit() -> None:
    images, noise, clusters = batch(6)
    expected = tiny_mae()(images, noise).loss
    mixture = tiny_moce(tiny_mae(), expert_scope="block").eval()
    assert_close(mixture(images, noise, clusters).reconstruction, expected)
    mixture = tiny_moce(tiny_mae(), expert_scope="block", different=True).eval()
    route = mixture.routes()[int(clusters[0])]
    shares = torch.nn.functional.one_hot(route, EXPERTS).double()
    dense = mixture.dense_encoder(shares, torch.ones_like(shares))
    assert not any(isinstance(module, ExpertLayer) for module in dense.modules())
    same = clusters[:1].expand(len(images))
    assert_close(dense.forward_features(images), mixture.features(images, same))


def test_whole_block_experts_give_the_gate_its_gradient() -> None:
    images, noise, clusters = batch(6)
    mixture = tiny_moce(tiny_mae(), expert_scope="block", different=True).train()
    mixture(images, noise, clusters).reconstruction.backward()
    assert all(gate.weight.grad.abs().sum() > 0 for gate in mixture.gates)


def test_whole_block_experts_refuse_the_scale_no_dense_block_could_equal() -> None:
    with pytest.raises(MoceError, match="straight_through"):
        tiny_moce(tiny_mae(), gate_scale="prob", expert_scope="block")


def test_whole_block_experts_are_built_again_from_their_spec() -> None:
    mixture = tiny_moce(tiny_mae(), expert_scope="block", different=True)
    spec = MoCESpec(tiny_spec(), BLOCKS, EXPERTS, CLUSTERS, 32, expert_scope="block")
    again = MoCESpec.from_dict(spec.to_dict()).build()
    again.load_state_dict(mixture.state_dict())
