"""Masking, patches, targets and loss of the masked autoencoder, and which encoders it takes."""

from __future__ import annotations

import copy
import math

import pytest
import timm
import torch
from builders import TINY_NAME, batch, tiny_encoder, tiny_mae, tiny_spec
from timm.models.vision_transformer import Block
from torch.testing import assert_close

from moce.data.dataset import ImageDataset
from moce.errors import MoceError
from moce.inference.features import extract_features
from moce.models.decoder import LastBlock
from moce.models.encoder import (
    EncoderSpec,
    check_plain,
    encode_tokens,
    patchify,
    pool_tokens,
    put,
    sincos_positions,
    take,
    use_plain_attention,
)
from moce.models.mae import (
    MAESpec,
    num_kept,
    patch_statistics,
    patch_target,
    random_mask,
    unpatchify,
)

# --- masks and patches ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patches", "ratio", "kept"), [(16, 0.75, 4), (196, 0.75, 49), (10, 0.75, 2), (4, 0.9, 1)]
)
def test_mask_keeps_the_patches_with_the_smallest_noise(
    patches: int, ratio: float, kept: int
) -> None:
    noise = torch.rand(5, patches, generator=torch.Generator().manual_seed(0))
    keep, removed = random_mask(noise, ratio)
    assert keep.shape == (5, kept) and removed.shape == (5, patches - kept)
    for row in range(5):
        smallest = set(noise[row].argsort()[:kept].tolist())
        assert set(keep[row].tolist()) == smallest
        assert set(removed[row].tolist()) == set(range(patches)) - smallest


def test_put_is_the_inverse_of_take() -> None:
    tokens = torch.randn(5, 16, 3)
    rows = torch.rand(5, 16).argsort(dim=1)[:, :7]
    assert torch.equal(put(tokens, rows, take(tokens, rows)), tokens)
    values = torch.randn(5, 7, 3)
    assert torch.equal(take(put(tokens, rows, values), rows), values)


@pytest.mark.parametrize(
    ("patch", "size"), [((4, 4), (16, 16)), ((4, 8), (16, 24)), ((2, 4), (6, 8))]
)
def test_unpatchify_is_the_inverse_of_patchify(patch: tuple, size: tuple) -> None:
    images = torch.randn(3, 3, *size)
    assert torch.equal(unpatchify(patchify(images, patch), patch, size), images)


def test_patches_go_row_by_row_with_channels_last() -> None:
    images = torch.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6).float()
    patches = patchify(images, (2, 3))
    assert patches.shape == (2, 4, 18)
    # Patch 1 of image 0 is the upper right one; its second pixel is at row 0, column 4.
    assert patches[0, 1, 3:6].tolist() == images[0, :, 0, 4].tolist()
    assert patches[0, 2, 0:3].tolist() == images[0, :, 2, 0].tolist()


def test_target_is_normalized_by_the_unbiased_variance() -> None:
    patches = torch.tensor([[[1.0, 2.0, 3.0, 6.0]]])
    deviation = math.sqrt((4 + 1 + 0 + 9) / 3 + 1e-6)
    expected = torch.tensor([[[-2.0, -1.0, 0.0, 3.0]]]) / deviation
    assert_close(patch_target(patches, norm_pix=True), expected)
    assert torch.equal(patch_target(patches, norm_pix=False), patches)


def test_target_of_a_flat_patch_is_zero() -> None:
    assert patch_target(torch.full((1, 2, 12), 0.3), norm_pix=True).abs().max() < 1e-3


