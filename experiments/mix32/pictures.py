"""Pictures of one seed of Mix-32: what each expert sees, and token routing beside image routing.

    python -m experiments.mix32.pictures --out runs/mix32 --seed 0

Reads the runs that `experiments.mix32.run` left; writes docs/figures/mix32_experts.png and
mix32_routing.png.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from torch import Tensor

import moce
from moce.data.augment import normalize
from moce.data.dataset import ImageDataset
from moce.data.load import load_images
from moce.models.encoder import encode_tokens, input_size
from moce.models.token_moe import TokenExpertFFN
from moce.reporting.style import INK, expert_color
from moce.runs.assignments import read_assignments
from moce.weights.from_runs import Backbone, load_backbone

FIGURES = Path(__file__).parents[2] / "docs" / "figures"
PER_EXPERT, EXAMPLES = 16, 10


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/mix32"))
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    base = given.out / "main" / str(given.seed)
    bank = moce.load(base / "moce")
    images = load_images(str(given.out / "data" / "pools" / "all.parquet"), (32, 32))
    cluster_of = read_assignments(base / "clusters").to_dict()
    clusters = torch.tensor([cluster_of[name] for name in images.ids])
    expert = bank.model.routes()[clusters, -1]
    save(draw_experts(images, expert, bank.model.num_experts), "mix32_experts.png")
    tokens = load_backbone(str(base / "token_moe"))
    picked = examples(images)
    figure = draw_routing(images.subset(picked), expert[picked], tokens, bank.model.num_experts)
    save(figure, "mix32_routing.png")


def save(figure: Figure, name: str) -> None:
    figure.savefig(FIGURES / name, dpi=110, facecolor="white", bbox_inches="tight", pad_inches=0.1)
    print(FIGURES / name)


def draw_experts(images: ImageDataset, expert: Tensor, num_experts: int) -> Figure:
    """A row of images per expert, drawn at random from those that its clusters hold."""
    figure = Figure(figsize=(9.4, 0.72 * num_experts))
    for number in range(num_experts):
        rows = (expert == number).nonzero()[:, 0]
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
        axes = figure.add_subplot(num_experts, 1, number + 1)
        strip = images.take(rows[order[:PER_EXPERT]]).permute(2, 0, 3, 1).reshape(32, -1, 3)
        title = f"expert {number}, {len(rows):,} images"
        show(axes, strip.numpy(), title, expert_color(number, num_experts))
    return figure


def show(axes: Axes, picture: np.ndarray, title: str, color: str = INK) -> None:
    axes.imshow(picture, interpolation="nearest")
    axes.set_axis_off()
    axes.set_title(title, fontsize=8, loc="left", pad=2, color=color)


def examples(images: ImageDataset) -> list[int]:
    """Rows of images of every source in turn."""
    by_source: dict[str, list[int]] = {}
    for row, name in enumerate(images.ids):
        by_source.setdefault(name.split("/")[0], []).append(row)
    turns = [rows[turn] for turn in range(EXAMPLES) for rows in by_source.values()]
    return sorted(turns[:EXAMPLES], key=lambda row: images.ids[row])


def draw_routing(
    images: ImageDataset, image_expert: Tensor, tokens: Backbone, num_experts: int
) -> Figure:
    """Images, MoCE's expert of each, and TokenMoE's expert of every patch in its last MoE block."""
    patch_expert = token_experts(images, tokens)
    figure = Figure(figsize=(9.4, 3.0))
    pixels = images.take(slice(None))
    for column in range(len(images)):
        panels = {
            "image": pixels[column].permute(1, 2, 0).numpy(),
            "MoCE": colored(image_expert[column].expand(1, 1), num_experts),
            "token MoE": colored(patch_expert[column], num_experts),
        }
        for row, (title, picture) in enumerate(panels.items()):
            axes = figure.add_subplot(3, len(images), row * len(images) + column + 1)
            show(axes, picture, title if column == 0 else "")
    return figure


def colored(expert: Tensor, num_experts: int) -> np.ndarray:
    """Experts [rows, columns] as colors [rows, columns, 3]."""
    palette = np.array([to_rgb(expert_color(n, num_experts)) for n in range(num_experts)])
    return palette[expert.numpy()]


@torch.inference_mode()
def token_experts(images: ImageDataset, backbone: Backbone) -> Tensor:
    """The expert of every patch of whole images in the last MoE block, [n, rows, columns]."""
    layers = [m for m in backbone.vit.modules() if isinstance(m, TokenExpertFFN)]
    seen: list[Tensor] = []

    def remember(layer: TokenExpertFFN, inputs: tuple[Tensor]) -> None:
        seen.append((inputs[0].float() @ layer.gate.T).argmax(dim=2))

    handle = layers[-1].register_forward_pre_hook(remember)
    vit = backbone.vit.eval()
    encode_tokens(vit, normalize(images.take(slice(None)), backbone.spec.mean, backbone.spec.std))
    handle.remove()
    height, width = vit.patch_embed.grid_size
    assert input_size(vit) == images.shape[2:]
    return seen[0][:, vit.num_prefix_tokens :].reshape(-1, height, width)


if __name__ == "__main__":
    main()
