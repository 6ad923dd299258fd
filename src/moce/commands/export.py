"""moce export: a trained model as a folder that another library loads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moce.commands.setup import open_output
from moce.config import ExportSettings
from moce.customization.bank import Bank, load
from moce.customization.model_card import (
    clusters_of,
    fine_tuning_facts,
    size_facts,
    write_with_card,
)
from moce.customization.selection import Choice, route_name
from moce.errors import MoceError
from moce.evaluation.results import read_rows
from moce.runs.files import write_json
from moce.runs.model import describe_kind, provenance, read_info
from moce.runtime.progress import log
from moce.weights.classifier import read_classifier
from moce.weights.export import Model, check_format
from moce.weights.from_runs import load_mae, moce_run
from moce.weights.resolve import check_arguments, from_file, overrides_of, refuse_given
from moce.weights.types import MODEL_CONFIG


@dataclass
class ExportResult:
    """folder: the exported model; format: its library; load_it: the Python that loads it."""

    folder: Path
    format: str
    load_it: str

    def summary(self) -> str:
        return f"{self.format} folder: {self.folder}\nload it:\n{self.load_it}"


def run(settings: ExportSettings) -> ExportResult:
    model, facts = _model(settings)
    check_format(settings.format, model)
    folder = open_output(settings)
    title = f"Exported by moce from {settings.run.name}"
    load_it = write_with_card(folder, settings.format, model, title, facts)
    write_json(folder / "export.json", {**settings.model_dump(mode="json"), **provenance()})
    return ExportResult(folder, settings.format, load_it)


def _model(settings: ExportSettings) -> tuple[Model, list[str]]:
    """The model to export, and the facts of its card."""
    run = moce_run(settings.run)
    kind = read_info(run)["kind"] if run else "weights"
    if run:
        refuse_given(settings, f"run {run}")
    if run and kind == "moce":
        return _of_experts(settings, run)
    if settings.route is not None or settings.strategy != "route":
        raise MoceError(f"{settings.run} has no experts: leave out --route and --strategy")
    if run and kind == "mae":
        spec, mae = load_mae(run)
        return Model(spec.encoder, mae.encoder.eval(), mae.eval()), [
            f"source: {run.name}, MAE",
            *size_facts(run),
        ]
    if run and kind != "classifier":
        raise MoceError(f"{run} is {describe_kind(kind)}: no dense ViT is equivalent to export")
    if run is None:
        check_arguments(settings.model_args)
    elif not (run / MODEL_CONFIG).is_file():
        raise MoceError(f"{run} has token-routed experts: no dense ViT is equivalent to export")
    found = read_classifier(run or settings.run, overrides_of(settings), settings.weights_key)
    if found is not None:
        classifier, notes = found
        for note in notes:
            log(note)
        row = next(iter(read_rows(run)), None) if run else None
        return classifier, [f"source: {settings.run.name}", *fine_tuning_facts(classifier, row)]
    spec, mae, whole = from_file(settings.run, settings)
    vit, decoder = mae.encoder.eval(), mae.eval() if whole else None
    return Model(spec.encoder, vit, decoder), [f"source: {settings.run.name}"]


def _of_experts(settings: ExportSettings, run: Path) -> tuple[Model, list[str]]:
    bank = load(run)
    choice = _choice(bank, settings)
    if choice.strategy == "generalist":
        facts = ["strategy: generalist, all experts averaged by their training images"]
    else:
        share = bank.routes[choice.route] / sum(bank.routes.values())
        facts = [
            f"route: {route_name(choice.route)} ({share:.0%} of the training images)",
            f"clusters: {clusters_of(choice)}",
        ]
    model = Model(bank.encoder_spec, bank.backbone(choice).eval())
    return model, [f"source: {run.name}", *size_facts(run), *facts]


def _choice(bank: Bank, settings: ExportSettings) -> Choice:
    if settings.strategy == "generalist":
        if settings.route is not None:
            raise MoceError("--strategy generalist averages all routes: leave out --route")
        sizes = bank.model.cluster_sizes.long()
        return bank.choose(sizes, bank.clusters.similarity, "generalist")
    routes = {route_name(route): route for route in bank.routes}
    names = ", ".join(routes)
    if settings.route is None:
        raise MoceError(f"choose a --route ({names}) or --strategy generalist")
    if settings.route not in routes:
        raise MoceError(f"no cluster takes route '{settings.route}' (routes: {names})")
    return bank.route_choice(routes[settings.route])
