"""Velocity of channels, from the similarity of their responses (METHOD sections 1.1 and 1.2).

phi_t of a channel is the cosine between its response to a probe image now and at the previous measurement, averaged
over the images (`responses.py` measures it); dphi_t = phi_t - phi_{t-1}, with phi_0 = 1 and v_0 = 0; then

    "paper":      v_t = dphi_t - mu * v_{t-1}
    "reference":  v_t = mu * v_{t-1} + dphi_t - dphi_{t-1}

Kept between measurements: three float64 numbers per channel.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

RECURSIONS = ("paper", "reference")


class Velocity:
    """The recursion over measurements: phi [C] in, velocity [C] out (float64, CPU).

    Args:
        channels: C, the number of channels of all layers together.
        recursion: "paper" or "reference" (the module docstring has both).
        mu: weight of the previous velocity, at least 0 and below 1.
    """

    def __init__(self, channels: int, recursion: str = "paper", mu: float = 0.5) -> None:
        if recursion not in RECURSIONS:
            raise ValueError(f"recursion is {recursion!r}; it must be 'paper' or 'reference'.")
        if not 0 <= mu < 1:
            raise ValueError(f"mu is {mu!r}; it must be at least 0 and below 1.")
        self.recursion, self.mu = recursion, float(mu)
        self.phi = torch.ones(channels, dtype=torch.float64)
        self.dphi = torch.zeros(channels, dtype=torch.float64)
        self.value = torch.zeros(channels, dtype=torch.float64)

    @property
    def bytes(self) -> int:
        """Bytes held between measurements."""
        return self.phi.nbytes + self.dphi.nbytes + self.value.nbytes

    def update(self, phi: Tensor) -> Tensor:
        """Velocity after the next similarity `phi`; ValueError if it is NaN."""
        if not bool(phi.isfinite().all()):
            raise ValueError(
                "The similarity of the responses is NaN, so no velocity exists; the training has diverged."
            )
        dphi = phi - self.phi
        if self.recursion == "paper":
            self.value = dphi - self.mu * self.value
        else:
            self.value = self.mu * self.value + dphi - self.dphi
        self.phi, self.dphi = phi, dphi
        return self.value

    def state_dict(self) -> dict[str, Any]:
        """Copies of phi, dphi and the velocity, with the recursion that they belong to."""
        tensors = {key: getattr(self, key).clone() for key in ("phi", "dphi", "value")}
        return {"recursion": self.recursion, "mu": self.mu, **tensors}

    def check_state(self, state: Any) -> None:
        """ValueError unless `state` is of the same recursion, mu and number of channels."""
        if not isinstance(state, Mapping):
            raise ValueError(
                "The saved policy has no velocity; pass what state_dict() of a velocity policy returned."
            )
        for key in ("recursion", "mu"):
            if state.get(key) != getattr(self, key):
                raise ValueError(
                    f"The saved velocity has {key}={state.get(key)!r}, this policy {getattr(self, key)!r}."
                )
        for key in ("phi", "dphi", "value"):
            if not isinstance(state.get(key), Tensor) or state[key].shape != self.phi.shape:
                raise ValueError(
                    f"The saved velocity's {key} does not belong to a model of {len(self.phi)} channels."
                )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned (already checked by `check_state`)."""
        self.phi, self.dphi, self.value = (state[key].clone() for key in ("phi", "dphi", "value"))
