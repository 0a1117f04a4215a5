"""Freeze the writer of thoughts: the base model as it was before it learned."""

import copy
from collections.abc import Iterable

from torch import nn
from transformers import PreTrainedModel

from qstar import peft_adapters
from qstar.boundary import BoundaryEmbeddings


class FrozenWriter(nn.Module):
    """Keep a base model without its adapter, and its boundary embeddings, as they are now.

    Parameters are shared with the model, and copied only when they are about to learn (`keep`): beside a
    frozen base model the writer needs no memory, beside one whose last layers learn it needs only those.
    The state dict holds the copies, and nothing that is shared.
    """

    def __init__(self, base: PreTrainedModel, boundary: BoundaryEmbeddings):
        super().__init__()
        shared = {id(x): x for part in (base, boundary) for x in (*part.parameters(), *part.buffers())}
        self.base: PreTrainedModel = peft_adapters.without(copy.deepcopy(base, dict(shared)))
        self.boundary: BoundaryEmbeddings = copy.deepcopy(boundary, dict(shared))
        names: dict[int, list[str]] = {}
        for name, parameter in self.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        # keyed by the first name, so that tied parameters stay tied
        self._shared = {x: (p, names[id(p)]) for x, p in self.named_parameters()}
        self._kept: set[str] = set()
        self.register_state_dict_post_hook(_leave_shared_out)
        self.register_load_state_dict_pre_hook(_take_copies_over)

    def keep(self, parameters: Iterable[nn.Parameter]) -> None:
        """Copy those of the model's parameters that are still shared, before they change."""
        changing = {id(p) for p in parameters}
        self._keep_only(self._kept | {name for name, (p, _) in self._shared.items() if id(p) in changing})

    def _keep_only(self, kept: set[str]) -> None:
        for first in kept ^ self._kept:
            parameter, names = self._shared[first]
            if first in kept:
                parameter = nn.Parameter(parameter.detach().clone(), requires_grad=False)
            for name in names:
                path, _, last = name.rpartition(".")
                setattr(self.get_submodule(path), last, parameter)
        self._kept = kept


def _leave_shared_out(writer: FrozenWriter, state: dict, prefix: str, metadata: dict) -> None:
    for name in [x for x in state if x.startswith(prefix) and x.removeprefix(prefix) not in writer._kept]:
        del state[name]


def _take_copies_over(writer: FrozenWriter, state: dict, prefix: str, *unused) -> None:
    """Adopt the copies in the state; add what is shared, which is loaded with the model."""
    given = {name for name in writer._shared if prefix + name in state}
    if given:
        writer._keep_only(given)
    for name, parameter in writer.named_parameters(remove_duplicate=False):
        state.setdefault(prefix + name, parameter.detach())
