"""Build networks whose weights are loaded next: random values would take longer than the loading."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import init
from torch.overrides import TorchFunctionMode

# What initialization draws and transforms. A mode sees only the outermost of nested calls.
RANDOM = {
    *(Tensor.uniform_, Tensor.normal_, Tensor.erfinv_),
    *(init.uniform_, init.normal_, init.trunc_normal_),
    *(init.kaiming_uniform_, init.kaiming_normal_, init.xavier_uniform_, init.xavier_normal_),
}


class Uninitialized(TorchFunctionMode):
    """A context in which random initialization leaves weights as they lie in memory.

    What is not random (biases, norms, position embeddings) is set as always. Load all weights after it.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in RANDOM:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)
