"""README.md, selection.json and adaptation.json of an export."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from moce.config.base import Format
from moce.customization.adaptation import ADAPTATION, Adaptation
from moce.customization.chart import CHART, write_bars
from moce.customization.selection import FOREIGN, Choice, route_name
from moce.errors import counted
from moce.models.encoder import EncoderSpec, input_shape
from moce.runs.files import write_json, write_text
from moce.runs.model import STATE, versions
from moce.runs.resume import training_size
from moce.weights.export import Model, write_model_folder

MAX_CLUSTERS, MAX_CLASSES = 12, 20  # on a card
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
    facts = [f"source: {source.name}", *size_facts(source)]
    facts += [] if choice is None else choice_facts(choice)
    facts += [] if adaptation is None else adaptation_facts(adaptation)
    done = "adapted" if choice is None else "customized"
    if choice is not None:
        votes = sorted(choice.votes.items(), key=lambda item: -item[1])
        bars = {route_name(route): float(count) for route, count in votes if count}
        write_bars(folder, bars, "votes of the task's images, by route")
    snippet = write_with_card(
        folder, kind, model, f"Backbone {done} by moce from {source.name}", facts
    )
    if choice is not None:
        write_json(folder / "selection.json", choice.to_json())
    if adaptation is not None:
        write_json(folder / ADAPTATION, asdict(adaptation))
        shutil.rmtree(folder / STATE, ignore_errors=True)  # three times the weights
    return snippet


def size_facts(run: Path) -> list[str]:
    """On how many images a run was trained, where it is known."""
    count = training_size(run)
    return [] if count is None else [f"{run.name} was trained on {counted(count, 'image')}"]


def choice_facts(choice: Choice) -> list[str]:
    """What a card says of a choice of experts."""
    return [
        f"strategy: {choice.strategy}",
        experts_fact(choice),
        f"clusters: {clusters_of(choice)}",
        similarity_fact(choice),
        *scores_facts(choice),
    ]


def experts_fact(choice: Choice) -> str:
    """Which experts a choice takes; only strategy route takes those of one route."""
    if choice.strategy == "route":
        return f"route: {route_name(choice.route)} ({share_of_votes(choice)})"
    voted = counted(sum(count > 0 for count in choice.votes.values()), "route")
    by = f"the task's votes for {voted}" if choice.strategy == "merge" else "their training images"
    return f"experts: all, averaged by {by}"


def share_of_votes(choice: Choice) -> str:
    """The winner's share, and how exactly so many images tell it."""
    low, high = choice.share_by_chance
    images = counted(sum(choice.votes.values()), "image")
    return f"{choice.share:.0%} of {images}, by chance {low:.0%} to {high:.0%}"


def similarity_fact(choice: Choice) -> str:
    """The similarity of a task's images to the clusters, and from when on they are unlike them."""
    return (
        f"similarity to the clusters: {choice.similarity:.3f} (training images: "
        f"{choice.training_similarity:.3f}), {choice.distance:.1f} times as far from the centroids; "
        f"over {FOREIGN:g} times, auto takes the average of all experts"
    )


def scores_facts(choice: Choice) -> list[str]:
    """What strategy probe has compared, best first."""
    ranked = sorted(choice.scores.items(), key=lambda item: -item[1])
    shown = ", ".join(f"{name} {100 * score:.1f} %" for name, score in ranked)
    return [f"cross-validated on the labels: {shown}"] if ranked else []


def adaptation_facts(adaptation: Adaptation) -> list[str]:
    """What a card says of an adaptation."""
    facts = [
        f"adapted: {counted(adaptation.steps, 'step')} on "
        f"{counted(adaptation.task_images, 'task image')} and "
        f"{counted(adaptation.pool_images, 'related one')}"
    ]
    if adaptation.error_before is not None and adaptation.error_after is not None:
        facts.append(
            f"reconstruction error of {counted(adaptation.held_out, 'held-out task image')}: "
            f"{adaptation.error_before:.4f} before, {adaptation.error_after:.4f} after"
        )
    return facts


