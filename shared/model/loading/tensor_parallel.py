"""Divide a model among processes by transformers' own plan for its family: tensor parallelism.

The processes that hold one model together are a *team*. They run every forward pass together, on the same tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch.distributed.device_mesh import init_device_mesh

from ...core.compute.processes import Ranks
from ...core.errors import ModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class Team(Ranks):
    """The processes that hold one model together: team `number` of `n_teams`."""

    def __init__(self, rank: int, n: int, control: Any, lost: str, number: int, n_teams: int):
        super().__init__(rank, n, control, lost)
        self.number, self.n_teams = number, n_teams


def check_divides(config: PretrainedConfig, name: str, n: int) -> None:
    """Raise `ModelError` unless transformers can divide this model among `n` processes."""
    text: Any = config.get_text_config()
    if not getattr(text, "base_model_tp_plan", None):
        raise ModelError(
            f"'{name}' cannot be divided: transformers has no plan of tensor parallelism for models of type "
            f"{config.model_type}; leave tensor_parallel out, or spread the model over the GPUs of one process "
            "(device_map = 'auto')"
        )
    for key in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(text, key, None)
        if isinstance(heads, int) and heads % n:
            raise ModelError(
                f"'{name}' has {heads} {key.removeprefix('num_').replace('_', ' ')}, which {n} processes cannot share "
                "evenly; choose a tensor_parallel that divides them"
            )


@contextmanager
def dividing(team: Team | None, device: torch.device) -> Iterator[dict[str, Any]]:
    """Yield the arguments with which `from_pretrained`, called within this context, divides a model among a team.

    transformers expects the processes of one model to be all there are. With several teams it is given the mesh of one.
    """
    if team is None:
        yield {}
        return
    try:
        from transformers.distributed import mixin
        from transformers.distributed.configuration_utils import DistributedConfig
        from transformers.distributed.utils import TransformersDeviceMesh
    except ImportError:
        DistributedConfig = mixin = TransformersDeviceMesh = None
    if DistributedConfig is None or "tp_size" not in inspect.signature(DistributedConfig).parameters:
        raise ModelError("tensor_parallel needs a newer version of transformers: pip install -U transformers")

    def own_mesh(config: Any) -> tuple[torch.device, Any]:
        meshes = []
        for third, fourth, names in (
            (1, team.n, ("pp", "dp_replicate", "fsdp", "tp")),
            (team.n, 1, ("pp", "dp_replicate", "efsdp", "ep")),
        ):
            shape = (team.n_teams, 1, 1, third, fourth)
            meshes.append(init_device_mesh(device.type, shape, mesh_dim_names=("team", *names))[names])
        return device, TransformersDeviceMesh(*meshes)  # pyright: ignore[reportOptionalCall]

    with patch.object(mixin, "initialize_distributed_mesh", own_mesh):
        yield {"distributed_config": DistributedConfig(tp_size=team.n)}
