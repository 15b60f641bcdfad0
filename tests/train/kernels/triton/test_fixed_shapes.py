"""With the fused kernels, steps of every architecture never wait for the device, and train the reference's weights."""

from __future__ import annotations

import pytest
import torch

import thresher.train.kernels.capacity as capacity_module
import thresher.train.kernels.triton.select as select_module
import thresher.train.step.host_polls as polls_module
import thresher.train.step.step_graphs as graphs_module
from thresher.train.architectures import Architecture, make_architecture, make_config
from thresher.train.architectures.contract import Batch
from thresher.train.architectures.parts.latents import SparseLatents
from thresher.train.kernels import triton as fused
from thresher.train.kernels.capacity import EntryCapacity
from thresher.train.kernels.reference import Reference
from thresher.train.step.host_polls import DeadLatentPoll
from thresher.train.step.sae_trainer import SaeTrainer, Schedule
from thresher.train.step.step_numbers import DeviceNumbers, read_metrics
from thresher.train.stream.normalization import Normalization

D_IN, D_SAE, BATCH, N_STEPS = 12, 24, 4, 7

ANNEALED = {"k_anneal_steps": 2, "multi_topk_coefficient": 0.25}
RECIPES = {
    "whole_topk": {"architecture": "topk", "k": 3, "clip_grad_norm": 1.0},
    "topk": {"k": 3, "unit_norm_decoder": False},
    "annealed_topk": {"architecture": "topk", "k": 1, "aux_coefficient": 0.0} | ANNEALED,
    "batch_topk": {"k": 3},
    "matryoshka_batch_topk": {"k": 3, "prefix_sizes": (8, 24)},
    "hierarchical_topk": {"k": 2},
    "standard": {"l1_coefficient": 0.3, "clip_grad_norm": 1.0},
    "p_annealed": {"architecture": "standard", "l1_coefficient": 0.3, "p_final": 0.4, "p_anneal_steps": 6},
    "gated": {"l1_coefficient": 0.3},
    "jumprelu": {"l0_coefficient": 0.05, "sparsity_warmup_steps": 6},
    "tanh_jumprelu": {"architecture": "jumprelu", "l0_coefficient": 0.05, "sparsity_loss": "tanh", "bandwidth": 0.2},
    "skip_transcoder": {"l1_coefficient": 0.3, "hook_point_out": "y"},
    "crosscoder": {"l1_coefficient": 0.3, "hook_point": "x", "hook_points": ("x", "y")},
}
QUICK = ("annealed_topk", "batch_topk", "p_annealed", "tanh_jumprelu", "skip_transcoder")


@pytest.fixture(autouse=True)
def _seldom_used_sizes(monkeypatch):
    """Poll every two steps, with a small capacity, sparse latents at any density, and captures at once."""
    for module in (capacity_module, polls_module):
        monkeypatch.setattr(module, "STEPS_BETWEEN", 2)
    monkeypatch.setattr(capacity_module, "_LEAST_CAPACITY", 16)
    monkeypatch.setattr(polls_module, "SPARSE_BELOW", 1.1)
    monkeypatch.setattr(graphs_module, "_EAGER_STEPS", 1)
    monkeypatch.setattr(select_module, "MAX_K", 4)


def make_trainer(name, kernels, capture=None, numbers=None, **changes):
    table = {
        "hook_point": "x",
        "architecture": name,
        "d_sae": D_SAE,
        "lr": 1e-2,
        "dead_after_tokens": BATCH,
    }
    if "k" in RECIPES[name]:
        table["k_aux"] = 5
    config = make_config(**table | RECIPES[name] | changes)
    out = Normalization(torch.zeros(D_IN), 1.0, float(D_IN)) if "hook_point_out" in RECIPES[name] else None
    normalization = Normalization(torch.zeros(D_IN), 1.0, float(D_IN), out)
    schedule = Schedule(N_STEPS, BATCH, 1, 0.5)
    return SaeTrainer(
        config=config,
        d_in=D_IN,
        normalization=normalization,
        schedule=schedule,
        kernels=kernels,
        compute_dtype=torch.float32,
        capture=capture,
        numbers=numbers,
    )


def batch_at(step, name="topk"):
    generator = torch.Generator().manual_seed(step)
    x, y = (torch.randn(BATCH, D_IN, generator=generator) for _ in range(2))
    return Batch(x, x, y if "hook_point_out" in RECIPES[name] else None)


def train(trainer, name, n_steps=N_STEPS):
    return [read_metrics(trainer.step(batch_at(step, name))) for step in range(trainer.steps_done, n_steps)]


@pytest.fixture
def _large_eps(monkeypatch):
    """Far from Adam's own, with which the last bit of a gradient near zero decides which way a weight goes."""
    classes = [Architecture]
    for cls in classes:
        classes += cls.__subclasses__()
        monkeypatch.setattr(cls, "eps", 1e-3)


