"""The same masked autoencoder by moce, Transformers and lightly: models and whole training steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.measure import Work
from moce.models.encoder import EncoderSpec, choose_attention
from moce.models.mae import MAE, MAESpec
from moce.training.objectives import chunk_size
from moce.training.optimizer import adamw, parameter_groups, set_learning_rate
from moce.training.thread_parallel import ThreadParallel

LossOfDraw = Callable[[nn.Module, Tensor, slice], Tensor]
RATE, DECAY, BETAS = 1e-4, 0.05, (0.9, 0.95)


@dataclass(frozen=True)
class Size:
    """A ViT with its decoder; image and patch in pixels."""

    name: str
    width: int
    depth: int
    heads: int
    image: int = 224
    patch: int = 16
    decoder: tuple[int, int, int] = (512, 8, 16)  # width, depth, heads

    @property
    def patches(self) -> int:
        return (self.image // self.patch) ** 2

    def spec(self) -> MAESpec:
        arguments = {
            "img_size": self.image,
            "patch_size": self.patch,
            "embed_dim": self.width,
            "depth": self.depth,
            "num_heads": self.heads,
        }
        return MAESpec(EncoderSpec("vit_tiny_patch16_224", arguments), *self.decoder)


TINY32 = Size("tiny32", 128, 6, 4, image=32, patch=4, decoder=(64, 1, 2))
SIZES = {
    size.name: size
    for size in (
        TINY32,
        Size("vit_ti", 192, 12, 3),
        Size("vit_s", 384, 12, 6),
        Size("vit_b", 768, 12, 12),
        Size("test", 32, 2, 2, image=16, patch=4, decoder=(16, 1, 2)),
    )
}


@dataclass(frozen=True)
class Case:
    """One comparison. precision: float32, or bf16 by autocast."""

    size: str
    batch: int
    threads: int = 1
    precision: str = "float32"
    device: str = "cpu"

    def images(self) -> Tensor:
        side = SIZES[self.size].image
        return torch.randn(self.batch, 3, side, side, device=self.device)

    def noise(self) -> Tensor:
        return torch.rand(self.batch, SIZES[self.size].patches, device=self.device)


def training_step(case: Case, loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer) -> Work:
    """Forward, backward and optimizer, as in the training loop."""
    autocast = torch.autocast(case.device, torch.bfloat16, enabled=case.precision == "bf16")

    def step() -> None:
        with autocast:
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


# --- moce ---------------------------------------------------------------------------------------------


def our_mae(case: Case) -> MAE:
    """As `moce pretrain` trains it."""
    mae = SIZES[case.size].spec().build().to(case.device).train()
    choose_attention(mae, torch.device(case.device), case.precision)
    return mae


def our_step(case: Case, model: nn.Module, size: int | None, loss: LossOfDraw) -> Work:
    """As the training loop takes it: on a CPU in parts of about `size` images, if they may be apart.

    loss: of a model, the noise of the batch and a part of it.
    """
    optimizer = adamw(parameter_groups(model.parameters(), DECAY), BETAS[1])
    set_learning_rate(optimizer, RATE)
    if case.device != "cpu" or size is None:
        return training_step(case, lambda: loss(model, case.noise(), slice(None)), optimizer)
    autocast = torch.autocast(case.device, torch.bfloat16, enabled=case.precision == "bf16")
    thread_parallel = ThreadParallel(model)

    def step() -> None:
        noise = case.noise()

        def of_part(replica: nn.Module, part: slice) -> dict[str, Tensor]:
            with autocast:
                return {"loss": loss(replica, noise, part)}

        thread_parallel.backward(of_part, case.batch, size)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def moce_step(case: Case) -> Work:
    mae, images = our_mae(case), case.images()

    def loss(model: nn.Module, noise: Tensor, part: slice) -> Tensor:
        return model(images[part], noise[part]).loss

    return our_step(case, mae, chunk_size(mae), loss)


# --- Transformers -------------------------------------------------------------------------------------


def transformers_mae(case: Case, attention: str | None) -> nn.Module:
    """attention: sdpa, eager, or None: as it comes."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    size = SIZES[case.size]
    width, depth, heads = size.decoder
    config = ViTMAEConfig(
        hidden_size=size.width,
        num_hidden_layers=size.depth,
        num_attention_heads=size.heads,
        intermediate_size=4 * size.width,
        image_size=size.image,
        patch_size=size.patch,
        decoder_hidden_size=width,
        decoder_num_hidden_layers=depth,
        decoder_num_attention_heads=heads,
        decoder_intermediate_size=4 * width,
        norm_pix_loss=True,
        layer_norm_eps=1e-6,
    )
    if attention is not None:
        config._attn_implementation = attention
    return ViTMAEForPreTraining(config).to(case.device).train()


