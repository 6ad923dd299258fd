"""The masked autoencoder against Transformers' ViTMAEForPreTraining, weights and noise copied in."""

from __future__ import annotations

import re

import pytest
import torch
from builders import batch, tiny_mae
from torch.testing import assert_close
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from moce.models.encoder import patchify, take
from moce.models.mae import MAE, random_mask

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


def reference_of(mae: MAE) -> ViTMAEForPreTraining:
    """The same model in Transformers, with the weights of `mae`."""
    config = ViTMAEConfig(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=128,
        image_size=16,
        patch_size=4,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=64,
        mask_ratio=mae.mask_ratio,
        norm_pix_loss=mae.norm_pix,
        layer_norm_eps=1e-6,
    )
    model = ViTMAEForPreTraining(config).eval()
    wanted = model.state_dict()
    given = {reference_name(name): value for name, value in split_qkv(mae)}
    assert given.keys() == wanted.keys()
    model.load_state_dict(given)  # positions too: those of a model made from a config are zero
    return model


def split_qkv(mae: MAE):
    """Names and values of all weights, attention's joint projection split in three."""
    for name, value in mae.state_dict().items():
        if ".attn.qkv." in name:
            for part, third in zip("qkv", value.chunk(3), strict=True):
                yield name.replace("qkv", part), third
        else:
            yield name, value


RENAMED = [
    (r"^encoder\.blocks\.", "vit.layers."),
    (r"^encoder\.norm\.", "vit.layernorm."),
    (r"^encoder\.cls_token", "vit.embeddings.cls_token"),
    (r"^encoder\.pos_embed", "vit.embeddings.position_embeddings"),
    (r"^encoder\.patch_embed\.proj", "vit.embeddings.patch_embeddings.projection"),
    (r"^decoder\.blocks\.", "decoder.decoder_layers."),
    (r"^decoder\.embed\.", "decoder.decoder_embed."),
    (r"^decoder\.pos_embed", "decoder.decoder_pos_embed"),
    (r"^decoder\.norm\.", "decoder.decoder_norm."),
    (r"^decoder\.head\.", "decoder.decoder_pred."),
    (r"\.attn\.([qkv])\.", r".attention.\1_proj."),
    (r"\.attn\.proj\.", ".attention.o_proj."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
]


def reference_name(name: str) -> str:
    """Transformers 5's name of a weight."""
    for pattern, replacement in RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


@pytest.fixture(params=[True, False], ids=["norm_pix", "plain_pixels"])
def pair(request) -> tuple[MAE, ViTMAEForPreTraining]:
    mae = tiny_mae(norm_pix=request.param)
    return mae, reference_of(mae)


@torch.no_grad()
def test_loss_prediction_and_mask_agree(pair) -> None:
    mae, reference = pair
    images, noise, _ = batch(6)
    ours, theirs = mae(images, noise), reference(images, noise=noise)
    assert_close(ours.loss, theirs.loss, **TOLERANCE)
    assert_close(ours.prediction, take(theirs.logits, ours.removed), **TOLERANCE)
    assert torch.equal(ours.removed.sort(dim=1)[0], theirs.mask.nonzero()[:, 1].view(6, 12))


def test_gradients_agree(pair) -> None:
    mae, reference = pair
    images, noise, _ = batch(6)
    mae(images, noise).loss.backward()
    reference(images, noise=noise).loss.backward()
    theirs = reference.vit.embeddings.patch_embeddings.projection.weight.grad
    assert_close(mae.encoder.patch_embed.proj.weight.grad, theirs, **TOLERANCE)
    theirs = reference.decoder.decoder_pred.weight.grad
    assert_close(mae.decoder.head.weight.grad, theirs, **TOLERANCE)


def test_patchify_and_masking_agree(pair) -> None:
    _, reference = pair
    images, noise, _ = batch(6)
    assert torch.equal(patchify(images, (4, 4)), reference.patchify(images))
    tokens = torch.arange(16.0).repeat(6, 1)[:, :, None]
    kept, mask, restore = reference.vit.embeddings.random_masking(tokens, noise)
    keep, removed = random_mask(noise, 0.75)
    assert torch.equal(keep, kept[:, :, 0].long())
    assert torch.equal(torch.cat([keep, removed], dim=1).argsort(dim=1), restore)
    assert torch.equal(removed.sort(dim=1)[0], mask.nonzero()[:, 1].view(6, 12))
