"""Selection of experts for a task, and the dense timm backbone built from them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from builders import (
    BLOCKS,
    CLUSTERS,
    EXPERTS,
    RUNTIME,
    batch,
    customize,
    tiny_encoder,
    tiny_mae,
    tiny_moce,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.functional import one_hot
from torch.testing import assert_close

import moce
from moce.customization.bank import Bank
from moce.customization.selection import choose, count_votes
from moce.data.augment import fitted, normalize
from moce.data.load import load_images
from moce.data.readers.sample import Sample
from moce.evaluation.task import load_task
from moce.models.cluster_model import ClusterModel
from moce.models.encoder import encode_tokens
from moce.models.experts import ExpertFFN
from moce.models.moce import MoCESpec, merge_experts
from moce.runs.assignments import read_assignments
from moce.weights.formats.timm import write_timm_folder


def bank_of(mixture) -> Bank:
    """A bank for `choose` and `backbone`; its clusters are never used."""
    width = mixture.clusters.shape[1]
    clusters = ClusterModel(
        centroids=mixture.clusters,
        potentials=torch.zeros(CLUSTERS),
        mean=torch.zeros(width),
        sizes=mixture.cluster_sizes.long(),
        epsilon=0.01,
        pooling="mean",
        similarity=0.9,
        spec=tiny_encoder(),
        encoder=tiny_mae().encoder,
    )
    return Bank(spec=None, model=mixture, clusters=clusters)  # type: ignore[arg-type]


def on(*clusters: int) -> torch.Tensor:
    return torch.tensor(clusters).bincount(minlength=CLUSTERS)


# --- dense encoders -----------------------------------------------------------------------------


def test_dense_encoder_of_a_route_equals_the_routed_model_on_that_route() -> None:
    mixture = tiny_moce(tiny_mae(), different=True)
    bank, (images, _, _) = bank_of(mixture), batch(8)
    for route in bank.routes:
        clusters = (mixture.routes() == torch.tensor(route)).all(dim=1).nonzero()[:, 0]
        dense = bank.backbone(bank.route_choice(route))
        assert not any(isinstance(module, ExpertFFN) for module in dense.modules())
        for cluster in clusters:
            routed = mixture.features(images, cluster.expand(len(images)))
            assert_close(dense.forward_features(images), routed, atol=1e-5, rtol=1e-5)


def test_dense_encoder_folds_prob_scales_exactly_for_a_single_cluster() -> None:
    mixture = tiny_moce(tiny_mae(), gate_scale="prob", different=True)
    bank, (images, _, _) = bank_of(mixture), batch(8)
    for cluster in range(CLUSTERS):
        choice = bank.choose(on(cluster), 0.5, "route")
        assert max(choice.gain_spread) < 1e-6
        dense = bank.backbone(choice).forward_features(images)
        routed = mixture.features(images, torch.full((len(images),), cluster))
        assert_close(dense, routed, atol=1e-5, rtol=1e-5)


def test_dense_encoder_shares_no_memory_with_the_mixture() -> None:
    mixture = tiny_moce(tiny_mae(), different=True)
    before = {name: value.clone() for name, value in mixture.state_dict().items()}
    dense = bank_of(mixture).backbone(bank_of(mixture).choose(on(0, 1, 2), 0.5, "merge"))
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(value, before[name]) for name, value in mixture.state_dict().items())
    assert len(mixture.experts) == len(BLOCKS)


def test_merging_with_a_one_hot_share_is_that_expert() -> None:
    layer = tiny_moce(tiny_mae(), different=True).experts[0]
    for expert in range(EXPERTS):
        share = one_hot(torch.tensor(expert), EXPERTS).double()
        merged = merge_experts(layer, share, torch.ones(EXPERTS))
        for name, value in layer.experts[expert].state_dict().items():
            assert_close(merged.state_dict()[name], value)


def test_merging_averages_parameters_and_scales_the_last_layer() -> None:
    layer = tiny_moce(tiny_mae(), different=True).experts[0]
    share, gain = torch.tensor([0.25, 0.0, 0.75]), torch.tensor([0.5, 9.0, 2.0])
    merged = merge_experts(layer, share, gain).state_dict()
    first, _, third = (expert.state_dict() for expert in layer.experts)
    for name in merged:
        a, b = (0.5, 2.0) if name.startswith("fc2") else (1.0, 1.0)
        assert_close(merged[name], 0.25 * a * first[name] + 0.75 * b * third[name])


def test_merge_of_a_task_on_one_route_equals_the_route() -> None:
    mixture = tiny_moce(tiny_mae(), different=True)
    bank, (images, _, _) = bank_of(mixture), batch(4)
    for cluster in (0, 5):
        routes = [bank.backbone(bank.choose(on(cluster), 0.5, name)) for name in ("route", "merge")]
        one, other = (vit.forward_features(images) for vit in routes)
        assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_generalist_does_not_depend_on_the_task() -> None:
    mixture = tiny_moce(tiny_mae(), different=True)
    bank = bank_of(mixture)
    one, other = (bank.choose(histogram, 0.5, "generalist") for histogram in (on(0, 0), on(6)))
    assert one.shares == other.shares
    expected = torch.zeros(len(BLOCKS), EXPERTS, dtype=torch.float64)
    for route, size in zip(mixture.routes(), mixture.cluster_sizes, strict=True):
        for block, expert in enumerate(route):
            expected[block, expert] += size / mixture.cluster_sizes.sum()
    assert_close(torch.tensor(one.shares, dtype=torch.float64), expected, atol=1e-6, rtol=0)


# --- choosing -----------------------------------------------------------------------------------

ROUTES = torch.tensor([[0, 1], [0, 1], [2, 0], [1, 1]])
GAINS = torch.tensor([[0.5, 0.9], [0.7, 0.9], [0.6, 0.8], [0.4, 1.0]])
SIZES = torch.tensor([10, 20, 30, 40])


def pick(histogram: list[int], strategy: str = "auto", **options):
    return choose(torch.tensor(histogram), ROUTES, GAINS, SIZES, (0.85, 0.9), strategy, **options)


def test_votes_are_counted_by_route_and_the_most_voted_wins() -> None:
    choice = pick([3, 2, 4, 1], "route")
    assert choice.route == (0, 1)
    assert choice.votes == {(0, 1): 5, (2, 0): 4, (1, 1): 1}
    assert list(choice.votes) == [(0, 1), (2, 0), (1, 1)]
    assert choice.share == pytest.approx(0.5)
    assert choice.cluster_histogram == [3, 2, 4, 1]
    assert (choice.similarity, choice.training_similarity) == (0.85, 0.9)


def test_route_takes_the_winner_alone_with_its_mean_scale_and_spread() -> None:
    choice = pick([3, 1, 2, 0], "route")
    assert_close(torch.tensor(choice.shares), torch.tensor([[1.0, 0, 0], [0, 1.0, 0]]))
    assert choice.gains[0][0] == pytest.approx((3 * 0.5 + 0.7) / 4)
    assert choice.gains[1][1] == pytest.approx(0.9)
    # Scales .5 .5 .5 .7: population deviation sqrt(3) / 4 * .2
    assert choice.gain_spread == pytest.approx([0.2 * 3**0.5 / 4, 0.0], abs=1e-6)


def test_merge_weighs_experts_by_the_tasks_votes() -> None:
    choice = pick([3, 1, 4, 2], "merge")
    assert_close(torch.tensor(choice.shares), torch.tensor([[0.4, 0.2, 0.4], [0.4, 0.6, 0]]))
    assert choice.gains[1][1] == pytest.approx((0.9 * 4 + 1.0 * 2) / 6)
    assert choice.gains[0][1] == pytest.approx(0.4)


def test_generalist_weighs_experts_by_the_training_images() -> None:
    choice = pick([9, 0, 0, 0], "generalist")
    assert_close(torch.tensor(choice.shares), torch.tensor([[0.3, 0.4, 0.3], [0.3, 0.7, 0]]))


@pytest.mark.parametrize(
    ("histogram", "threshold", "strategy"),
    [
        ([3, 2, 4, 1], 0.5, "route"),  # exactly at the threshold
        ([3, 2, 4, 2], 0.5, "merge"),
        ([3, 2, 4, 2], 0.4, "route"),
        ([0, 0, 9, 1], 0.95, "merge"),
        ([0, 0, 9, 0], 1.0, "route"),
    ],
)
def test_auto_takes_the_winner_at_the_threshold(
    histogram: list[int], threshold: float, strategy: str
) -> None:
    assert pick(histogram, threshold=threshold).strategy == strategy


@pytest.mark.parametrize(
    ("similarity", "strategy"), [(0.95, "route"), (0.81, "route"), (0.79, "generalist")]
)
def test_auto_gives_all_experts_to_a_foreign_task(similarity: float, strategy: str) -> None:
    """One that is more than twice as far from its centroids as the training images are."""
    votes = torch.tensor([9, 0, 0, 0])
    assert choose(votes, ROUTES, GAINS, SIZES, (similarity, 0.9)).strategy == strategy


def test_shares_cover_all_experts_even_those_no_cluster_uses() -> None:
    mixture = tiny_moce(tiny_mae())
    for gate in mixture.gates:  # ties go to the first: the last is never used
        gate.weight.data[-1] = gate.weight.data[0]
    choice = bank_of(mixture).choose(on(0, 1), 0.5, "merge")
    assert all(len(row) == EXPERTS for row in choice.shares + choice.gains)


def test_unknown_strategy_is_refused() -> None:
    with pytest.raises(moce.MoceError, match="strategy"):
        pick([1, 1, 1, 1], "best")


def test_votes_sort_ties_by_route() -> None:
    votes = count_votes(torch.tensor([2, 0, 2, 2]), ROUTES)
    assert list(votes) == [(0, 1), (1, 1), (2, 0)]


# --- folders that timm loads ----------------------------------------------------------------------

WITHOUT_MOCE = """
import sys
sys.modules["moce"] = None
import timm, torch
from safetensors.torch import load_file, save_file
torch.set_num_threads(1)
folder, given, result = sys.argv[1:]
model = timm.create_model("local-dir:" + folder, pretrained=True).eval()
headed = timm.create_model("local-dir:" + folder, pretrained=True, num_classes=7).eval()
images = load_file(given)["images"]
with torch.no_grad():
    logits = headed(images)
    assert logits.shape == (len(images), 7), logits.shape
    save_file({"features": model(images), "under_the_head": headed.forward_head(
        headed.forward_features(images), pre_logits=True)}, result)
