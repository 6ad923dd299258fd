"""Every plain ViT that timm can build can become a mixture, and go out dense again."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from builders import BLOCKS, CLUSTERS, TINY_ARGS, TINY_NAME, shake, tiny_moce
from torch import nn
from torch.testing import assert_close

from moce.errors import MoceError
from moce.models.encoder import EncoderSpec, check_plain, encode_tokens
from moce.models.mae import MAE, MAESpec

SAME = {"atol": 1e-5, "rtol": 1e-5}
SWIGLU = "vit_giant_patch14_reg4_dinov2"  # SwiGLUPacked, LayerScale, registers
SMALL = {**TINY_ARGS, "init_values": 0.1}
KINDS = {
    "swiglu, layerscale, registers": (SWIGLU, SMALL),
    "swiglu, layerscale, registers, no class token": (SWIGLU, {**SMALL, "class_token": False}),
    "no class token": (TINY_NAME, {**TINY_ARGS, "class_token": False}),
    "oblong": (TINY_NAME, {**TINY_ARGS, "img_size": [8, 24], "patch_size": [2, 4]}),
    "no qkv bias": (TINY_NAME, {**TINY_ARGS, "qkv_bias": False}),
    "normed queries": (TINY_NAME, {**TINY_ARGS, "qk_norm": True, "scale_mlp_norm": True}),
    "split swiglu, rms norms": ("aimv2_large_patch14_224", TINY_ARGS),
    "pre-norm": ("vit_base_patch16_clip_224", TINY_ARGS),
}


def mae_of(kind: str, **changes: object) -> MAE:
    name, arguments = KINDS[kind]
    torch.manual_seed(0)
    mae = MAESpec(EncoderSpec(name, {**arguments, **changes}), 16, 1, 2).build()
    shake(mae, 0.05)
    return mae.eval()


def inputs(mae: MAE, count: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    embed = mae.encoder.patch_embed
    torch.manual_seed(1)
    return torch.randn(count, 3, *embed.img_size), torch.rand(count, embed.num_patches)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_tokens_are_timms_own(kind: str) -> None:
    mae = mae_of(kind)
    images, _ = inputs(mae)
    assert_close(encode_tokens(mae.encoder, images), mae.encoder.forward_features(images), **SAME)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_experts", [1, 3])
@torch.no_grad()
def test_a_fresh_mixture_computes_what_the_dense_model_does(kind: str, num_experts: int) -> None:
    mae = mae_of(kind)
    images, noise = inputs(mae)
    mixture = tiny_moce(copy.deepcopy(mae), num_experts).eval()
    output = mixture(images, noise, torch.arange(len(images)) % CLUSTERS)
    expected = mae(images, noise)
    assert_close(output.prediction, expected.prediction, **SAME)
    assert_close(output.reconstruction, expected.loss, **SAME)


@pytest.mark.parametrize("gate_scale", ["straight_through", "prob"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_route_made_dense_computes_what_the_mixture_does(kind: str, gate_scale: str) -> None:
    mixture = tiny_moce(mae_of(kind), gate_scale=gate_scale, different=True).eval()
    images, _ = inputs(mixture.mae)
    for cluster in (0, 5):
        experts, gains = mixture.routes()[cluster], mixture.gains()[cluster]
        shares = nn.functional.one_hot(experts, mixture.num_experts).double()
        dense = mixture.dense_encoder(shares, gains[:, None].expand(-1, mixture.num_experts))
        routed = mixture.features(images, torch.full((len(images),), cluster))
        assert_close(encode_tokens(dense, images), routed, **SAME)
        assert len(BLOCKS) == len(experts)


def test_drop_path_drops_in_training_only() -> None:
    mae = mae_of("no class token", drop_path_rate=0.5)
    images, noise = inputs(mae)
    assert_close(mae(images, noise).prediction, mae(images, noise).prediction)
    mae.train()
    assert not torch.equal(mae(images, noise).prediction, mae(images, noise).prediction)


@pytest.mark.parametrize(
    ("name", "arguments", "reason"),
    [
        ("eva02_tiny_patch14_224", {}, "Eva.*rotary"),
        ("swin_tiny_patch4_window7_224", {}, "Swin.*windows"),
        ("convnext_atto", {}, "ConvNeXt.*no tokens"),
        ("vit_base_patch16_plus_clip_240", {"block_fn": "parallel"}, "Parallel.*one computation"),
        ("vit_tiny_r_s16_p8_224", {}, "HybridEmbed.*leak"),
        (TINY_NAME, {"patch_drop_rate": 0.5}, "patch_drop_rate"),
        (TINY_NAME, {"pos_embed": "none"}, "no absolute position"),
    ],
)
def test_what_cannot_work_is_refused_by_name(name: str, arguments: dict, reason: str) -> None:
    if arguments.get("block_fn"):
        arguments = {"block_fn": timm.models.vision_transformer.ParallelScalingBlock, "depth": 1}
    with torch.device("meta"):
        model = timm.create_model(name, **arguments)
    with pytest.raises(MoceError, match=reason):
        check_plain(model, name)
