"""TokenMoE, fixed routing and subset: each a property that would fail if it were wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from builders import BLOCKS, DENSE, EXPERTS, RUNTIME, TRAIN, batch, shake, tiny_mae, tiny_spec
from conftest import Runs

import moce
from moce.commands.train import clusters_of_task
from moce.errors import MoceError
from moce.models.experts import ExpertFFN, Routing, apply_experts
from moce.models.token_moe import TokenExpertFFN, TokenMoE, TokenMoESpec, token_balance
from moce.runs.model import read_info, read_metrics
from moce.weights.from_runs import load_backbone, load_mae, load_moce


def token_moe(num_experts: int = EXPERTS, gate_scale: str = "straight_through") -> TokenMoE:
    torch.manual_seed(3)
    return TokenMoE(tiny_mae(), BLOCKS, num_experts, gate_scale)


def clone_shared_tensors(model: TokenMoE) -> TokenMoE:
    torch.manual_seed(5)
    for layer in model.experts:
        shake(layer, 0.2)
    return model


# --- TokenMoE -------------------------------------------------------------------------------------


def test_at_the_start_it_computes_what_the_mae_computes() -> None:
    images, noise, _ = batch(4)
    expected = tiny_mae()(images, noise).loss
    model = token_moe().train()
    torch.testing.assert_close(model(images, noise).reconstruction, expected)


def test_with_prob_scale_the_experts_start_scaled_down() -> None:
    images, noise, _ = batch(4)
    model = token_moe(gate_scale="prob").eval()
    assert not torch.allclose(model(images, noise).reconstruction, tiny_mae()(images, noise).loss)


def test_every_token_is_worked_on_by_the_expert_its_own_gate_picks() -> None:
    layer = clone_shared_tensors(token_moe()).experts[0].eval()
    tokens = torch.randn(3, 5, 32)
    chosen = (tokens @ layer.gate.T).argmax(dim=2)
    assert len(chosen.unique()) > 1
    expected = torch.stack(
        [
            torch.stack([layer.experts[int(e)](t[None])[0] for t, e in zip(row, es, strict=True)])
            for row, es in zip(tokens, chosen, strict=True)
        ]
    )
    torch.testing.assert_close(layer(tokens)[0], expected)


def test_tokens_of_one_image_go_to_several_experts_as_cluster_routing_never_does() -> None:
    layer = clone_shared_tensors(token_moe()).experts[0].eval()
    tokens = torch.randn(1, 40, 32)
    assert len((tokens @ layer.gate.T).argmax(dim=2).unique()) == EXPERTS


def test_noise_is_drawn_in_training_only() -> None:
    images, noise, _ = batch(4)
    model = clone_shared_tensors(token_moe())
    model.eval()
    torch.manual_seed(0)
    first, second = (model(images, noise).reconstruction for _ in range(2))
    assert torch.equal(first, second)
    model.train()
    outputs = [model(images, noise).reconstruction for _ in range(2)]
    assert not torch.equal(*outputs)


def test_balance_is_zero_for_even_gates_and_large_for_a_collapsed_one() -> None:
    even = torch.eye(4).repeat(5, 1) * 50
    torch.testing.assert_close(token_balance(even, even, 0.25), torch.tensor(0.0))
    collapsed = torch.zeros(20, 4)
    collapsed[:, 1] = 50
    torch.testing.assert_close(token_balance(collapsed, collapsed, 0.25), torch.tensor(3.0))


def test_the_load_counts_the_chance_of_being_chosen_if_noise_were_drawn_again() -> None:
    torch.manual_seed(0)
    clean, deviation = torch.randn(1, 3), 0.5
    noisy = clean + torch.tensor([[0.3, -0.1, 0.2]])
    others = noisy.max()
    draws = clean + deviation * torch.randn(200_000, 3)
    chance = (draws > others).float().mean(dim=0)  # each against the best of the pass
    importance = clean.softmax(dim=1)[0]
    cv = lambda v: v.var(unbiased=False) / v.mean() ** 2  # noqa: E731
    expected = (cv(importance) + cv(chance)) / 2
    torch.testing.assert_close(token_balance(clean, noisy, deviation), expected, rtol=0.05, atol=0)


def test_the_balance_loss_reaches_the_gates_in_training_only() -> None:
    images, noise, _ = batch(4)
    model = clone_shared_tensors(token_moe()).train()
    output = model(images, noise)
    output.balance.backward()
    assert all(layer.gate.grad.abs().sum() > 0 for layer in model.experts)
    assert model.eval()(images, noise).balance.item() == 0


def test_its_spec_builds_it_again() -> None:
    spec = TokenMoESpec(tiny_spec(), BLOCKS, EXPERTS)
    model = clone_shared_tensors(token_moe())
    again = TokenMoESpec.from_dict(spec.to_dict()).build()
    again.load_state_dict(model.state_dict())
    images, noise, _ = batch(2)
    model.eval()
    again.eval()
    assert torch.equal(model(images, noise).reconstruction, again(images, noise).reconstruction)


def test_rows_of_experts_come_back_in_their_order() -> None:
    ffn = ExpertFFN(torch.nn.Linear(4, 4), 3)
    shake(ffn, 1.0)
    rows, expert = torch.randn(7, 2, 4), torch.tensor([2, 0, 2, 1, 0, 0, 2])
    one_by_one = torch.stack([ffn.experts[int(e)](r) for r, e in zip(rows, expert, strict=True)])
    torch.testing.assert_close(apply_experts(ffn.experts, rows, expert), one_by_one)
    torch.testing.assert_close(ffn(rows, Routing(expert, torch.ones(7))), one_by_one)


# --- by the command --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def token_run(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("token") / "run"
    moce.train(runs.data, mae=runs.mae, out=out, method="token_moe", epochs=1, **TRAIN)
    return out


def test_a_token_moe_run_is_a_backbone_with_all_its_experts(token_run: Path) -> None:
    backbone = load_backbone(str(token_run))
    layers = [m for m in backbone.vit.modules() if isinstance(m, TokenExpertFFN)]
    assert len(layers) == len(BLOCKS)
    assert not backbone.dense
    assert read_info(token_run)["kind"] == "token_moe"
    logged = read_metrics(token_run)[-1]
    assert {"reconstruction", "balance", "experts"} <= set(logged)


def test_it_is_probed_and_fine_tuned_as_any_other(runs: Runs, token_run: Path, tmp_path: Path):
    found = moce.probe(token_run, runs.task, solver="lbfgs", **RUNTIME)
    assert 0 <= found.mean <= 1
    options = {**RUNTIME, "epochs": 1, "batch_size": 8, "rand_augment": ""}
    tuned = moce.finetune(token_run, runs.task, out=tmp_path / "tuned", **options)
    assert 0 <= tuned.value <= 1
    assert not (tmp_path / "tuned" / "config.json").exists()  # no plain ViT, so nothing for timm


def test_fine_tuning_starts_from_its_trained_experts(token_run: Path) -> None:
    from moce.evaluation.finetune import build_classifier

    backbone = load_backbone(str(token_run))
    vit = build_classifier(backbone, 3, 0.0)
    for name, value in backbone.vit.state_dict().items():
        if "experts" in name or "gate" in name:
            assert torch.equal(vit.state_dict()[name], value)


@pytest.fixture(scope="module")
def sdr_run(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sdr") / "run"
    settings = {**TRAIN, "method": "sdr", "clusters": runs.clusters}
    moce.train(runs.data, mae=runs.mae, out=out, epochs=2, **settings)
    return out


def test_fixed_routes_stay_as_they_started_and_are_the_same_in_all_blocks(sdr_run: Path) -> None:
    _, model, _ = load_moce(sdr_run)
    routes = model.routes()
    assert torch.equal(routes[:, 0], routes[:, 1])
    assert len(routes[:, 0].unique()) == EXPERTS
    gates = [row["gates"] for row in read_metrics(sdr_run)]
    assert all(block["clusters_flipped"] == 0 for row in gates for block in row.values())
    tables = [block["max_gate"] for row in gates for block in row.values()]
    assert max(tables) == pytest.approx(min(tables))


def test_fixed_routing_still_trains_its_experts_apart(sdr_run: Path) -> None:
    last = read_metrics(sdr_run)[-1]["gates"]
    assert all(block["divergence"] > 0 for block in last.values())
    assert last[str(BLOCKS[0])]["images_per_expert"]


def test_fixed_routing_is_customized_as_moce_is(runs: Runs, sdr_run: Path) -> None:
    vit = moce.load(sdr_run).customize(runs.task)
    assert isinstance(vit, timm.models.VisionTransformer)


def test_subset_trains_on_the_images_of_the_tasks_clusters(runs: Runs, tmp_path: Path) -> None:
    settings = {**DENSE, "method": "subset", "clusters": runs.clusters, "task": str(runs.task)}
    moce.train(runs.data, mae=runs.mae, out=tmp_path / "subset", steps=3, **settings)
    info = read_info(tmp_path / "subset")
    assert info["kind"] == "mae"
    assert 0 < info["images"] < read_info(runs.moce)["images"]
    assert read_metrics(tmp_path / "subset")[-1]["step"] == 3
    load_mae(tmp_path / "subset")


def test_clusters_of_a_task_are_the_densest_that_hold_its_share() -> None:
    histogram, sizes = torch.tensor([0, 50, 45, 5, 0]), torch.tensor([10, 100, 50, 100, 10])
    assert clusters_of_task(histogram, sizes, 0.9).tolist() == [False, True, True, False, False]
    assert clusters_of_task(histogram, sizes, 0.4).tolist() == [False, False, True, False, False]
    assert clusters_of_task(histogram, sizes, 1.0).tolist() == [False, True, True, True, False]


@pytest.mark.parametrize(
    ("method", "needed"), [("sdr", "--clusters"), ("subset", "--clusters"), ("moce", "--clusters")]
)
def test_methods_say_what_they_need(runs: Runs, tmp_path: Path, method: str, needed: str) -> None:
    with pytest.raises(MoceError, match=needed):
        moce.train(runs.data, mae=runs.mae, out=tmp_path / "x", method=method, **DENSE)
    assert not (tmp_path / "x").exists()


def test_subset_needs_a_task(runs: Runs, tmp_path: Path) -> None:
    settings = {**DENSE, "method": "subset", "clusters": runs.clusters}
    with pytest.raises(MoceError, match="--task"):
        moce.train(runs.data, mae=runs.mae, out=tmp_path / "x", **settings)


def test_equal_steps_whatever_the_number_of_images(runs: Runs, tmp_path: Path) -> None:
    few = runs.data / "mnist"
    for name, data in (("all", runs.data), ("few", few)):
        settings = {**DENSE, "method": "mae", "steps": 4}
        moce.train(data, mae=runs.mae, out=tmp_path / name, **settings)
    steps = [read_metrics(tmp_path / name)[-1]["step"] for name in ("all", "few")]
    assert steps == [4, 4]
    assert np.isfinite(read_metrics(tmp_path / "few")[-1]["loss"])


def test_a_subset_takes_as_many_steps_as_all_images_do(runs: Runs, tmp_path: Path) -> None:
    settings = {**DENSE, "epochs": 2, "batch_size": 16, "mae": runs.mae}
    moce.train(runs.data, method="mae", out=tmp_path / "all", **settings)
    given = {"clusters": runs.clusters, "task": str(runs.task), "out": tmp_path / "subset"}
    moce.train(runs.data, method="subset", **given, **settings)
    assert read_info(tmp_path / "subset")["images"] < read_info(tmp_path / "all")["images"]
    steps = [read_metrics(tmp_path / name)[-1]["step"] for name in ("all", "subset")]
    assert steps[0] == steps[1]
    moce.train(runs.data, method="subset", **given, **settings, resume=True)
