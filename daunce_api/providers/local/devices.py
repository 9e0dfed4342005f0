"""The devices that torch has here."""

from __future__ import annotations

import torch

from ...errors import ConfigurationError


def check_device(name: str) -> None:
    """Raises ConfigurationError, with those that there are, where torch has no device of this name here."""
    here = ["cpu"]
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator()
        if kind is not None:
            here += [kind.type, *(f"{kind.type}:{i}" for i in range(torch.accelerator.device_count()))]
    if name not in here:
        raise ConfigurationError(
            f"device {name!r} is not there; torch has: {', '.join(here)}. Set device to one of them."
        )