def transformers_step(case: Case, attention: str | None, fused: bool, compiled: bool) -> Work:
    model, images = transformers_mae(case, attention), case.images()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=RATE, betas=BETAS, weight_decay=DECAY, fused=fused or None
    )
    call = torch.compile(model) if compiled else model
    return training_step(case, lambda: call(images, noise=case.noise()).loss, optimizer)


# --- lightly ------------------------------------------------------------------------------------------


class LightlyMAE(nn.Module):
    """lightly's masked backbone and decoder, put together as its documentation says."""

    def __init__(self, size: Size) -> None:
        from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM

        super().__init__()
        vit = size.spec().encoder.build()
        self.backbone = MaskedVisionTransformerTIMM(vit)
        self.length, self.patch = vit.patch_embed.num_patches + 1, size.patch
        width, depth, heads = size.decoder
        self.decoder = MAEDecoderTIMM(
            num_patches=vit.patch_embed.num_patches,
            patch_size=size.patch,
            embed_dim=size.width,
            decoder_embed_dim=width,
            decoder_depth=depth,
            decoder_num_heads=heads,
        )

    def forward(self, images: Tensor) -> Tensor:
        """Loss of images [b, c, h, w]; the class token is always kept."""
        from lightly.models import utils

        batch = images.shape[0]
        kept, masked = utils.random_token_mask((batch, self.length), 0.75, device=images.device)
        encoded = self.decoder.embed(self.backbone.encode(images, idx_keep=kept))
        tokens = utils.repeat_token(self.decoder.mask_token, (batch, self.length))
        tokens = utils.set_at_index(tokens, kept, encoded.type_as(tokens))
        hidden = utils.get_at_index(self.decoder.decode(tokens), masked)
        target = utils.get_at_index(utils.patchify(images, self.patch), masked - 1)
        target = utils.normalize_mean_var(target)
        return nn.functional.mse_loss(self.decoder.predict(hidden), target)


def lightly_step(case: Case) -> Work:
    model, images = LightlyMAE(SIZES[case.size]).to(case.device).train(), case.images()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=RATE, betas=BETAS, weight_decay=DECAY, fused=True
    )
    return training_step(case, lambda: model(images), optimizer)


# --- all ----------------------------------------------------------------------------------------------

AS_IT_COMES = "Transformers, as it comes"
CONTENDERS: dict[str, Callable[[Case], Work]] = {
    "moce": moce_step,
    AS_IT_COMES: lambda case: transformers_step(case, None, fused=False, compiled=False),
    "Transformers, sdpa, fused AdamW": lambda case: transformers_step(case, "sdpa", True, False),
    "Transformers, eager, fused AdamW": lambda case: transformers_step(case, "eager", True, False),
    "lightly, fused AdamW": lightly_step,
}
ON_CUDA = {
    **CONTENDERS,
    "Transformers, sdpa, fused AdamW, compiled": lambda case: transformers_step(
        case, "sdpa", True, compiled=True
    ),
}
