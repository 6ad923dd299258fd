"""What Lightning Fabric does for several processes, for one: its import alone takes two seconds."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn


class SingleProcess:
    """The part of `lightning_fabric.Fabric` that the trainer uses. precision: float32 or bf16."""

    def __init__(self, device: torch.device, precision: str) -> None:
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self.device = device
        self._bf16 = precision == "bf16"

    def setup_module(self, module: nn.Module) -> nn.Module:
        """The module on the device, called in the precision; its `module` is what was given."""
        return _InPrecision(module.to(self.device), self.device.type, self._bf16)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients."""
        loss.backward()

    def no_backward_sync(self, model: nn.Module, enabled: bool) -> AbstractContextManager[None]:
        """There is nothing to synchronize."""
        return nullcontext()

    def clip_gradients(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        max_norm: float,
        error_if_nonfinite: bool,
    ) -> None:
        """Scale the gradients of all parameters to a norm of at most `max_norm`."""
        parameters = [weight for group in optimizer.param_groups for weight in group["params"]]
        nn.utils.clip_grad_norm_(
            parameters, max_norm=max_norm, error_if_nonfinite=error_if_nonfinite
        )


class _InPrecision(nn.Module):
    """Calls a module as Fabric does: in bf16, float arguments are cast, and float results cast back."""

    def __init__(self, module: nn.Module, device: str, bf16: bool) -> None:
        super().__init__()
        self.module = module
        self._device, self._bf16 = device, bf16

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self._bf16:
            return self.module(*args, **kwargs)
        args, kwargs = _cast((args, kwargs), torch.bfloat16)
        with torch.autocast(self._device, torch.bfloat16):
            output = self.module(*args, **kwargs)
        return _cast(output, torch.float32)


def _cast(values: Any, dtype: torch.dtype) -> Any:
    """The float tensors in a collection as `dtype`, everything else as it is."""
    from lightning_utilities.core.apply_func import apply_to_collection

    return apply_to_collection(
        values, Tensor, lambda value: value.to(dtype) if value.is_floating_point() else value
    )
