"""Weigh the prediction after a thought against the one without it."""

from typing import Any

import torch
from torch import Tensor, nn


class MixingHead(nn.Module):
    """Compute w = MLP([base hidden ; thought hidden]), the weight of the THOUGHT, unsquashed, in fp32.

    Linear(2D, D) ReLU Linear(D, D) ReLU Linear(D, 1, no bias); the last layer starts at zero, so training
    starts from exactly the base model. Source: arXiv 2403.09629, section 4.3, and the authors' code.
    """

    def __init__(self, width: int, device: torch.device | None = None):
        super().__init__()
        exact: Any = {"device": device, "dtype": torch.float32}
        self.layers = nn.Sequential(
            nn.Linear(2 * width, width, **exact),
            nn.ReLU(),
            nn.Linear(width, width, **exact),
            nn.ReLU(),
            nn.Linear(width, 1, bias=False, **exact),
        )
        nn.init.zeros_(self.layers[-1].weight)  # type: ignore[arg-type]

    def forward(self, base_hidden: Tensor, thought_hidden: Tensor) -> Tensor:
        """Map base_hidden and thought_hidden, [..., D] of any dtype, to w [...] fp32."""
        # neither bf16 parameters nor autocast may round a weight of 1e-3
        with torch.autocast(base_hidden.device.type, enabled=False):
            parameter = next(self.parameters())
            dtype = torch.promote_types(parameter.dtype, torch.float32)
            pair = torch.cat([base_hidden, thought_hidden], dim=-1).to(dtype)
            if parameter.dtype == dtype:
                return self.layers(pair).squeeze(-1)
            # FSDP2 in mixed precision gathers rounded weights; round nothing else
            exact = {name: p.to(dtype) for name, p in self.layers.named_parameters()}
            return torch.func.functional_call(self.layers, exact, pair).squeeze(-1)
