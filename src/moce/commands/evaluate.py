"""moce evaluate: compare backbones on a suite of labeled tasks; resumes row by row."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from moce.commands import finetune
from moce.commands.adapted import AdaptedBackbones, can_resume, check_adaptation
from moce.commands.setup import open_output, pixel_file, prepare, resolve
from moce.config import EvaluateSettings, FinetuneSettings, ProbeSettings
from moce.config.load import parse
from moce.customization.adaptation import ADAPTATION
from moce.customization.bank import Bank
from moce.customization.model_card import write_backbone
from moce.data.readers.factory import paths_of
from moce.errors import Interrupted, MoceError, counted, raise_if_corrupt, signal_of
from moce.evaluation.backbones import (
    PROBE_ONLY,
    Candidate,
    MaskedAutoencoder,
    Opened,
    open_candidate,
    read_candidates,
    task_shape,
)
from moce.evaluation.evaluator import Evaluator, Outcome
from moce.evaluation.metrics import choose_metric
from moce.evaluation.results import KEY, ROWS, make_row, read_rows, write_rows
from moce.evaluation.suite import (
    DENSE_TASKS,
    PROBES,
    PROTOCOLS,
    Suite,
    SuiteTask,
    pick_tasks,
    read_suite,
)
from moce.evaluation.task import Task, load_task
from moce.reporting.results_table import results_table
from moce.runs.files import write_json, write_text
from moce.runs.folder import check_apart
from moce.runs.model import provenance, write_config
from moce.runs.resume import describe_weights, refuse_changes
from moce.runtime.distributed import run_on_rank0
from moce.runtime.progress import log
from moce.weights.export import Model
from moce.weights.from_runs import Backbone, load_backbone

TABLE, ABOUT = "results.md", "evaluation.json"


@dataclass
class EvaluateResult:
    """run: the folder; rows: one per task, backbone and protocol, as in rows.jsonl."""

    run: Path
    rows: list[dict[str, Any]]

    def summary(self) -> str:
        return f"{results_table(self.rows)}\n\nrows: {self.run / ROWS}"


def run(settings: EvaluateSettings) -> EvaluateResult:
    asked = settings
    settings, _ = resolve(settings)
    suite = read_suite(settings.suite, settings.root)
    tasks = pick_tasks(suite, settings.tasks, settings.role)
    candidates = read_candidates(settings.backbones)
    models = {candidate: open_candidate(candidate) for candidate in candidates}
    weights = describe_weights({c.reference: c.reference for c in candidates})
    _check(settings, tasks, candidates)
    check_adaptation(settings, asked, models)
    before = _check_unchanged(settings, suite, weights)
    open_output(settings)
    write_config(settings.out, settings)
    about = {"suite": suite.model_dump(mode="json"), "weights": {**before, **weights}}
    write_json(settings.out / ABOUT, {**about, **provenance()})
    evaluation = _Evaluation(settings, suite, models)
    try:
        for task in tasks:
            evaluation.run_task(task)
    except KeyboardInterrupt as stop:
        done = counted(len(evaluation.rows), "row")
        raise Interrupted(signal_of(stop), settings.out, done) from None
    write_text(settings.out / TABLE, results_table(evaluation.rows) + "\n")
    return EvaluateResult(settings.out, evaluation.rows)


def _check(settings: EvaluateSettings, tasks: list[SuiteTask], candidates: list[Candidate]) -> None:
    """Raise MoceError if an input is missing or in the output folder, or nothing can be fine-tuned."""
    for candidate in candidates:
        check_apart(settings.out, candidate.name, candidate.reference)
    for task in tasks:
        for place in paths_of(task.data):
            check_apart(settings.out, task.name, place)
            if not place.exists():
                raise MoceError(f"task {task.name}: no images at {place}; see --root")
    probe_only = [c.name for c in candidates if c.selection in PROBE_ONLY]
    if "finetune" in settings.protocols and probe_only and len(probe_only) == len(candidates):
        raise MoceError(
            f"{probe_only[0]} can only be probed: it has no single backbone to fine-tune"
        )


def _check_unchanged(
    settings: EvaluateSettings, suite: Suite, weights: dict[str, str]
) -> dict[str, str]:
    """Checksums of the weights that a resumed evaluation has used so far, by reference.

    Raises MoceError if the suite, or weights that are evaluated again, have changed since.
    """
    about = settings.out / ABOUT
    if not settings.resume or not about.is_file():
        return {}
    with raise_if_corrupt(about):
        content = json.loads(about.read_text(encoding="utf-8"))
        # Validated, because what a later version of moce adds to suites is not in an older file.
        suite_before = Suite.model_validate(content["suite"])
        before = dict(content.get("weights", {}))
    if suite_before != suite:
        raise MoceError(
            f"{settings.suite} has changed since {settings.out} was started; use --overwrite"
        )
    refuse_changes(settings.out, {k: v for k, v in before.items() if k in weights}, weights)
    return before


class _Evaluation:
    """The rows of an evaluation so far; adds those that are missing."""

    def __init__(
        self, settings: EvaluateSettings, suite: Suite, models: dict[Candidate, Opened]
    ) -> None:
        self.settings, self.suite, self.models = settings, suite, models
        self.device, self.precision = prepare(settings)
        self.adapted = AdaptedBackbones(settings, self.device, self.precision)
        self.draws = settings.draws or suite.draws
        self.rows = read_rows(settings.out)
        for bank in models.values():
            if isinstance(bank, Bank):
                bank.device, bank.precision = self.device, self.precision

    def run_task(self, plan: SuiteTask) -> None:
        """Add the missing rows of one task; its images are read only if there are any."""
        if plan.task in DENSE_TASKS:
            self._run_dense(plan)
            return
        task: Task | None = None
        evaluators: dict[str, Evaluator] = {}
        for candidate, protocol in self._missing(plan):
            shape = task_shape(self.models[candidate])
            if task is None or shape != task.train.shape[1:]:
                task, evaluators = self._load(plan, shape), {}
            start = time.perf_counter()
            if protocol == "finetune":
                outcome = self._finetune(plan, task, candidate)
            else:
                if protocol not in evaluators:
                    evaluators[protocol] = self._evaluator(plan, task, protocol)
                outcome = self._probe(plan, task, candidate, evaluators[protocol])
            row = make_row(
                task=plan.name,
                data=plan.data,
                backbone=candidate.name,
                reference=candidate.reference,
                selection=candidate.selection,
                protocol=protocol,
                metric=choose_metric(plan.metric, task),
                labels=min(self._labels(plan) or len(task.train), len(task.train)),
                **vars(outcome),
                suite=self.suite.name,
                role=plan.role,
                seconds=round(time.perf_counter() - start, 2),
            )
            self._add(row)
            values = " ".join(f"{100 * value:.1f}" for value in outcome.values)
            log(f"{plan.name}, {candidate.name}, {protocol}: {values}")

    def _add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        write_rows(self.settings.out, self.rows)

    def _missing(self, plan: SuiteTask) -> Iterator[tuple[Candidate, str]]:
        """Candidates and protocols, by their names in rows, that have no row yet."""
        done = {tuple(row[name] for name in KEY) for row in self.rows}
        names = PROTOCOLS[plan.task]
        for protocol in dict.fromkeys(self.settings.protocols):
            if protocol not in names:
                log(f"{plan.name}: no protocol {protocol} for tasks to {plan.task}")
                continue
            for candidate in self.models:
                tunable = names[protocol] in PROBES or candidate.selection not in PROBE_ONLY
                if tunable and (plan.name, *astuple(candidate), names[protocol]) not in done:
                    yield candidate, names[protocol]

    def _load(self, plan: SuiteTask, shape: tuple[int, int, int]) -> Task:
        task = load_task(plan.data, shape, pixel_file(self.settings), self.settings.max_skipped)
        if task.skipped:
            log(f"{plan.name}: skipped {counted(len(task.skipped), 'unreadable image')}")
        return task

    def _labels(self, plan: SuiteTask) -> int | None:
        return plan.labels or self.suite.labels

    def _runtime(self) -> dict[str, Any]:
        names = ("seed", "device", "precision", "threads", "max_skipped")
        return {name: getattr(self.settings, name) for name in names}

    def _evaluator(self, plan: SuiteTask, task: Task, protocol: str) -> Evaluator:
        values = {
            **self.suite.probe,
            **self._runtime(),
            "backbone": "",
            "data": plan.data,
            "kind": protocol,
            "num_labels": self._labels(plan),
            "draws": self.draws,
        }
        settings = parse(ProbeSettings, values)
        metric = choose_metric(plan.metric, task)
        return Evaluator(task, metric, settings, self.device, self.precision)

    def _probe(
        self, plan: SuiteTask, task: Task, candidate: Candidate, evaluator: Evaluator
    ) -> Outcome:
        model = self.models[candidate]
        if candidate.adapts or isinstance(model, MaskedAutoencoder):
            folder, details = self._adapted(plan, task, candidate)
            return replace(evaluator.probe(load_backbone(str(folder))), **details)
        return evaluator.probe(model, candidate.selection, candidate.reference)

    def _adapted(
        self, plan: SuiteTask, task: Task, candidate: Candidate
    ) -> tuple[Path, dict[str, Any]]:
        """The folder of an adapted backbone; what it was chosen and adapted by, for its row."""
        model = self.models[candidate]
        assert not isinstance(model, Backbone)
        folder = self.adapted.folder(plan, task, candidate, model)
        files = {"choice": folder / "selection.json", "adaptation": folder / ADAPTATION}
        return folder, {
            name: json.loads(path.read_text(encoding="utf-8"))
            for name, path in files.items()
            if path.is_file()
        }

    def _finetune(self, plan: SuiteTask, task: Task, candidate: Candidate) -> Outcome:
        reference, details = self._dense_reference(plan, task, candidate)
        given = {**self.suite.finetune, "task": "classify", "metric": plan.metric}
        values = []
        for draw in range(self._finetune_draws()):
            settings = self._finetune_settings(plan, "finetune", candidate, draw, reference, given)
            values.append(finetune.run(settings).value)
        return Outcome(values, **details)

    def _finetune_draws(self) -> int:
        return min(self.draws, self.settings.finetune_draws)

    def _finetune_settings(
        self,
        plan: SuiteTask,
        protocol: str,
        candidate: Candidate,
        draw: int,
        reference: str,
        given: dict[str, Any],
    ) -> FinetuneSettings:
        """Of one run, which is resumed if it had started."""
        out = self.settings.out / protocol / candidate.name / plan.name / str(draw)
        resume = run_on_rank0(partial(can_resume, out))
        values = {
            **given,
            **self._runtime(),
            "draw": draw,
            "backbone": reference,
            "data": plan.data,
            "num_labels": self._labels(plan),
            "out": out,
            "resume": resume,
        }
        return parse(FinetuneSettings, values)

    def _run_dense(self, plan: SuiteTask) -> None:
        """Add the missing rows of a task to detect or to segment."""
        from moce.commands import evaluate_dense  # its libraries take seconds to import

        for candidate, protocol in self._missing(plan):
            start = time.perf_counter()
            model, task = self.models[candidate], None
            if not isinstance(model, Backbone):  # what it becomes depends on the images
                task = evaluate_dense.as_task(plan, task_shape(model), self.settings)
            reference, details = self._dense_reference(plan, task, candidate)
            given = evaluate_dense.finetune_settings(plan, self.suite, protocol)
            runs = []
            for draw in range(self._finetune_draws()):
                settings = self._finetune_settings(
                    plan, protocol, candidate, draw, reference, given
                )
                finetune.run(settings)
                runs.append(settings.out)
            row = run_on_rank0(
                partial(
                    evaluate_dense.row_of_runs, plan, candidate, protocol, runs, self.settings.out
                )
            )
            about = {"suite": self.suite.name, "role": plan.role}
            seconds = round(time.perf_counter() - start, 2)
            self._add({**row, **about, "seconds": seconds, **details})
            values = " ".join(f"{100 * value:.1f}" for value in row["values"])
            log(f"{plan.name}, {candidate.name}, {protocol}: {row['metric']} {values}")

    def _dense_reference(
        self, plan: SuiteTask, task: Task | None, candidate: Candidate
    ) -> tuple[str, dict[str, Any]]:
        """What to fine-tune: the reference, or a folder with the task's own backbone.

        task: may be None for a backbone that is the same for all tasks.
        """
        bank = self.models[candidate]
        if task is None or isinstance(bank, Backbone):
            return candidate.reference, {}
        if candidate.adapts or not isinstance(bank, Bank):
            folder, details = self._adapted(plan, task, candidate)
            return str(folder), details
        choice = bank.select(task.train, candidate.selection or "auto")
        folder = self.settings.out / "backbones" / candidate.name / plan.name
        model = Model(bank.encoder_spec, bank.backbone(choice))

        def write() -> None:
            folder.mkdir(parents=True, exist_ok=True)
            write_backbone(folder, "timm", model, Path(candidate.reference), choice)

        run_on_rank0(write)
        return str(folder), {"choice": choice.to_json()}
