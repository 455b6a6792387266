"""Where each parameter lies in the fp32 tensors an optimizer owns, at any ZeRO stage.

    stage 0      one tensor a parameter, the same on every rank
    stage 1, 2   a flat tensor a parameter group, of which each rank has a part
    stage 3      a flat tensor a sub-group, made of this rank's part of every parameter

AdamW's moments and the EMA have the form of the masters they belong to, so one table serves all four.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn


class Fragment(NamedTuple):
    """``masters[master].flatten()[start : start + numel]`` is ``parameter.flatten()[offset : offset + numel]``."""

    name: str
    master: int
    start: int
    numel: int
    offset: int

    def of(self, masters: Sequence[Tensor] | Mapping[int, Tensor]) -> Tensor:
        """The fragment, flat, as a view of whatever has the masters' form."""
        return masters[self.master].view(-1)[self.start : self.start + self.numel]


def find_fragments(
    optimizer: Any, masters: Sequence[Tensor], parameters: dict[str, nn.Parameter], rank: int
) -> list[Fragment]:
    """This rank's fragments.

    Args:
        optimizer: DeepSpeed's, or torch's where DeepSpeed does not wrap it (stage 0 in fp32).
        masters: the fp32 tensors it updates.
        parameters: of the module, by name; frozen ones are in no optimizer and have no fragment.
    """
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return _of_partitions(optimizer, parameters, rank)
    if any(hasattr(parameter, "_hp_mapping") for parameter in parameters.values()):
        return _of_flat_groups(masters, parameters)
    return _of_whole_parameters(optimizer, masters, parameters)


def _of_partitions(optimizer: Any, parameters: dict[str, nn.Parameter], rank: int) -> list[Fragment]:
    names = {id(parameter): name for name, parameter in parameters.items()}
    found = []
    for group in optimizer.fp16_groups:
        for parameter in group:
            master, start, share = optimizer.grad_position[optimizer.get_param_id(parameter)]
            offset = rank * share
            numel = min(share, parameter.ds_numel - offset)  # the last ranks' shares may be padding
            if numel > 0:
                found.append(Fragment(names[id(parameter)], master, start, numel, offset))
    return found


def _of_flat_groups(masters: Sequence[Tensor], parameters: dict[str, nn.Parameter]) -> list[Fragment]:
    at = {master.untyped_storage().data_ptr(): number for number, master in enumerate(masters)}
    found = []
    for name, parameter in parameters.items():
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is not None:  # else none of it is on this rank
            master = at[mapping.hp_fragment.untyped_storage().data_ptr()]
            here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
            found.append(Fragment(name, master, here.start, here.numel, there.start))
    return found


def _of_whole_parameters(
    optimizer: Any, masters: Sequence[Tensor], parameters: dict[str, nn.Parameter]
) -> list[Fragment]:
    names = {id(parameter): name for name, parameter in parameters.items()}
    groups = getattr(optimizer, "fp16_groups", None) or [group["params"] for group in optimizer.param_groups]
    trained = [parameter for group in groups for parameter in group]
    return [
        Fragment(names[id(parameter)], number, 0, master.numel(), 0)
        for number, (parameter, master) in enumerate(zip(trained, masters, strict=True))
    ]
