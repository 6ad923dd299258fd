"""Encoders: timm VisionTransformers. Build them, check that moce supports them, run them."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import timm
import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from moce.errors import MoceError
from moce.models.activation_checkpoint import run_block

RGB, OTHERWISE = 3, 0.5  # default mean and std of images that are not RGB


@dataclass(frozen=True)
class EncoderSpec:
    """How to build an encoder and normalize its images; stored in every run.

    name: timm's; model_args: overrides of timm's arguments; mean, std: one value per channel, of
    pixels in 0..1.
    """

    name: str
    model_args: dict[str, Any] = field(default_factory=dict)
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def build(self, *, pretrained: bool = False, **overrides: Any) -> VisionTransformer:
        """A timm ViT that returns all tokens after its final norm: [b, prefix + patches, width].

        Raises MoceError if timm has no such model or rejects the arguments, or if moce does not
        support what it builds (see `check_plain`).
        """
        arguments = {"num_classes": 0, "global_pool": "", **self.model_args, **overrides}
        check_name(self.name)
        try:
            vit = timm.create_model(self.name, pretrained=pretrained, **arguments)
        except OSError:  # from the hub: the caller reports it
            raise
        except Exception as error:  # timm checks few arguments: anything may come back
            reason = str(error) or type(error).__name__
            raise MoceError(f"timm cannot build {self.name} with {arguments}: {reason}") from None
        return check_plain(vit, self.name)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> EncoderSpec:
        return cls(
            values["name"], values["model_args"], tuple(values["mean"]), tuple(values["std"])
        )


def check_name(name: str) -> None:
    """Raise MoceError, with the nearest one, unless timm has a model and its tag of weights."""
    if not timm.is_model(name):
        near = nearest_model(name)
        hint = f"; did you mean '{near}'?" if near else ""
        raise MoceError(f"timm has no model '{name}'{hint} (timm.list_models() lists all)")
    architecture, _, tag = name.partition(".")
    if tag and name not in (known := timm.list_pretrained(f"{architecture}.*")):
        tags = ", ".join(other.partition(".")[2] for other in known)
        raise MoceError(f"timm has no weights '{tag}' of {architecture}, but: {tags or 'none'}")


def nearest_model(name: str) -> str | None:
    """The plain ViT of timm that a name such as vit_base, vit-b16 or ViT-L/16 means, if any."""
    known = timm.list_models("vit*") + timm.list_models("deit*")
    short = SHORT.match(name.lower())
    if short:
        size = SIZES.get(short["size"], short["size"])
        patches = [short["patch"]] if short["patch"] else USUAL_PATCHES
        plain = [f"vit_{size}_patch{patch}_224" for patch in patches]
        if found := [other for other in plain if other in known]:
            return found[0]
    return next(iter(difflib.get_close_matches(name, known, n=1)), None)


SHORT = re.compile(
    r"vit[-_]?(?P<size>tiny|small|base|large|huge|[tsblh])"
    r"(?:[-_/]?p?(?:atch)?(?P<patch>\d+))?(?![a-z])"
)
SIZES = {"t": "tiny", "s": "small", "b": "base", "l": "large", "h": "huge"}
USUAL_PATCHES = ("16", "14")


# Why models and blocks of other classes are not supported, by a substring of the class name.
UNFIT = [
    (
        "Eva",
        "its rotary positions are made in each block for a whole grid, which masking breaks up",
    ),
    ("Swin", "windows of patches are attended to, which masking breaks up"),
    ("Parallel", "attention and FFN are one computation, so the FFN alone cannot be an expert's"),
    ("ResPost", "norms come after the FFN, which gates could not be folded into"),
]
UNFIT_ANY = "other networks have no tokens to mask, or no FFN per block to make experts of"


def check_plain(vit: nn.Module, name: str) -> VisionTransformer:
    """Return `vit`. Raises MoceError with the reason unless blocks and positions are plain ones."""
    kind = type(vit).__name__
    if type(vit) is not VisionTransformer:
        why = next((why for part, why in UNFIT if part in kind), UNFIT_ANY)
        raise MoceError(f"{name} is a {kind}, and moce needs a timm VisionTransformer: {why}")
    if type(vit.patch_embed) is not PatchEmbed:
        kind = type(vit.patch_embed).__name__
        raise MoceError(f"{name} makes its tokens by a {kind}: masked patches would leak through")
    blocks: list[Any] = list(vit.blocks)
    if any(type(block) is not Block for block in blocks):
        kinds = sorted({type(block).__name__ for block in vit.blocks})
        why = next((why for part, why in UNFIT if part in kinds[0]), "their FFN is not apart")
        raise MoceError(
            f"{name} has blocks of type {', '.join(kinds)}; moce needs plain ViT blocks: {why}"
        )
    if not isinstance(vit.patch_drop, nn.Identity):
        raise MoceError(f"{name}: patch_drop_rate is not supported, masking drops patches itself")
    if not blocks or any(block.attn.num_heads < 1 for block in blocks):
        raise MoceError(f"{name} needs at least one block and one attention head")
    if any(not 0 <= getattr(block.drop_path1, "drop_prob", 0.0) < 1 for block in blocks):
        raise MoceError(f"{name}: drop_path_rate has to be at least 0 and below 1")
    if vit.pos_embed is None:
        raise MoceError(f"{name} has no absolute position embedding, which masking needs")
    if vit.dynamic_img_size:
        raise MoceError(f"{name}: dynamic_img_size is not supported; give the size by img_size")
    height, width = vit.patch_embed.img_size
    patch_height, patch_width = vit.patch_embed.patch_size
    if height % patch_height or width % patch_width:
        raise MoceError(
            f"image size {height}x{width} is no multiple of the patch {patch_height}x{patch_width}"
        )
    return vit


def per_channel(
    name: str, asked: tuple[float, ...] | None, usual: tuple[float, ...], channels: int
) -> tuple[float, ...]:
    """One value per channel: `asked` (one for all, or one each), else `usual`, else OTHERWISE.

    Raises MoceError if `asked` has another number of values.
    """
    if asked is None:
        return tuple(usual) if len(usual) == channels else (OTHERWISE,) * channels
    if len(asked) not in (1, channels):
        raise MoceError(
            f"--{name} has {len(asked)} values for {channels} channels; give one or {channels}"
        )
    return asked * channels if len(asked) == 1 else asked


def choose_attention(module: nn.Module, device: torch.device, precision: str) -> None:
    """Use torch's fused attention, except for bf16 on CPUs, where it is slow for short inputs."""
    if device.type == "cpu" and precision == "bf16":
        use_plain_attention(module)