def fine_tuning_facts(model: Model, row: dict[str, Any] | None = None) -> list[str]:
    """What a card says of a fine-tuned model: its classes and, from a row of results, its score."""
    classes = list(model.classes or ())
    more = f" and {len(classes) - MAX_CLASSES} more" if len(classes) > MAX_CLASSES else ""
    shown = f"{counted(len(classes), 'class', 'classes')}: {', '.join(classes[:MAX_CLASSES])}{more}"
    several = "; an image can have several" if model.multi_label else ""
    return ([] if row is None else [_score_fact(row)]) + [shown + several]


def _score_fact(row: dict[str, Any]) -> str:
    return (
        f"fine-tuned on {row['task']}, {counted(row['labels'], 'labeled image')}: "
        f"{row['metric']} {100 * row['values'][0]:.1f} % on its test images"
    )


def write_with_card(folder: Path, kind: Format, model: Model, title: str, facts: list[str]) -> str:
    """Write a model and a card with these facts; returns the Python that loads it."""
    snippet = write_model_folder(folder, kind, model)
    task = "image-feature-extraction" if model.classes is None else "image-classification"
    facts = [*facts, _output_fact(kind, model)]
    return write_card(folder, kind, snippet, input_shape(model.vit), model.spec, title, facts, task)


def write_card(
    folder: Path,
    kind: Format,
    snippet: str,
    shape: tuple[int, int, int],
    spec: EncoderSpec,
    title: str,
    facts: list[str],
    task: str = "image-feature-extraction",
    library: str | None = None,
) -> str:
    """Write the card of a model, which `snippet` loads from THIS_FOLDER; returns that Python.

    The card's own code runs in the folder, on random images. A chart that is there is shown.
    shape: (channels, height, width) of its images; task, library: by their names on the Hugging Face
    hub.
    """
    channels, height, width = shape
    preprocessing = (
        f"images: {channels} channels of {height}x{width} pixels from 0 to 1 (the middle, resized by "
        f"the shorter side), less {list(spec.mean)}, over {list(spec.std)}"
    )
    made_by = ", ".join(f"{name} {number}" for name, number in versions().items())
    facts = [*facts, f"format: {kind}", preprocessing, f"made by {made_by}"]
    items = "\n".join(f"- {fact}" for fact in facts)
    chart = f"![chart]({CHART})\n\n" if (folder / CHART).is_file() else ""
    code = f"{_input_code(shape, spec)}\n{snippet.replace('THIS_FOLDER', '.')}"
    text = f"# {title}\n\n{chart}{items}\n\n```python\n{code}\n```\n"
    write_text(folder / "README.md", f"{_card(library or LIBRARY[kind], text, task)}")
    return snippet.replace("THIS_FOLDER", str(folder))


def _input_code(shape: tuple[int, int, int], spec: EncoderSpec) -> str:
    """Python that makes `images`, an input of the model."""
    return (
        "import torch\n"
        f"images = torch.rand(2, {', '.join(map(str, shape))})  # pixels from 0 to 1: yours\n"
        f"mean, std = torch.tensor({list(spec.mean)}), torch.tensor({list(spec.std)})\n"
        "images = (images - mean[:, None, None]) / std[:, None, None]"
    )


def _output_fact(kind: Format, model: Model) -> str:
    """Which output is the feature, or what the logits are."""
    if model.classes is not None:
        several = "sigmoid" if model.multi_label else "softmax"
        return f"output: logits of the classes; their {several} gives probabilities"
    where = {
        "transformers": ", last_hidden_state[:, 1:].mean(dim=1), not pooler_output or the class token",
        "onnx": ", the first output",
    }.get(kind, "")
    return f"feature: the mean of the patch tokens after the last norm{where}"


def _card(library: str, text: str, task: str) -> ModelCard:
    """A model card with metadata for the Hugging Face hub, and no license: moce knows of none."""
    data = ModelCardData(library_name=library, pipeline_tag=task, tags=TAGS)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")


def clusters_of(choice: Choice) -> str:
    """The clusters with the most images, as 3 (120 images), 7 (80 images), ..."""
    counts = [(count, cluster) for cluster, count in enumerate(choice.cluster_histogram) if count]
    most = sorted(counts, key=lambda item: (-item[0], item[1]))
    clusters = ", ".join(
        f"{cluster} ({counted(count, 'image')})" for count, cluster in most[:MAX_CLUSTERS]
    )
    more = len(most) - MAX_CLUSTERS
    return clusters + (f" and {more} more" if more > 0 else "")
