"""README.md, selection.json and adaptation.json of an export."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from moce.config.base import Format
from moce.customization.adaptation import ADAPTATION, Adaptation
from moce.customization.selection import Choice, route_name
from moce.runs.files import write_json, write_text
from moce.runs.model import STATE
from moce.weights.export import Model, write_model_folder

MAX_CLUSTERS = 12  # on a card
LIBRARY: dict[Format, str] = {  # that loads a format, by its name on the Hugging Face hub
    "timm": "timm",
    "transformers": "transformers",
    "torch": "timm",
    "onnx": "onnx",
}
TAGS = ["moce", "masked-autoencoder", "vision-transformer"]


def write_backbone(
    folder: Path,
    kind: Format,
    model: Model,
    source: Path,
    choice: Choice | None = None,
    adaptation: Adaptation | None = None,
) -> str:
    """Write a model for a task, its card, selection.json and adaptation.json.

    source: the run that it comes from. Returns the Python that loads it. adaptation.json is written
    last: with it, an adaptation is finished, and its checkpoints are removed.
    """
    facts = [f"source: {source.name}"]
    facts += [] if choice is None else choice_facts(choice)
    facts += [] if adaptation is None else adaptation_facts(adaptation)
    done = "adapted" if choice is None else "customized"
    snippet = write_with_card(
        folder, kind, model, f"Backbone {done} by moce from {source.name}", facts
    )
    if choice is not None:
        write_json(folder / "selection.json", choice.to_json())
    if adaptation is not None:
        write_json(folder / ADAPTATION, asdict(adaptation))
        shutil.rmtree(folder / STATE, ignore_errors=True)  # three times the weights
    return snippet


def choice_facts(choice: Choice) -> list[str]:
    """What a card says of a choice of experts."""
    return [
        f"strategy: {choice.strategy}",
        f"route: {route_name(choice.route)} ({choice.share:.0%} of the task's images)",
        f"clusters: {clusters_of(choice)}",
        f"similarity to the clusters: {choice.similarity:.3f} "
        f"(training images: {choice.training_similarity:.3f})",
    ]


def adaptation_facts(adaptation: Adaptation) -> list[str]:
    """What a card says of an adaptation."""
    facts = [
        f"adapted: {adaptation.steps} steps on {adaptation.task_images} task images and "
        f"{adaptation.pool_images} related ones"
    ]
    if adaptation.error_before is not None and adaptation.error_after is not None:
        facts.append(
            f"reconstruction error of {adaptation.held_out} held-out task images: "
            f"{adaptation.error_before:.4f} before, {adaptation.error_after:.4f} after"
        )
    return facts


def write_with_card(folder: Path, kind: Format, model: Model, title: str, facts: list[str]) -> str:
    """Write a model and a card with these facts; returns the Python that loads it."""
    snippet = write_model_folder(folder, kind, model)
    height, width = model.vit.patch_embed.img_size
    preprocessing = (
        f"images: {model.vit.in_chans} channels of {height}x{width} pixels from 0 to 1, "
        f"less {list(model.spec.mean)}, over {list(model.spec.std)}"
    )
    items = "\n".join(f"- {fact}" for fact in (*facts, f"format: {kind}", preprocessing))
    text = f"# {title}\n\n{items}\n\n```python\n{snippet}\n```\n"
    write_text(folder / "README.md", f"{_card(kind, text)}")
    return snippet.replace("THIS_FOLDER", str(folder))


def _card(kind: Format, text: str) -> ModelCard:
    """A model card with metadata for the Hugging Face hub, and no license: moce knows of none."""
    data = ModelCardData(
        library_name=LIBRARY[kind], pipeline_tag="image-feature-extraction", tags=TAGS
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")


def clusters_of(choice: Choice) -> str:
    """The clusters with the most images, as 3 (120 images), 7 (80 images), ..."""
    counts = [(count, cluster) for cluster, count in enumerate(choice.cluster_histogram) if count]
    most = sorted(counts, key=lambda item: (-item[0], item[1]))
    clusters = ", ".join(f"{cluster} ({count} images)" for count, cluster in most[:MAX_CLUSTERS])
    more = len(most) - MAX_CLUSTERS
    return clusters + (f" and {more} more" if more > 0 else "")
