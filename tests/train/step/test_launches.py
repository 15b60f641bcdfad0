"""How many operations a whole TopK step launches: ceilings, because each costs about 2 microseconds of an idle GPU."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor

from thresher.train.architectures import make_config
from thresher.train.architectures.contract import Batch
from thresher.train.kernels import triton as fused
from thresher.train.step.fused_step import FusedStep
from thresher.train.step.sae_trainer import SaeTrainer, Schedule
from thresher.train.stream.normalization import Normalization

from ...fake_cuda import DEVICE, fake_cuda

D_IN, D_SAE, BATCH, K = 768, 24_576, 4096, 32
WITHOUT_A_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "detach"}


class Launched(TorchDispatchMode):
    """Counts PyTorch's operations by name, apart from those that only make room or a view.

    Each counts once, though a sort takes several kernels.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, returns = func.overloadpacket.__name__, func._schema.returns
        is_view = bool(returns) and all(one.alias_info and not one.alias_info.is_write for one in returns)
        found = func(*args, **(kwargs or {}))
        tensors = found if isinstance(found, tuple | list) else [found]
        on_device = any(isinstance(tensor, Tensor) and tensor.device.type == "cuda" for tensor in tensors)
        if on_device and not is_view and name not in WITHOUT_A_KERNEL:
            self.names[name] += 1
        return found


def launched(monkeypatch: pytest.MonkeyPatch, n_dead: int, **options: Any) -> Counter[str]:
    """Return the operations and kernels of the first step of `SaeTrainer`, with AuxK for `n_dead` latents.

    Later steps do not set numbers of the host that have not changed: up to four operations fewer.
    """
    counted = Launched()

    def launch(self: Any, *args: Any, **kwargs: Any) -> None:
        counted.names[self.fn.__name__] += 1

    monkeypatch.setattr(GridExecutor, "__call__", launch)
    config = make_config(hook_point="x", architecture="topk", d_sae=D_SAE, k=K, dead_after_tokens=BATCH, **options)
    with fake_cuda():
        trainer = SaeTrainer(
            config=config,
            d_in=D_IN,
            normalization=Normalization(torch.zeros(D_IN), 1.0, float(D_IN)),
            schedule=Schedule(1000, BATCH, 1, 0.5),
            kernels=fused.Triton(),
            device=DEVICE,
        )
        assert isinstance(trainer.mode, FusedStep)
        if trainer.mode.dead is not None:
            trainer.mode.dead.n_dead, trainer.mode.dead.next_poll = n_dead, 1 << 60
        trainer._initialised = True
        x = torch.randn(BATCH, D_IN, device=DEVICE)
        batch = Batch(x, x.to(torch.bfloat16))
        with counted:
            trainer.step(batch)
    return counted.names


@pytest.mark.parametrize(
    ("n_dead", "options", "most"),
    [
        pytest.param(0, {"aux_coefficient": 0.0}, 22, id="plain"),
        pytest.param(0, {"aux_coefficient": 0.0, "clip_grad_norm": 1.0}, 24, id="clipped"),
        pytest.param(512, {}, 53, id="AuxK"),
        pytest.param(512, {"clip_grad_norm": 1.0}, 55, id="clipped, AuxK"),
    ],
)
def test_a_step_launches_no_more_than(monkeypatch, n_dead, options, most):
    names = launched(monkeypatch, n_dead, **options)
    assert names["update_kernel"] == (2 if "clip_grad_norm" in options else 1)
    assert names.total() <= most, dict(names.most_common())
