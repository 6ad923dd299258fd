"""Weights for other patches, image sizes and shapes are resampled as in timm, with a note."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from builders import tiny_encoder, tiny_mae
from test_weights_in import facebook_tensors, read, save_pth
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from torch.testing import assert_close

from moce.errors import MoceError
from moce.weights.build import ModelOverrides

NOT_SQUARE = {"patch_size": [4, 2], "img_size": [16, 8]}


def overrides(decoder_heads: int | None = 2, **arguments: object) -> ModelOverrides:
    return ModelOverrides(
        model_args={"num_heads": 2, **arguments}, decoder_heads=decoder_heads, decoder=(16, 1, 2)
    )


@pytest.mark.parametrize("patch", [8, 2, [2, 8]])
@pytest.mark.parametrize("decoder", [True, False])
def test_another_patch_size_resamples_patches_and_positions(
    patch: object, decoder: bool, tmp_path: Path
) -> None:
    """The images keep their size, so the grid of patches changes with the patch."""
    mae = tiny_mae()
    path = save_pth(tmp_path / "mae.pth", facebook_tensors(mae, decoder=decoder))
    found, notes = read(path, overrides(patch_size=patch))
    height, width = (patch, patch) if isinstance(patch, int) else patch
    vit = found.encoder
    assert vit.patch_embed.patch_size == (height, width)
    assert tuple(vit.patch_embed.img_size) == (16, 16)
    expected = resample_patch_embed(mae.encoder.patch_embed.proj.weight.data, [height, width])
    assert_close(vit.patch_embed.proj.weight, expected)
    grid = [16 // height, 16 // width]
    positions = resample_abs_pos_embed(mae.encoder.pos_embed, grid, [4, 4], 1)
    assert_close(vit.pos_embed, positions)
    assert f"patch embedding resampled from 4x4 to {height}x{width} pixels" in notes
    assert any("last layer predicts patches of 4x4" in note for note in notes) == decoder
    if decoder:
        assert torch.equal(
            found.decoder.blocks[0].mlp.fc1.weight, mae.decoder.blocks[0].mlp.fc1.weight
        )
        assert found.decoder.head.weight.shape[0] == 3 * height * width
    assert found(torch.randn(2, 3, 16, 16), torch.rand(2, grid[0] * grid[1])).loss.isfinite()


def test_patches_twice_as_large_give_the_same_tokens(tmp_path: Path) -> None:
    """On images of one color, where resampling loses nothing."""
    mae = tiny_mae()
    path = save_pth(tmp_path / "mae.pth", facebook_tensors(mae, decoder=False))
    found, _ = read(path, overrides(patch_size=8, img_size=32))
    colors = torch.randn(4, 3, 1, 1)
    with torch.no_grad():
        ours = found.encoder.patch_embed(colors.expand(-1, -1, 32, 32))
        theirs = mae.encoder.patch_embed(colors.expand(-1, -1, 16, 16))
    assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [[16, 24], [8, 16]])
def test_other_shapes_of_images(size: list[int], tmp_path: Path) -> None:
    mae = tiny_mae()
    path = save_pth(tmp_path / "mae.pth", facebook_tensors(mae))
    found, notes = read(path, overrides(img_size=size))
    expected = resample_abs_pos_embed(
        mae.encoder.pos_embed, [size[0] // 4, size[1] // 4], [4, 4], 1
    )
    assert_close(found.encoder.pos_embed, expected)
    assert sum("resampled" in note for note in notes) == 2


def test_weights_of_oblong_images_need_img_size(tmp_path: Path) -> None:
    """Eight patches may be 4x2, 2x4 or 8x1: shapes do not show it, and a wrong guess would be silent."""
    mae = tiny_mae(img_size=[16, 8])
    path = save_pth(tmp_path / "mae.pth", facebook_tensors(mae))
    with pytest.raises(MoceError, match="img_size"):
        read(path, overrides())
    found, _ = read(path, overrides(img_size=[16, 8]))
    assert torch.equal(found.encoder.pos_embed, mae.encoder.pos_embed)


def test_oblong_patches_of_oblong_images(tmp_path: Path) -> None:
    assert tiny_encoder(**NOT_SQUARE).build().patch_embed.grid_size == (4, 4)
    mae = tiny_mae(**NOT_SQUARE)
    path = save_pth(tmp_path / "mae.pth", facebook_tensors(mae))
    found, _ = read(path, overrides())
    assert found.encoder.patch_embed.img_size == (16, 8)
    found, notes = read(path, overrides(patch_size=[2, 2]))
    assert found.encoder.patch_embed.grid_size == (8, 4)
    assert "patch embedding resampled from 4x2 to 2x2 pixels" in notes