@pytest.mark.parametrize("norm_pix", [True, False])
def test_loss_is_the_mean_error_of_the_removed_patches(norm_pix: bool) -> None:
    mae = tiny_mae(norm_pix=norm_pix)
    images, noise, _ = batch(4)
    output = mae(images, noise)
    assert torch.equal(output.removed, random_mask(noise, mae.mask_ratio)[1])
    total = 0.0
    for image in range(4):
        for place, prediction in zip(output.removed[image], output.prediction[image], strict=True):
            row, column = divmod(int(place), 4)
            patch = images[image, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
            target = patch_target(patch.permute(1, 2, 0).reshape(1, 1, -1), norm_pix)[0, 0]
            total += (prediction - target).square().mean().item() / output.removed.numel()
    assert output.loss.item() == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("plain", [False, True])
def test_last_block_is_a_block_for_the_tokens_that_are_wanted(plain: bool) -> None:
    last = LastBlock(32, 2, qkv_bias=True)
    whole = Block(32, 2, qkv_bias=True)
    whole.load_state_dict(last.state_dict())
    if plain:
        use_plain_attention(last)
    tokens = torch.randn(3, 17, 32)
    one, other = tokens.clone().requires_grad_(), tokens.clone().requires_grad_()
    ours, theirs = last(one, 12), whole(other)[:, -12:]
    assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    assert_close(one.grad, other.grad, atol=1e-5, rtol=1e-5)
    for name, parameter in last.named_parameters():
        assert_close(parameter.grad, whole.get_parameter(name).grad, atol=1e-4, rtol=1e-5)


def test_visible_patches_do_not_enter_the_loss_and_hidden_ones_not_the_encoder() -> None:
    mae = tiny_mae(norm_pix=False)
    images, noise, _ = batch(4)
    _, removed = random_mask(noise, mae.mask_ratio)
    patches = patchify(images, (4, 4))
    changed = put(patches, removed, torch.randn_like(take(patches, removed)))
    one, other = mae(images, noise), mae(unpatchify(changed, (4, 4), (16, 16)), noise)
    assert_close(one.prediction, other.prediction, atol=1e-6, rtol=1e-5)
    assert abs(one.loss.item() - other.loss.item()) > 1e-3


def test_a_single_patch_is_refused() -> None:
    with pytest.raises(MoceError, match="none can be hidden"):
        tiny_mae(img_size=(4, 4))


def test_loss_is_float32_under_autocast() -> None:
    mae = tiny_mae()
    images, noise, _ = batch(4)
    with torch.autocast("cpu", torch.bfloat16):
        output = mae(images, noise)
    assert output.loss.dtype == torch.float32
    assert_close(output.loss, mae(images, noise).loss, atol=0.02, rtol=0.02)


# --- encoders -------------------------------------------------------------------------------------

SHAPES = [
    {},
    {"reg_tokens": 3},
    {"class_token": False},
    {"class_token": False, "reg_tokens": 2},
    {"no_embed_class": True, "reg_tokens": 2},
    {"no_embed_class": True},
    {"img_size": (16, 24)},
    {"img_size": (16, 24), "reg_tokens": 1, "no_embed_class": True},
    {"patch_size": (4, 8), "img_size": (16, 24)},
    {"pre_norm": True, "init_values": 0.1, "qk_norm": True},
    {"final_norm": False},
]


@pytest.mark.parametrize("arguments", SHAPES, ids=str)
def test_all_tokens_are_those_of_timm(arguments: dict) -> None:
    vit = tiny_mae(**arguments).encoder
    images, _, _ = batch(3, vit.patch_embed.img_size)
    assert_close(encode_tokens(vit, images), vit.forward_features(images))


@pytest.mark.parametrize("arguments", SHAPES, ids=str)
def test_every_shape_reconstructs(arguments: dict) -> None:
    mae = tiny_mae(**arguments)
    images, _, _ = batch(3, mae.encoder.patch_embed.img_size)
    noise = torch.rand(3, mae.encoder.patch_embed.num_patches)
    output = mae(images, noise)
    count, width = patchify(images, mae.patch_size).shape[1:]
    assert output.prediction.shape == (3, count - num_kept(count, 0.75), width)
    output.loss.backward()
    assert torch.isfinite(output.loss)
    silent = [name for name, p in mae.named_parameters() if p.requires_grad and p.grad is None]
    assert silent == []


def test_kept_patches_keep_their_positions() -> None:
    """Encoding a subset equals encoding all with attention cut off, block depth nought."""
    mae = tiny_mae(depth=1)
    vit = copy.deepcopy(mae.encoder)
    vit.blocks = torch.nn.Sequential()
    images, noise, _ = batch(3)
    keep, _ = random_mask(noise, 0.75)
    everything = encode_tokens(vit, images)
    subset = encode_tokens(vit, images, keep)
    expected = everything[:, 1:].gather(1, keep[:, :, None].expand(-1, -1, 32))
    assert_close(subset[:, 1:], expected)
    assert_close(subset[:, 0], everything[:, 0])


def test_order_of_kept_patches_does_not_matter() -> None:
    vit = tiny_mae().encoder
    images, noise, _ = batch(3)
    keep, _ = random_mask(noise, 0.5)
    one, other = encode_tokens(vit, images, keep), encode_tokens(vit, images, keep.flip(1))
    assert_close(one[:, 1:], other[:, 1:].flip(1), atol=1e-5, rtol=1e-5)


def test_plain_attention_computes_the_same() -> None:
    vit = tiny_mae().encoder
    images, _, _ = batch(3)
    fused = encode_tokens(vit, images)
    use_plain_attention(vit)
    assert not any(getattr(module, "fused_attn", False) for module in vit.modules())
    assert_close(encode_tokens(vit, images), fused, atol=1e-5, rtol=1e-5)


def test_pooling_is_the_mean_of_patches_or_the_class_token() -> None:
    vit = tiny_encoder(reg_tokens=1).build()
    tokens = torch.randn(2, 6, 8)
    assert_close(pool_tokens(vit, tokens, "mean"), tokens[:, 2:].mean(dim=1))
    assert torch.equal(pool_tokens(vit, tokens, "cls"), tokens[:, 0])
    with pytest.raises(MoceError, match="class token"):
        pool_tokens(tiny_encoder(class_token=False).build(), tokens, "cls")


def test_registers_are_no_class_token() -> None:
    """Pooling by the class token is refused where the first token is a register."""
    spec = tiny_encoder(class_token=False, reg_tokens=2)
    pixels = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    images = ImageDataset(pixels, ["0", "1"], [None] * 2, [None] * 2)
    with pytest.raises(MoceError, match="class token"):
        extract_features(spec.build(), spec, images, device=torch.device("cpu"), pooling="cls")


def naive_positions(rows: int, columns: int, width: int) -> torch.Tensor:
    """[sin w, cos w, sin h, cos h], one number after the other."""
    quarter = width // 4
    out = torch.zeros(rows * columns, width)
    for row in range(rows):
        for column in range(columns):
            for k in range(quarter):
                omega = 10000 ** (-k / quarter)
                here = out[row * columns + column]
                here[k] = math.sin(column * omega)
                here[quarter + k] = math.cos(column * omega)
                here[2 * quarter + k] = math.sin(row * omega)
                here[3 * quarter + k] = math.cos(row * omega)
    return out


@pytest.mark.parametrize(("grid", "prefix"), [((4, 4), 1), ((3, 5), 0), ((2, 7), 5)])
def test_sine_cosine_layout(grid: tuple[int, int], prefix: int) -> None:
    positions = sincos_positions(grid, 16, prefix)
    assert positions.shape == (1, prefix + grid[0] * grid[1], 16)
    assert not positions[:, :prefix].any()
    assert_close(positions[0, prefix:], naive_positions(*grid, 16))
    with pytest.raises(MoceError, match="multiple of 4"):
        sincos_positions(grid, 18)


def test_models_from_scratch_have_fixed_sine_cosine_positions() -> None:
    for arguments in ({}, {"no_embed_class": True, "reg_tokens": 2}, {"reg_tokens": 2}):
        vit = tiny_spec(**arguments).build().encoder
        prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
        assert not vit.pos_embed.requires_grad
        assert_close(vit.pos_embed.data, sincos_positions((4, 4), 32, prefix))


def test_initialization_is_that_of_mae() -> None:
    vit = tiny_spec(embed_dim=192).build().encoder
    for weight, fans in (
        (vit.blocks[0].mlp.fc1.weight, (192, 768)),
        (vit.patch_embed.proj.weight, (48, 192)),
    ):
        bound = math.sqrt(6 / sum(fans))
        assert 0.98 * bound < weight.abs().max() <= bound
    assert not vit.blocks[0].mlp.fc1.bias.any()
    assert vit.cls_token.std().item() == pytest.approx(0.02, rel=0.25)


def test_spec_survives_a_dictionary() -> None:
    spec = tiny_spec(img_size=(16, 24))
    assert MAESpec.from_dict(spec.to_dict()) == spec


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments", "reason"),
    [
        ("swin_tiny_patch4_window7_224", {}, "VisionTransformer"),
        ("resnet18", {}, "VisionTransformer|cannot build"),
        ("eva02_tiny_patch14_224", {}, "VisionTransformer"),
        ("vit_base_patch16_rope_reg1_gap_256", {}, "VisionTransformer"),
        (TINY_NAME, {"dynamic_img_size": True}, "dynamic_img_size"),
        (TINY_NAME, {"pos_embed": "none"}, "position"),
        (TINY_NAME, {"img_size": 30, "patch_size": 4}, "multiple|30"),
        (TINY_NAME, {"img_size": 30, "patch_size": 4, "dynamic_img_pad": True}, "multiple|30"),
        (TINY_NAME, {"embed_dim": 30, "num_heads": 4}, "cannot build"),
        (TINY_NAME, {"color": "red"}, "color"),
    ],
)
def test_unsuitable_encoders_are_refused_with_the_reason(
    name: str, arguments: dict, reason: str
) -> None:
    with pytest.raises(MoceError, match=reason):
        EncoderSpec(name, arguments).build()


