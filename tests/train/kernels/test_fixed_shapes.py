"""With the fused kernels, steps of every architecture ask the device for nothing, and train what the references do."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import thresher.train.looks as looks_module
import thresher.train.sae_trainer as trainer_module
import thresher.train.step_graphs as graphs_module
from thresher.train.architectures import ARCHITECTURES
from thresher.train.architectures.base import Batch
from thresher.train.architectures.latents import SparseLatents
from thresher.train.config import SaeConfig
from thresher.train.kernels import fused, reference
from thresher.train.looks import DeadLook, EntryRoom
from thresher.train.normalization import Normalization
from thresher.train.sae_trainer import SaeTrainer, Schedule, read_metrics

D_IN, D_SAE, BATCH, N_STEPS = 12, 24, 4, 7
ASKING = ("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh", "_unique2", "equal", "is_nonzero")

RECIPES = {
    "topk": {"k": 3, "unit_norm_decoder": False},
    "batch_topk": {"k": 3},
    "matryoshka_batch_topk": {"k": 3, "prefix_sizes": (8, 24)},
    "hierarchical_topk": {"k": 2},
    "standard": {"l1_coefficient": 0.3, "clip_grad_norm": 1.0},
    "gated": {"l1_coefficient": 0.3},
    "jumprelu": {"l0_coefficient": 0.05},
    "skip_transcoder": {"l1_coefficient": 0.3, "hook_point_out": "y"},
    "crosscoder": {"l1_coefficient": 0.3, "hook_point": "x", "hook_points": ("x", "y")},
}
SLOW = ("topk", "hierarchical_topk", "matryoshka_batch_topk", "standard", "gated", "crosscoder")


class AskNothing(TorchDispatchMode):
    """Refuse every operation that on a GPU would wait for the device or whose shape only the device knows."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if name in ASKING or by_mask:
            raise AssertionError(f"the step asks the device: {name}")
        return function(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def _seldom_used_sizes(monkeypatch):
    """Look every two steps, make room for few entries, let latents be sparse at any density, and capture at once."""
    monkeypatch.setattr(looks_module, "_STEPS_BETWEEN", 2)
    monkeypatch.setattr(looks_module, "_LEAST_CAPACITY", 16)
    monkeypatch.setattr(trainer_module, "SPARSE_BELOW", 1.1)
    monkeypatch.setattr(graphs_module, "_EAGER_STEPS", 1)


def make_trainer(name, kernels, capture=None, **changes):
    table = {
        "hook_point": "x",
        "architecture": name,
        "d_sae": D_SAE,
        "lr": 1e-2,
        "k_aux": 5,
        "dead_after_tokens": BATCH,
    }
    config = SaeConfig(**table | RECIPES[name] | changes)
    out = Normalization(torch.zeros(D_IN), 1.0, float(D_IN)) if "hook_point_out" in RECIPES[name] else None
    normalization = Normalization(torch.zeros(D_IN), 1.0, float(D_IN), out)
    schedule = Schedule(N_STEPS, BATCH, 1, 0.5)
    return SaeTrainer(config, D_IN, normalization, schedule, kernels, torch.float32, "cpu", capture=capture)


def batch_at(step, name="topk"):
    generator = torch.Generator().manual_seed(step)
    x, y = (torch.randn(BATCH, D_IN, generator=generator) for _ in range(2))
    return Batch(x, x, y if "hook_point_out" in RECIPES[name] else None)


def train(trainer, name, n_steps=N_STEPS):
    return [read_metrics(trainer.step(batch_at(step, name))) for step in range(trainer.steps_done, n_steps)]


@pytest.fixture
def _large_eps(monkeypatch):
    """Far from Adam's own, with which the last bit of a gradient near zero decides which way a weight goes."""
    for cls in ARCHITECTURES.values():
        monkeypatch.setattr(cls, "eps", 1e-3)


def captured_quietly(asked):
    """Return what stands for a capture: the step, as it is replayed, must ask the device for nothing."""

    def capture(run):
        def replay():
            asked.append(None)
            with AskNothing():
                run()

        return replay

    return capture


@pytest.mark.usefixtures("_large_eps")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long if name in SLOW else ()) for name in RECIPES]
)
def test_replayed_steps_ask_for_nothing_and_train_what_the_references_do(name):
    expected = make_trainer(name, reference)
    train(expected, name)
    replayed = []
    trainer = make_trainer(name, fused, captured_quietly(replayed))
    trainer.waits = False
    metrics = train(trainer, name)
    trainer.check()
    assert trainer.diverged is None
    assert len(replayed) >= 2, "steps whose shapes have settled are replayed"
    assert metrics[-1].get("skipped_steps", 0) == 0
    for parameter, tensor in expected.parameters.items():
        torch.testing.assert_close(trainer.parameters[parameter], tensor, rtol=2e-3, atol=2e-4, msg=parameter)
    for buffer, tensor in expected.buffers.items():
        torch.testing.assert_close(trainer.buffers[buffer], tensor, rtol=1e-4, atol=1e-5, msg=buffer)


