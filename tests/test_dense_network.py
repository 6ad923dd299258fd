"""Detectors and segmenters: windows, pyramids, resampled weights, and the views they train on."""

from __future__ import annotations

import ast
import inspect

import numpy as np
import pytest
import torch
from builders import TINY_ARGS, TINY_NAME, tiny_mae, tiny_spec
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler

from moce.config import FinetuneSettings
from moce.config.load import parse
from moce.data.rng import Stream
from moce.dense import network, rle
from moce.dense.augment import Views
from moce.dense.network import SimplePyramid, VitFeatures, build_network, vit_of
from moce.dense.recipe import by_task, network_config, new_network
from moce.dense.sampling import KeyedSampler
from moce.dense.types import IGNORE, DenseSource, Instances
from moce.errors import MoceError
from moce.models.encoder import encode_tokens
from moce.weights.from_runs import Backbone

CONFIG = {
    "architecture": TINY_NAME,
    "model_args": {k: v for k, v in TINY_ARGS.items() if k != "img_size"},
    "image_size": 32,
    "mean": [0.5, 0.4, 0.3],
    "std": [0.2, 0.3, 0.4],
    "num_classes": 3,
    "masks": True,
    "window": 0,
}
HEAD = {"dim": 16, "scales": [2, 1, 0.5], "anchor_scale": 4, "depth": 0, "proposals": 64}
DETECTOR = {**CONFIG, "task": "detect", "head": HEAD}


def segmenter(kind: str) -> dict:
    return {**CONFIG, "task": "segment", "head": {"kind": kind, "dim": 16}}


def settings(task: str, **values: object) -> FinetuneSettings:
    return parse(
        FinetuneSettings, {"backbone": "b", "data": "d", "out": "o", "task": task, **values}
    )


def source(task: str) -> DenseSource:
    return DenseSource("d", task, ["a", "b"], [], has_masks=True)


# --- networks ------------------------------------------------------------------------------------


