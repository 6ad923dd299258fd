"""Results of a comparison, as results.json holds them, ready to be looked up and averaged."""

from __future__ import annotations

from typing import Any

import numpy as np

PROTOCOLS = {
    "linear_probe": ("Linear probe", ("mae", "mae_plus", "moce", "random_route", "oracle")),
    "finetune": ("Fine-tuned", ("mae", "mae_plus", "moce")),
}


class Results:
    """results.json by task, protocol and method. Accuracies are 0..1."""

    def __init__(self, content: dict[str, Any]) -> None:
        self.selection: dict[str, dict[str, Any]] = content["selection"]
        self.seconds: dict[str, float] = content.get("seconds", {})
        self._values = {
            (row["task"], row["protocol"], row["method"]): row["values"] for row in content["rows"]
        }
        self.tasks = list(dict.fromkeys(row["task"] for row in content["rows"]))

    def columns(self) -> list[tuple[str, str]]:
        """The (protocol, method) pairs that have results, in the page's order."""
        present = {key[1:] for key in self._values}
        pairs = [(name, method) for name, (_, methods) in PROTOCOLS.items() for method in methods]
        return [pair for pair in pairs if pair in present]

    def values(self, task: str, protocol: str, method: str) -> list[float]:
        """One accuracy per draw of labels; none if it was not measured."""
        return self._values.get((task, protocol, method), [])

    def mean(self, task: str, protocol: str, method: str) -> float | None:
        values = self.values(task, protocol, method)
        return float(np.mean(values)) if values else None

    def average(self, protocol: str, method: str) -> float | None:
        """Mean over the tasks; None unless all have a result."""
        means = [self.mean(task, protocol, method) for task in self.tasks]
        known = [mean for mean in means if mean is not None]
        return float(np.mean(known)) if known and len(known) == len(means) else None

    def regret(self, task: str) -> float | None:
        """Mean probe accuracy of the oracle less that of MoCE's selection."""
        oracle, chosen = (self.mean(task, "linear_probe", m) for m in ("oracle", "moce"))
        return None if oracle is None or chosen is None else oracle - chosen