def test_a_resumed_run_looks_where_the_whole_one_did_and_ends_in_the_same_bits():
    whole = make_trainer("jumprelu", fused)
    # The first look falls on the first step after the cut.
    train(whole, "jumprelu", 2)
    saved = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    train(whole, "jumprelu", 4)
    assert whole.room.capacity
    resumed = make_trainer("jumprelu", fused)
    resumed.load_state_dict(saved)
    train(resumed, "jumprelu", 4)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


def test_a_step_that_is_not_certified_changes_no_weight_and_the_next_look_is_exact(monkeypatch):
    """A floor above everything leaves fewer candidates than the batch wants."""
    trainer = make_trainer("batch_topk", fused)
    monkeypatch.setattr(fused, "batch_floor", lambda *arguments: torch.tensor(1e9))
    before = {name: tensor.clone() for name, tensor in trainer.parameters.items()}
    assert [metrics["skipped_steps"] for metrics in train(trainer, "batch_topk", 2)] == [1, 2]
    for name, tensor in before.items():
        torch.testing.assert_close(trainer.parameters[name], tensor, rtol=1e-6, atol=0, msg=name)
    assert trainer.optimizer.steps["W_enc"] == 0
    train(trainer, "batch_topk", 3)
    assert (trainer.room.exact, trainer.room.margin) == (True, 2)
    assert trainer.optimizer.steps["W_enc"] == 1
    assert not torch.equal(trainer.parameters["W_enc"], before["W_enc"])


def test_dead_latents_are_looked_for_only_when_there_can_be_some():
    since, look = torch.tensor([0, 3, 10, -500, -500]), DeadLook(dead_after_tokens=45)
    found = []
    for step in range(8):
        was = look.look_at
        found.append(look.before(step, 10, since + 10 * step))
        assert (look.look_at != was) is (step in (0, 4, 6)), step
    # At step 4 the third is dead and before step 6 the first two may be: three, of which a power of two is made.
    assert found == [0] * 4 + [4] * 4
    again = DeadLook(45)
    again.load(look.state())
    assert (again.n_dead, again.look_at) == (4, 8)
    again.load(None)
    assert (again.n_dead, again.look_at) == (0, 0)


def test_room_grows_with_what_is_found_and_is_given_up_where_dense_is_cheaper():
    room = EntryRoom(torch.device("cpu"))
    room.before(0, 1000)
    room.counted(20)
    room.before(2, 1000)
    assert (room.capacity, room.waited) == (64, False)
    room.found(torch.tensor(65))
    assert (float(room.failed), int(room.skipped)) == (1, 1)
    room.before(3, 1000)
    assert room.capacity == 64
    room.before(16, 1000)
    assert (room.capacity, room.exact) == (256, True)
    room.found(torch.tensor(200))
    assert float(room.failed) == 0
    room.before(32, 1000)
    assert (room.capacity, room.exact) == (512, False)
    room.found(torch.tensor(20))
    state = room.state()
    room.before(48, 1000)
    assert room.capacity == 64
    again = EntryRoom(torch.device("cpu"))
    again.load(state)
    assert torch.equal(again.state(), state)
    again.found(torch.tensor(1001))
    again.before(48, 1000)
    assert again.capacity is None


def test_a_part_of_the_latents_is_the_same_in_room_of_a_fixed_size():
    generator = torch.Generator().manual_seed(0)
    pre_acts, indices = torch.randn(9, generator=generator), torch.tensor([0, 4, 5, 2, 3, 7, 1, 0, 0])
    exact = SparseLatents(reference, pre_acts[:7], indices[:7], torch.tensor([0, 3, 3, 7]), 8)
    roomy = SparseLatents(reference, pre_acts, indices, torch.tensor([0, 3, 3, 7]), 8, fixed=True)
    for bounds in ((0, 2), (2, 6), (6, 8), (0, 8)):
        (part, chosen), (wide, chosen_wide) = exact.columns(*bounds), roomy.columns(*bounds)
        n = len(part.indices)
        assert torch.equal(wide.offsets, part.offsets)
        for name in ("indices", "pre_acts"):
            assert torch.equal(getattr(wide, name)[:n], getattr(part, name)), name
        assert chosen_wide.tolist() == chosen.tolist() + [9] * (9 - n)
        assert (wide.pre_acts[n:] < -1e19).all()
        assert (wide.indices[n:] == 0).all()
