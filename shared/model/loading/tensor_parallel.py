"""Divide a model among processes by transformers' own plan for its family: tensor parallelism.

The processes that hold one model together are a *team*. They run every forward pass together, on the same tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

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


def dividing(team: Team | None, device: torch.device) -> dict[str, Any]:
    """Return the arguments with which `from_pretrained` divides a model among a team.

    Raises:
        ModelError: this version of transformers cannot, or it would put the model on another kind of device.
    """
    if team is None:
        return {}
    try:
        from transformers.distributed.configuration_utils import DistributedConfig
    except ImportError:
        DistributedConfig = None
    if DistributedConfig is None or not {"tp_size", "dp_replicate_size", "dp_size"} <= set(dir(DistributedConfig)):
        raise ModelError("tensor_parallel needs a newer version of transformers: pip install -U transformers")
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None and accelerator.type != device.type:
        raise ModelError(
            f"transformers divides a model among this machine's devices of type {accelerator.type}, and device is "
            f"{device.type}; leave device out, or hide the others (CUDA_VISIBLE_DEVICES='')"
        )

    class Replicated(DistributedConfig):
        """A copy of the model per team. Copies that are not trained have no gradients to share: no FSDP joins them."""

        @property
        def dp_size(self) -> int:
            return 1

    return {"distributed_config": Replicated(tp_size=team.n, dp_replicate_size=team.n_teams)}
