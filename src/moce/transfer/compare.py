"""MAE, MAE+ and MoCE side by side on one of the demo's tasks: linear probes, a random and the best route."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from moce.config import ProbeSettings
from moce.customization.bank import Bank
from moce.customization.selection import Choice
from moce.loading import Backbone
from moce.transfer.evaluation import Bench
from moce.transfer.task import Task

LINEAR = "linear_probe"


@dataclass
class Comparison:
    """rows: results in the demo's form, one value per draw of labels; choice: what MoCE selected."""

    task: str
    choice: Choice
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, method: str, protocol: str, values: list[float]) -> None:
        row = {"task": self.task, "method": method, "protocol": protocol}
        self.rows.append({**row, "metric": "accuracy", "values": values})


def compare_probes(
    name: str,
    task: Task,
    dense: dict[str, Backbone],
    bank: Bank,
    num_labels: int,
    draws: int,
    seed: int,
) -> Comparison:
    """Probe the dense backbones, MoCE's choice for the task's training images, and every route."""
    settings = ProbeSettings(
        backbone=name, data=name, solver="lbfgs", num_labels=num_labels, draws=draws, seed=seed
    )
    bench = Bench(task, "accuracy", settings, bank.device, bank.precision)
    comparison = Comparison(name, bank.select(task.train))
    for method, backbone in dense.items():
        comparison.add(method, LINEAR, bench.probe(backbone).values)
    for method, how in (("moce", "auto"), ("random_route", "random"), ("oracle", "oracle")):
        comparison.add(method, LINEAR, bench.probe(bank, how).values)
    return comparison