cfg = timm.data.resolve_model_data_config(model)
print(cfg["mean"], cfg["std"], cfg["input_size"], cfg["crop_pct"], cfg["interpolation"])
"""


def load_without_moce(folder: Path, images: torch.Tensor, work: Path) -> tuple[dict, str]:
    save_file({"images": images}, work / "given.safetensors")
    command = [sys.executable, "-c", WITHOUT_MOCE, folder, work / "given.safetensors",
               work / "result.safetensors"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return load_file(work / "result.safetensors"), done.stdout


@pytest.mark.slow
def test_a_folder_loads_with_timm_without_moce(runs, tmp_path: Path) -> None:
    bank = moce.load(runs.moce)
    images, _, _ = batch(6)
    folder = customize(runs.moce, runs.task, tmp_path / "out", strategy="route").folder
    choice = bank.select(str(runs.task), "route")
    tokens = encode_tokens(bank.backbone(choice), images)
    pooled = tokens[:, bank.model.mae.encoder.num_prefix_tokens :].mean(dim=1)
    found, printed = load_without_moce(folder, images, tmp_path)
    assert_close(found["features"], pooled, atol=1e-5, rtol=1e-5)
    assert_close(found["under_the_head"], pooled, atol=1e-5, rtol=1e-5)
    assert printed.strip() == "[0.485, 0.456, 0.406] [0.229, 0.224, 0.225] (3, 16, 16) 1.0 bicubic"


@pytest.mark.parametrize(
    "arguments",
    [
        {"reg_tokens": 2},
        {"class_token": False},
        {"no_embed_class": True, "reg_tokens": 1},
        {"img_size": (16, 24)},
        {"qk_norm": True, "init_values": 1e-5},
    ],
)
def test_encoders_of_other_shapes_load_with_timm(arguments: dict, tmp_path: Path) -> None:
    spec = tiny_encoder(**arguments)
    vit = tiny_mae(**arguments).encoder
    size = arguments.get("img_size", (16, 16))
    images, _, _ = batch(3, size)
    write_timm_folder(tmp_path, vit, spec)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    pooled = vit.forward_features(images)[:, vit.num_prefix_tokens :].mean(dim=1)
    assert_close(loaded(images), pooled, atol=1e-5, rtol=1e-5)


def test_an_export_carries_nothing_of_timms_own_weights(runs) -> None:
    """Their tag, address and license belong to other weights of the same architecture."""
    config = json.loads((runs.backbone / "config.json").read_text())
    assert config["pretrained_cfg"]["tag"] == "moce"
    base = timm.create_model(config["architecture"]).pretrained_cfg
    assert base["license"] and base["hf_hub_id"]
    for cfg in (config["pretrained_cfg"], moce.load(runs.moce).customize(runs.task).pretrained_cfg):
        assert not {"license", "hf_hub_id", "url", "origin_url", "paper_ids"} & cfg.keys()
        assert base["tag"] not in cfg.values()


def test_a_fine_tuned_folder_predicts_as_reported(runs, tmp_path: Path) -> None:
    result = moce.finetune(
        runs.backbone, runs.task, out=tmp_path / "run", epochs=2, batch_size=8, **RUNTIME
    )
    model = timm.create_model(f"local-dir:{tmp_path / 'run'}", pretrained=True).eval()
    task, spec = load_task(str(runs.task), (3, 16, 16)), tiny_encoder()
    with torch.no_grad():
        images = fitted(task.test.pixels, (16, 16))
        predicted = model(normalize(images, spec.mean, spec.std)).argmax(dim=1)
    right = (predicted.numpy() == task.test_labels).mean()
    assert model.num_classes == len(task.classes)
    assert right == pytest.approx(result.value)


# --- the bank -------------------------------------------------------------------------------------


def test_bank_gives_the_same_choice_for_images_in_any_form(runs) -> None:
    bank = moce.load(runs.moce)
    paths = sorted((runs.task / "train").rglob("*.png"))
    expected = bank.select([str(path) for path in paths])
    assert bank.select(paths).cluster_histogram == expected.cluster_histogram
    opened = [Image.open(path) for path in paths]
    assert bank.select(opened).cluster_histogram == expected.cluster_histogram
    pixels = load_images([_sample(path) for path in paths], (16, 16)).pixels
    assert bank.select(pixels).cluster_histogram == expected.cluster_histogram
    assert bank.select(pixels.numpy()).cluster_histogram == expected.cluster_histogram
    assert sum(expected.cluster_histogram) == len(paths)


def _sample(path: Path):
    return Sample(str(path), lambda: Image.open(path))


def test_bank_assigns_training_images_as_in_training(runs) -> None:
    bank, known = moce.load(runs.moce), read_assignments(runs.clusters).to_dict()
    images = load_images(str(runs.data), (16, 16))
    cluster, similarity = bank.assign(images)
    assert cluster.tolist() == [known[name] for name in images.ids]
    assert similarity.mean().item() == pytest.approx(bank.clusters.similarity, abs=1e-5)


def test_customized_vit_is_trainable_and_equals_the_folder(runs) -> None:
    bank, (images, _, _) = moce.load(runs.moce), batch(4)
    vit = bank.customize(str(runs.task))
    folder = timm.create_model(f"local-dir:{runs.backbone}", pretrained=True).eval()
    assert_close(vit.eval()(images), folder(images), atol=1e-5, rtol=1e-5)
    assert all(p.requires_grad for name, p in vit.named_parameters() if name != "pos_embed")
    assert type(vit) is timm.models.VisionTransformer
    classifier = bank.customize(str(runs.task), num_classes=4).eval()
    assert classifier(images).shape == (4, 4)
    assert_close(
        classifier.forward_head(classifier.forward_features(images), pre_logits=True), vit(images)
    )


@pytest.mark.parametrize("images", [[], 7, torch.zeros(2, 3, 8, 8, dtype=torch.uint8), [3]])
def test_bank_refuses_other_things_than_images(runs, images: object) -> None:
    with pytest.raises(moce.MoceError):
        moce.load(runs.moce).select(images)


def test_a_route_no_cluster_takes_is_refused(runs) -> None:
    with pytest.raises(moce.MoceError):
        moce.load(runs.moce).route_choice((99, 99))


def test_selection_file_is_the_choice(runs) -> None:
    content = json.loads((runs.backbone / "selection.json").read_text())
    choice = moce.load(runs.moce).select(str(runs.task))
    assert content == json.loads(json.dumps(choice.to_json()))
    assert content["strategy"] in ("route", "merge")


def test_functions_are_still_there_after_the_first_call(runs) -> None:
    """No subpackage takes the name of a function of the public interface."""
    moce.load(runs.moce)
    for name in moce.__all__:
        assert callable(getattr(moce, name)), f"moce.{name} is no function"


def test_mixture_spec_is_in_the_run(runs) -> None:
    info = json.loads((runs.moce / "model.json").read_text())
    spec = MoCESpec.from_dict(info["spec"])
    assert (spec.blocks, spec.num_experts, spec.num_clusters) == (BLOCKS, EXPERTS, CLUSTERS)