def use_plain_attention(module: nn.Module) -> None:
    """Compute attention by plain matrix products instead of the fused kernel."""
    layer: Any
    for layer in module.modules():
        if hasattr(layer, "fused_attn"):
            layer.fused_attn = False


def sincos_positions(grid: tuple[int, int], width: int, num_prefix: int = 0) -> Tensor:
    """Fixed 2-D sine-cosine position embedding, [1, prefix + patches, width], float32.

    Layout [sin w, cos w, sin h, cos h]; rows of prefix tokens are zero; frequencies
    10000^(-k / (width / 4)), as in MAE. Raises MoceError if the width is no multiple of 4.
    """
    if width % 4:
        raise MoceError(f"sine-cosine positions need a width that is a multiple of 4, not {width}")
    rows, columns = torch.meshgrid(
        torch.arange(grid[0], dtype=torch.float64),
        torch.arange(grid[1], dtype=torch.float64),
        indexing="ij",
    )
    frequency = torch.exp(-math.log(10000) * torch.arange(width // 4).double() / (width / 4))

    def encode(position: Tensor) -> Tensor:
        angle = position.reshape(-1, 1) * frequency
        return torch.cat([angle.sin(), angle.cos()], dim=1)

    patches = torch.cat([encode(columns), encode(rows)], dim=1)
    return torch.cat([patches.new_zeros(num_prefix, width), patches])[None].float()


def initialize_from_scratch(vit: VisionTransformer) -> None:
    """Initialize an encoder as MAE does, in place; its positions become fixed sine-cosine ones."""
    vit.apply(initialize_linear)
    patch_weight = vit.patch_embed.proj.weight
    nn.init.xavier_uniform_(patch_weight.view(patch_weight.shape[0], -1))
    for token in (vit.cls_token, vit.reg_token):
        if token is not None:
            nn.init.normal_(token, std=0.02)
    num_prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
    positions = sincos_positions(vit.patch_embed.grid_size, vit.embed_dim, num_prefix)
    vit.pos_embed = nn.Parameter(positions)


def initialize_linear(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases for linear layers, as in MAE (section A.1)."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def encode_tokens(
    vit: VisionTransformer,
    images: Tensor,
    keep: Tensor | None = None,
    routings: Mapping[int, Any] | None = None,
) -> Tensor:
    """Tokens after the final norm, [b, prefix + kept patches, width].

    Args:
        images: [b, c, h, w], normalized.
        keep: [b, n] int64, indices of the visible patches. None: all, which equals
            `vit.forward_features`.
        routings: the `Routing` of every MoE block, by the block's number.
    """
    tokens = embed_images(vit, images, keep)
    for number, block in enumerate(vit.blocks):
        routing = () if routings is None or number not in routings else (routings[number],)
        tokens = run_block(block, tokens, *routing, checkpointing=vit.grad_checkpointing)
    return vit.norm(tokens)


def embed_images(vit: VisionTransformer, images: Tensor, keep: Tensor | None = None) -> Tensor:
    """The first block's input, [b, prefix + kept patches, width]; arguments as `encode_tokens`.

    Positions are added before masking, prefix tokens after it (MAE, section 3).
    """
    positions = positions_of(vit)
    grid = positions[:, -vit.patch_embed.num_patches :]
    if keep is None:
        tokens = vit.patch_embed(images) + grid
    else:
        tokens = embed_patches(vit, images, keep) + grid[0][keep]
    prefix: list[Tensor] = [token for token in (vit.cls_token, vit.reg_token) if token is not None]
    if prefix:
        prefix_tokens = torch.cat(prefix, dim=1)
        if not vit.no_embed_class:
            prefix_tokens = prefix_tokens + positions[:, : vit.num_prefix_tokens]
        expanded = prefix_tokens.expand(tokens.shape[0], -1, -1).to(tokens.dtype)
        tokens = torch.cat([expanded, tokens], dim=1)
    return vit.norm_pre(vit.pos_drop(tokens))


def embed_patches(vit: VisionTransformer, images: Tensor, keep: Tensor) -> Tensor:
    """`vit.patch_embed` of the patches `keep` [b, n] only: their tokens, [b, n, width].

    One matrix product over the kept patches; the convolution would compute the hidden ones, too.
    """
    embed = vit.patch_embed
    patches = take(patchify(images, embed.patch_size), keep)
    weight = embed.proj.weight.permute(0, 2, 3, 1).flatten(1)
    return embed.norm(nn.functional.linear(patches, weight, embed.proj.bias))


def take(tokens: Tensor, rows: Tensor) -> Tensor:
    """Rows [b, k] int64 of tokens [b, n, d]: [b, k, d]."""
    return tokens.gather(1, rows[:, :, None].expand(-1, -1, tokens.shape[2]))


def put(tokens: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """A copy of tokens [b, n, d] with `values` [b, k, d] in their rows [b, k] int64."""
    return tokens.scatter(1, rows[:, :, None].expand_as(values), values)


def patchify(images: Tensor, patch: tuple[int, int]) -> Tensor:
    """[b, c, h, w] to [b, n, p*p*c], patches row by row, channels last within a patch."""
    batch, channels, height, width = images.shape
    rows, columns = height // patch[0], width // patch[1]
    split = images.reshape(batch, channels, rows, patch[0], columns, patch[1])
    return split.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, -1)


def positions_of(vit: VisionTransformer) -> Tensor:
    """The position embedding, [1, (prefix +) patches, width]."""
    assert vit.pos_embed is not None  # ensured by check_plain
    return vit.pos_embed


def pool_tokens(vit: VisionTransformer, tokens: Tensor, pooling: str) -> Tensor:
    """One feature per image, [b, width]: the mean of the patch tokens, or the class token.

    tokens: [b, prefix + patches, width] of `vit`; pooling: mean or cls. Of a fine-tuned encoder,
    the mean is normed after pooling. Raises MoceError for cls if the encoder has no class token, or
    one that its training did not use.
    """
    if pooling == "cls":
        if vit.cls_token is None:
            raise MoceError("this encoder has no class token; use pooling 'mean'")
        if not isinstance(vit.fc_norm, nn.Identity):
            raise MoceError(
                "this encoder was fine-tuned on the mean of patches; use pooling 'mean'"
            )
        return tokens[:, 0]
    return vit.fc_norm(tokens[:, vit.num_prefix_tokens :].mean(dim=1))


def input_size(vit: VisionTransformer) -> tuple[int, int]:
    """Height and width in pixels of the images an encoder takes."""
    return tuple(vit.patch_embed.img_size)


def input_channels(vit: VisionTransformer) -> int:
    """Number of channels of the images an encoder takes."""
    return vit.patch_embed.proj.in_channels


def input_shape(vit: VisionTransformer) -> tuple[int, int, int]:
    """Channels, height and width of the images an encoder takes."""
    return (input_channels(vit), *input_size(vit))
