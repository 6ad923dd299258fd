"""moce evaluate: backbones side by side on a suite of labeled tasks, resumable result by result."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moce.commands import finetune
from moce.commands.setup import open_output, pixel_store, prepare, resolve
from moce.config import EvaluateSettings, FinetuneSettings, ProbeSettings
from moce.config.load import parse
from moce.customization.bank import Bank
from moce.customization.model_card import write_choice
from moce.data.readers.factory import paths_of
from moce.errors import Interrupted, MoceError, raise_if_corrupt, signal_of
from moce.evaluation.backbones import Candidate, open_candidate, read_candidates
from moce.evaluation.evaluator import Evaluator, Outcome
from moce.evaluation.metrics import choose_metric
from moce.evaluation.suite import Suite, SuiteTask, pick_tasks, read_suite
from moce.evaluation.task import Task, load_task
from moce.models.encoder import input_shape
from moce.reporting.results_table import suite_table
from moce.runs.files import read_lines, write_json, write_text
from moce.runs.folder import check_apart
from moce.runs.model import CONFIG, provenance, write_config
from moce.runs.resume import describe_weights, refuse_changes
from moce.runtime.progress import log
from moce.weights.export import Model
from moce.weights.from_runs import Backbone

ROWS, TABLE, ABOUT = "rows.jsonl", "results.md", "evaluation.json"
# What tells a row from all others.
KEY = ("task", "backbone", "reference", "how", "protocol")
NOT_TUNED = frozenset({"random", "oracle", "probe"})  # no single backbone that could be fine-tuned


@dataclass
class EvaluateResult:
    """run: the folder; rows: one per task, backbone and protocol, as in rows.jsonl."""

    run: Path
    rows: list[dict[str, Any]]

    def summary(self) -> str:
        return f"{suite_table(self.rows)}\n\nrows: {self.run / ROWS}"


def run(settings: EvaluateSettings) -> EvaluateResult:
    settings, _ = resolve(settings)
    suite = read_suite(settings.suite, settings.root)
    tasks = pick_tasks(suite, settings.tasks, settings.role)
    candidates = read_candidates(settings.backbones)
    opened = {candidate: open_candidate(candidate) for candidate in candidates}
    weights = describe_weights({c.reference: c.reference for c in candidates})
    _check(settings, suite, candidates)
    before = _check_unchanged(settings, suite, weights)
    open_output(settings)
    write_config(settings.out, settings)
    about = {"suite": suite.model_dump(mode="json"), "weights": {**before, **weights}}
    write_json(settings.out / ABOUT, {**about, **provenance()})
    work = _Work(settings, suite, opened)
    try:
        for plan in tasks:
            work.evaluate(plan)
    except KeyboardInterrupt as stop:
        raise Interrupted(signal_of(stop), settings.out, f"{len(work.rows)} rows") from None
    write_text(settings.out / TABLE, suite_table(work.rows) + "\n")
    return EvaluateResult(settings.out, work.rows)


def _check(settings: EvaluateSettings, suite: Suite, candidates: list[Candidate]) -> None:
    """Raise MoceError if inputs lie in the output or a row could not be made."""
    for candidate in candidates:
        check_apart(settings.out, candidate.name, candidate.reference)
    for task in pick_tasks(suite, settings.tasks, settings.role):
        for place in paths_of(task.data):
            check_apart(settings.out, task.name, place)
            if not place.exists():
                raise MoceError(f"task {task.name}: no images at {place}; see --root")
    wrong = [c.name for c in candidates if c.how in NOT_TUNED]
    if "finetune" in settings.protocols and wrong and len(wrong) == len(candidates):
        raise MoceError(f"{wrong[0]} can be probed only: it has no one backbone to fine-tune")


def _check_unchanged(
    settings: EvaluateSettings, suite: Suite, weights: dict[str, str]
) -> dict[str, str]:
    """The weights that a resumed evaluation has compared so far, by reference.

    Raises MoceError if the suite or one of them, asked for again, has changed since it began.
    """
    about = settings.out / ABOUT
    if not settings.resume or not about.is_file():
        return {}
    with raise_if_corrupt(about):
        began = json.loads(about.read_text(encoding="utf-8"))
        then, before = began["suite"], dict(began.get("weights", {}))
    if then != suite.model_dump(mode="json"):
        raise MoceError(f"{settings.suite} has changed since {settings.out} began; start anew")
    refuse_changes(settings.out, {k: v for k, v in before.items() if k in weights}, weights)
    return before


class _Work:
    """The rows there are, and the making of those that are missing."""

    def __init__(
        self, settings: EvaluateSettings, suite: Suite, opened: dict[Candidate, Backbone | Bank]
    ) -> None:
        self.settings, self.suite, self.opened = settings, suite, opened
        self.device, self.precision = prepare(settings)
        self.draws = settings.draws or suite.draws
        self.rows = [
            row for row in read_lines(settings.out / ROWS, "values") if set(KEY) < set(row)
        ]
        for bank in opened.values():
            if isinstance(bank, Bank):
                bank.device, bank.precision = self.device, self.precision

    def evaluate(self, plan: SuiteTask) -> None:
        """All missing rows of one task; its images are read only if there are any."""
        task: Task | None = None
        benches: dict[str, Evaluator] = {}
        for candidate, protocol in self._missing(plan):
            opened = self.opened[candidate]
            shape = opened.task_shape if isinstance(opened, Bank) else input_shape(opened.vit)
            if task is None or shape != task.train.shape[1:]:
                store, most = pixel_store(self.settings), self.settings.max_skipped
                task = load_task(plan.data, shape, store, most)
                benches = {}
                if task.skipped:
                    log(f"{plan.name}: skipped {len(task.skipped)} unreadable images")
            start = time.perf_counter()
            if protocol == "finetune":
                outcome = self._finetune(plan, task, candidate)
            else:
                if protocol not in benches:
                    benches[protocol] = self._bench(plan, task, protocol)
                outcome = benches[protocol].probe(opened, candidate.how, candidate.reference)
            row = {
                "suite": self.suite.name,
                "task": plan.name,
                "role": plan.role,
                "backbone": candidate.name,
                "reference": candidate.reference,
                "how": candidate.how,
                "protocol": protocol,
                "metric": choose_metric(plan.metric, task),
                "labels": min(self._labels(plan) or len(task.train), len(task.train)),
                "values": [round(value, 6) for value in outcome.values],
                "seconds": round(time.perf_counter() - start, 2),
                "choice": outcome.choice,
                "confusion": outcome.confusion,
            }
            self._keep(row)
            shown = " ".join(f"{100 * value:.1f}" for value in outcome.values)
            log(f"{plan.name}, {candidate.name}, {protocol}: {shown}")

    def _missing(self, plan: SuiteTask) -> Iterator[tuple[Candidate, str]]:
        done = {tuple(row[name] for name in KEY) for row in self.rows}
        for protocol in dict.fromkeys(self.settings.protocols):
            for candidate in self.opened:
                key = (plan.name, candidate.name, candidate.reference, candidate.how, protocol)
                tuned = protocol == "finetune" and candidate.how in NOT_TUNED
                if not tuned and key not in done:
                    yield candidate, protocol

    def _keep(self, row: dict[str, Any]) -> None:
        """Written whole each time: an interruption loses no more than the row being made."""
        self.rows.append(row)
        lines = [json.dumps(row) + "\n" for row in self.rows]
        write_text(self.settings.out / ROWS, "".join(lines))

    def _labels(self, plan: SuiteTask) -> int | None:
        return plan.labels or self.suite.labels

    def _runtime(self) -> dict[str, Any]:
        names = ("seed", "device", "precision", "threads", "max_skipped")
        return {name: getattr(self.settings, name) for name in names}

    def _bench(self, plan: SuiteTask, task: Task, protocol: str) -> Evaluator:
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

    def _finetune(self, plan: SuiteTask, task: Task, candidate: Candidate) -> Outcome:
        reference, choice = self._dense_reference(plan, task, candidate)
        values = []
        for draw in range(min(self.draws, self.settings.finetune_draws)):
            out = self.settings.out / "finetune" / candidate.name / plan.name / str(draw)
            resume = (out / CONFIG).is_file()
            if out.is_dir() and not resume:  # stopped before it began
                shutil.rmtree(out)
            given = {
                **self.suite.finetune,
                **self._runtime(),
                "draw": draw,
                "backbone": reference,
                "data": plan.data,
                "metric": plan.metric,
                "num_labels": self._labels(plan),
                "out": out,
                "resume": resume,
            }
            values.append(finetune.run(parse(FinetuneSettings, given)).value)
        return Outcome(values, choice=choice)

    def _dense_reference(
        self, plan: SuiteTask, task: Task, candidate: Candidate
    ) -> tuple[str, dict[str, Any] | None]:
        """What `moce finetune` takes: a MoCE run's choice is written to a folder first."""
        bank = self.opened[candidate]
        if not isinstance(bank, Bank):
            return candidate.reference, None
        choice = bank.select(task.train, candidate.how or "auto")
        folder = self.settings.out / "backbones" / candidate.name / plan.name
        folder.mkdir(parents=True, exist_ok=True)
        model = Model(bank.encoder_spec, bank.backbone(choice))
        write_choice(folder, "timm", model, choice, Path(candidate.reference))
        return str(folder), choice.to_json()