def test_the_file_that_folders_get_a_copy_of_needs_nothing_of_moce() -> None:
    tree = ast.parse(inspect.getsource(network))
    modules = [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    modules += [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
    assert modules and not [name for name in modules if name.startswith("moce")]


def test_attention_in_a_window_sees_that_window_only() -> None:
    vit = tiny_mae(img_size=32).encoder  # a grid of 8 x 8 patches
    tokens = torch.randn(1, 64, 32)
    changed = tokens.clone()
    changed[:, 8 * 5 + 6] += 1  # row 5, column 6: the window at the lower right
    run = lambda x: network._in_windows(vit.blocks[0], (8, 8), 4, x)  # noqa: E731
    moved = (run(tokens) != run(changed)).any(dim=2).reshape(8, 8)
    assert moved[4:, 4:].all() and not moved[:4].any() and not moved[:, :4].any()


def test_one_window_over_the_whole_grid_is_global_attention() -> None:
    vit = tiny_mae(img_size=32).encoder
    tokens = torch.randn(2, 64, 32)
    torch.testing.assert_close(
        network._in_windows(vit.blocks[0], (8, 8), 8, tokens), vit.blocks[0](tokens)
    )


def test_features_are_the_patch_tokens_of_the_encoder() -> None:
    vit = tiny_mae(img_size=(16, 32)).encoder
    images = torch.randn(2, 3, 16, 32)
    (found,) = VitFeatures(vit, [3])(images)
    tokens = encode_tokens(vit, images)[:, 1:]
    torch.testing.assert_close(found, tokens.reshape(2, 4, 8, 32).permute(0, 3, 1, 2))


def test_checkpointing_changes_no_gradient() -> None:
    vit = tiny_mae(img_size=32).encoder
    features, images = VitFeatures(vit, [1, 3], window=4), torch.randn(1, 3, 32, 32)
    gradients = []
    for vit.grad_checkpointing in (False, True):
        vit.zero_grad()
        sum(found.square().sum() for found in features(images)).backward()
        gradients.append(vit.blocks[0].attn.qkv.weight.grad.clone())
    torch.testing.assert_close(*gradients)


def test_the_pyramid_has_the_strides_it_should() -> None:
    pyramid = SimplePyramid(tiny_mae(img_size=32).encoder, 16, (4, 2, 1, 0.5), 0)
    maps = pyramid(torch.randn(1, 3, 32, 32))
    assert [tuple(found.shape[1:]) for found in maps.values()] == [
        *((16, 32, 32), (16, 16, 16), (16, 8, 8), (16, 4, 4), (16, 2, 2))
    ]


@pytest.mark.parametrize("kind", ["upernet", "linear"])
def test_a_segmenter_has_no_batch_statistics(kind: str) -> None:
    """An image's logits do not depend on the others of the batch, in training either."""
    torch.manual_seed(0)
    model = build_network(segmenter(kind)).train()
    images = torch.rand(3, 3, 32, 32)
    together, alone = model(images), model(images[:1])
    assert together.shape == (3, 3, 32, 32)
    torch.testing.assert_close(together[:1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("kind", ["upernet", "linear"])
def test_a_segmenter_takes_the_blocks_there_are(kind: str, depth: int) -> None:
    config = segmenter(kind)
    model = build_network({**config, "model_args": {**config["model_args"], "depth": depth}})
    assert model(torch.rand(1, 3, 32, 32)).shape == (1, 3, 32, 32)
    assert model.features.wanted[-1] == depth - 1


def test_what_an_image_samples_does_not_depend_on_the_batch() -> None:
    """Nor on a match that comes or goes elsewhere; another epoch samples others."""
    sampler = KeyedSampler(BalancedPositiveNegativeSampler(16, 0.25), 0, Stream.ANCHOR)
    matches = [torch.arange(100) % 5 - 1, torch.arange(60) % 7]
    rows, epochs = torch.tensor([3, 8]), torch.tensor([0, 0])
    sampler.start(rows, epochs)
    positive, negative = sampler(matches)
    assert [int(found.sum()) for found in positive] == [4, 4]
    assert [int(found.sum()) for found in negative] == [12, 9]  # there are no more
    assert (sampler.seen, sampler.positive) == (29, 8)
    assert (matches[0][positive[0].bool()] >= 1).all() and not matches[0][negative[0].bool()].any()
    sampler.start(rows[1:], epochs[1:])
    (alone,), _ = sampler(matches[1:])
    assert torch.equal(alone, positive[1])
    gone = int(torch.where(positive[1])[0][0])
    matches[1][gone] = -1
    sampler.start(rows[1:], epochs[1:])
    (changed,), _ = sampler(matches[1:])
    assert int(((changed + positive[1]) == 2).sum()) == 3  # the others stay
    sampler.start(rows[1:], epochs[1:] + 1)
    assert not torch.equal(sampler(matches[1:])[0][0], changed)


def test_a_detector_learns_boxes_and_masks_and_sees_any_size() -> None:
    torch.manual_seed(0)
    model = build_network(DETECTOR)
    mask = torch.zeros(1, 32, 32, dtype=torch.uint8)
    mask[:, 4:20, 8:24] = 1
    target = {"boxes": torch.tensor([[8.0, 4, 24, 20]]), "labels": torch.tensor([2]), "masks": mask}
    empty = {k: v[:0] for k, v in target.items()}
    losses = model([torch.rand(3, 32, 32)] * 2, [target, empty])
    sum(losses.values()).backward()
    assert set(losses) >= {"loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness"}
    assert vit_of(model).blocks[0].attn.qkv.weight.grad.abs().sum() > 0
    (found,) = model.eval()([torch.rand(3, 21, 50)])
    assert found["masks"].shape[2:] == (21, 50)
    assert (found["boxes"] <= torch.tensor([50.0, 21, 50, 21])).all()


# --- a backbone's weights in them -----------------------------------------------------------------


def test_weights_are_the_backbones_and_positions_are_resampled() -> None:
    backbone = Backbone(tiny_spec().encoder, tiny_mae().encoder)
    same = by_task(settings("segment", image_size=16))
    config = network_config(backbone, source("segment"), same)
    vit = vit_of(new_network(config, backbone, 0.0))
    images = torch.randn(1, 3, 16, 16)
    torch.testing.assert_close(vit.forward_features(images), encode_tokens(backbone.vit, images))
    larger = network_config(
        backbone, source("segment"), by_task(settings("segment", image_size=64))
    )
    grown = vit_of(new_network(larger, backbone, 0.0))
    assert grown.pos_embed.shape == (1, 1 + 16 * 16, 32)
    torch.testing.assert_close(grown.pos_embed[:, 0], backbone.vit.pos_embed[:, 0])


def test_patches_of_14_pixels_become_16_to_detect(capsys) -> None:
    mae = tiny_mae(patch_size=14, img_size=28)
    backbone = Backbone(tiny_spec(patch_size=14, img_size=28).encoder, mae.encoder)
    config = network_config(backbone, source("detect"), by_task(settings("detect", image_size=64)))
    assert vit_of(new_network(config, backbone, 0.0)).patch_embed.patch_size == (16, 16)
    assert "resampled from 14 to 16" in capsys.readouterr().err
    kept = network_config(backbone, source("segment"), by_task(settings("segment", image_size=56)))
    assert "patch_size" in kept["model_args"] and kept["model_args"]["patch_size"] == 14


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"image_size": 60}, "give 56 or 64"),
        ({"image_size": 64, "window": 3}, "give one of 2, 4, 8"),
        ({"image_size": 64, "head_args": {"dimm": 8}}, "head_args: "),
        ({"image_size": 64, "head_args": {"scales": [1, 2]}}, "from fine to coarse"),
        ({"image_size": 64, "window": 4}, "attention stays global in all of them"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(values: dict, words: str) -> None:
    backbone = Backbone(tiny_spec().encoder, tiny_mae().encoder)
    with pytest.raises(MoceError, match=words):
        network_config(backbone, source("detect"), by_task(settings("detect", **values)))


def test_published_values_fill_what_is_not_given() -> None:
    found = by_task(settings("detect", base_lr=0.5))
    assert (found.base_lr, found.image_size, found.batch_size, found.jitter) == (
        *(0.5, 1024, 64, (0.1, 2.0)),
    )


# --- views ---------------------------------------------------------------------------------------


def scene() -> tuple[np.ndarray, Instances, np.ndarray]:
    """A bright object on black, [3, 50, 80], and a crowd over the whole image."""
    mask = np.zeros((50, 80), np.uint8)
    mask[10:30, 20:60] = 1
    boxes = np.array([[20, 10, 60, 30], [0, 0, 80, 50]], np.float32)
    masks = rle.encode(np.stack([mask, np.ones_like(mask)]))
    instances = Instances(boxes, np.array([3, 1]), tuple(masks), np.array([False, True]))
    return np.repeat(mask[None] * 200, 3, axis=0), instances, np.where(mask, 4, 0).astype(np.int64)


def views(**changes: object) -> Views:
    given = {"size": 64, "jitter": (0.1, 2.0), "hflip": True, "fill": (0.0,) * 3, "seed": 0}
    return Views(**{**given, "by_longer": True, "with_masks": True, **changes})


def test_boxes_and_masks_move_with_their_image() -> None:
    pixels, instances, _ = scene()
    seen, flipped = 0, set()
    for epoch in range(40):
        image, target = views()(pixels, instances, 3, epoch)
        assert image.shape == (3, 64, 64) and image.dtype == torch.uint8
        assert set(target["labels"].tolist()) <= {4}  # the class, counted from 1; no crowd
        for box, mask in zip(target["boxes"], target["masks"].bool(), strict=True):
            rows, columns = mask.nonzero(as_tuple=True)
            edges = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert (box - torch.stack(edges)).abs().max() < 1.6
            if mask.sum() > 100:
                seen += 1
                assert image[0][mask].float().mean() > 170 > 20 > image[0][~mask].float().mean()
                flipped.add(bool((box[0] + box[2]) / 2 > 32))
    assert seen > 10 and flipped == {True, False}


def test_semantic_masks_move_with_their_image_and_ignore_the_padding() -> None:
    pixels, _, classes = scene()
    for epoch in range(10):
        image, target = views(by_longer=False, jitter=(0.5, 2.0))(pixels, classes, 3, epoch)
        assert set(target.unique().tolist()) <= {0, 4, IGNORE}
        inside, outside = target == 4, target == 0
        assert not inside.any() or image[0][inside].float().mean() > 170
        assert not outside.any() or image[0][outside].float().mean() < 40


def test_a_view_depends_on_its_image_and_epoch_only() -> None:
    pixels, instances, _ = scene()
    first, again, other = (views()(pixels, instances, 3, epoch)[0] for epoch in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_without_jitter_and_flip_a_view_is_the_whole_image() -> None:
    pixels, instances, _ = scene()
    plain = views(size=80, jitter=(1.0, 1.0), hflip=False)
    image, target = plain(pixels, instances, 0, 0)
    assert (image[:, :50].numpy() == pixels).all() and not image[:, 50:].any()
    assert target["boxes"].tolist() == [[20, 10, 60, 30]]