@pytest.mark.usefixtures("_large_eps")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.long) for name in RECIPES]
)
def test_replayed_steps_ask_for_nothing_and_train_what_the_references_do(taped, name):
    expected = make_trainer(name, Reference())
    train(expected, name)
    numbers = DeviceNumbers(float(D_IN), torch.device("cpu"))
    trainer = make_trainer(name, fused.Triton(), taped.capture, numbers)
    metrics = train(trainer, name)
    trainer.check()
    assert trainer.diverged is None
    assert len(taped) >= 2, "steps whose shapes have settled are replayed"
    assert metrics[-1].get("skipped_steps", 0) == 0
    for parameter, tensor in expected.parameters.items():
        torch.testing.assert_close(trainer.parameters[parameter], tensor, rtol=2e-3, atol=2e-4, msg=parameter)
    for buffer, tensor in expected.buffers.items():
        torch.testing.assert_close(trainer.buffers[buffer], tensor, rtol=1e-4, atol=1e-5, msg=buffer)


@pytest.mark.parametrize(("steps", "decided"), [(10, [None, None, 2]), (5 * 256, [7, 6, 2])])
def test_a_step_is_captured_for_each_k_that_lasts(steps, decided):
    """K falls from 7 to 2: in ten steps too fast to capture any, in 1,280 each k lasts for 256."""
    config = make_config(hook_point="x", d_sae=D_SAE, k=2, k_anneal_steps=steps)
    architecture = make_architecture(config, d_in=7)
    assert [architecture.decided_at(done) for done in (0, steps // 5, steps)] == decided
    assert architecture.capturable


def test_a_resumed_run_looks_where_the_whole_one_did_and_ends_in_the_same_bits():
    whole = make_trainer("jumprelu", fused.Triton())
    # The first look falls on the first step after the cut.
    train(whole, "jumprelu", 2)
    saved = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    train(whole, "jumprelu", 4)
    assert whole.mode.parts.polls.room.capacity
    resumed = make_trainer("jumprelu", fused.Triton())
    resumed.load_state_dict(saved)
    train(resumed, "jumprelu", 4)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


def test_a_step_that_is_not_certified_changes_no_weight_and_the_next_look_is_exact(monkeypatch):
    """A floor above everything leaves fewer candidates than the batch wants."""
    trainer = make_trainer("batch_topk", fused.Triton())
    monkeypatch.setattr(fused.TritonFixedShapes, "batch_floor", lambda *arguments: torch.tensor(1e9))
    before = {name: tensor.clone() for name, tensor in trainer.parameters.items()}
    assert [metrics["skipped_steps"] for metrics in train(trainer, "batch_topk", 2)] == [1, 2]
    for name, tensor in before.items():
        torch.testing.assert_close(trainer.parameters[name], tensor, rtol=1e-6, atol=0, msg=name)
    optimizer, room = trainer.mode.optimizer, trainer.mode.parts.polls.room
    assert optimizer.steps["W_enc"] == 0
    train(trainer, "batch_topk", 3)
    assert (room.exact, room.margin) == (True, 2)
    assert optimizer.steps["W_enc"] == 1
    assert not torch.equal(trainer.parameters["W_enc"], before["W_enc"])


def test_dead_latents_are_polled_only_when_there_can_be_some():
    since, poll = torch.tensor([0, 3, 10, -500, -500]), DeadLatentPoll(dead_after_tokens=45)
    found = []
    for step in range(8):
        was = poll.next_poll
        found.append(poll.before(step, 10, since + 10 * step))
        assert (poll.next_poll != was) is (step in (0, 4, 6)), step
    # At step 4 the third is dead and before step 6 the first two may be: three, of which a power of two is made.
    assert found == [0] * 4 + [4] * 4
    again = DeadLatentPoll(45)
    again.load(poll.state())
    assert (again.n_dead, again.next_poll) == (4, 8)
    again.load(None)
    assert (again.n_dead, again.next_poll) == (0, 0)


def test_room_grows_with_what_is_found_and_is_given_up_where_dense_is_cheaper():
    room = EntryCapacity(torch.device("cpu"))
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
    again = EntryCapacity(torch.device("cpu"))
    again.load(state)
    assert torch.equal(again.state(), state)
    again.found(torch.tensor(1001))
    again.before(48, 1000)
    assert again.capacity is None


def test_a_part_of_the_latents_is_the_same_in_room_of_a_fixed_size():
    generator = torch.Generator().manual_seed(0)
    pre_acts, indices = torch.randn(9, generator=generator), torch.tensor([0, 4, 5, 2, 3, 7, 1, 0, 0])
    exact = SparseLatents(Reference(), pre_acts[:7], indices[:7], torch.tensor([0, 3, 3, 7]), 8)
    roomy = SparseLatents(Reference(), pre_acts, indices, torch.tensor([0, 3, 3, 7]), 8, fixed=True)
    for bounds in ((0, 2), (2, 6), (6, 8), (0, 8)):
        (part, chosen), (wide, chosen_wide) = exact.columns(*bounds), roomy.columns(*bounds)
        n = len(part.indices)
        assert torch.equal(wide.offsets, part.offsets)
        for name in ("indices", "pre_acts"):
            assert torch.equal(getattr(wide, name)[:n], getattr(part, name)), name
        assert chosen_wide.tolist() == chosen.tolist() + [9] * (9 - n)
        assert (wide.pre_acts[n:] < -1e19).all()
        assert (wide.indices[n:] == 0).all()
