"""Build networks whose weights are loaded next: random values would take longer than the loading."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

RANDOM = {
    Tensor.uniform_,
    Tensor.normal_,
    Tensor.erfinv_,
}  # what initialization draws and transforms


class Uninitialized(TorchFunctionMode):
    """A context in which random initialization leaves weights as they lie in memory.

    What is not random (biases, norms, position embeddings) is set as always. Load all weights after it.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return args[0] if func in RANDOM else func(*args, **(kwargs or {}))