@pytest.mark.parametrize("block", ["ParallelScalingBlock", "ParallelThingsBlock"])
def test_parallel_blocks_are_refused(block: str) -> None:
    block_fn = getattr(timm.models.vision_transformer, block)
    vit = timm.create_model(TINY_NAME, patch_size=4, img_size=16, depth=1, block_fn=block_fn)
    with pytest.raises(MoceError, match=block):
        check_plain(vit, TINY_NAME)


def test_unknown_model_suggests_a_name() -> None:
    with pytest.raises(MoceError, match="vit_base_patch16_224"):
        EncoderSpec("vit_base_patch16_24").build()


@pytest.mark.parametrize("shape", [(3, 16, 48), (2, 9, 12), (1, 4, 7)])
@pytest.mark.parametrize("offset", [0.0, 5.0])
def test_patch_statistics_are_those_of_torch_var(shape: tuple[int, ...], offset: float) -> None:
    patches = torch.randn(shape, generator=torch.Generator().manual_seed(0)) + offset
    patches[0, 0] = offset  # one without any contrast
    mean, deviation = patch_statistics(patches)
    exact = patches.double()
    assert torch.allclose(mean, exact.mean(-1, keepdim=True).float(), atol=1e-6)
    expected = (exact.var(-1, keepdim=True) + 1e-6).sqrt().float()
    assert torch.allclose(deviation, expected, rtol=0, atol=1e-6)
