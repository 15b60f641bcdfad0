"""Grids expand to named configurations."""

import numpy as np
import pytest

from thresher.shared.core.errors import ConfigError
from thresher.train.architectures import make_config
from thresher.train.sweep.grids import expand_sweep

BASE = {"hook_point": "blocks.2.hook_resid_post", "d_sae": 64}


def names(*tables):
    return [sae.name for sae in expand_sweep([BASE | table for table in tables])]


def test_lists_expand_as_a_grid():
    saes = expand_sweep([BASE | {"k": [4, 8], "lr": [1e-3, 3e-3]}])
    assert [(sae.k, sae.lr) for sae in saes] == [(4, 1e-3), (4, 3e-3), (8, 1e-3), (8, 3e-3)]
    assert {sae.hook_point for sae in saes} == {"blocks.2.resid_post"}


def test_names_tell_the_saes_apart():
    assert names({"k": 4}) == ["topk-blocks.2.resid_post-64-k4"]
    assert names({"k": [4], "seed": [0, 1]}) == [f"topk-blocks.2.resid_post-64-k4-seed{seed}" for seed in (0, 1)]
    assert names({"k": [4, 8], "name": "t{k}"}) == ["t4", "t8"]
    assert names({"k": [4, 8], "name": "t"}) == ["t-k4", "t-k8"]
    assert names({"k": 4, "name": "a/../b c"}) == ["a_.._b_c"]


def test_configurations_are_accepted_too():
    assert expand_sweep([make_config(**BASE, k=4, name="x")])[0].name == "x"


def test_random_search_draws_the_same_values_each_time():
    """Between the bounds, log-uniform ones evenly over orders of magnitude; grids go on inside each sample."""
    table = BASE | {"samples": 200, "lr": {"log_uniform": [1e-5, 1e-1]}, "k": {"uniform": [4, 12]}}
    table |= {"aux_coefficient": {"choice": [0.0, 0.5]}, "beta2": {"uniform": [0.9, 0.999]}}
    saes = expand_sweep([table])
    assert saes == expand_sweep([table])
    assert len({sae.name for sae in saes}) == len(saes) == 200
    assert saes[7].name == f"topk-blocks.2.resid_post-64-k{saes[7].k}-7"
    lrs = np.log10([sae.lr for sae in saes])
    assert (lrs.min() > -5) & (lrs.max() < -1)
    assert np.histogram(lrs, 4, (-5, -1))[0].min() > 30
    assert {sae.k for sae in saes} == set(range(4, 13))
    assert {sae.aux_coefficient for sae in saes} == {0.0, 0.5}
    assert np.corrcoef(lrs, [sae.k for sae in saes])[0, 1] < 0.2
    assert [sae.lr for sae in expand_sweep([table | {"samples": 5}])] == [sae.lr for sae in saes[:5]]
    other = expand_sweep([table | {"sample_seed": 1}])
    assert not {sae.lr for sae in other} & {sae.lr for sae in saes}
    grid = expand_sweep([BASE | {"samples": 3, "lr": {"uniform": [1, 2]}, "k": [4, 8], "name": "a"}])
    assert [sae.name for sae in grid] == [f"a-k{k}-{i}" for i in range(3) for k in (4, 8)]
    assert grid[0].lr == grid[1].lr != grid[2].lr


def test_keys_that_take_integers_draw_whole_numbers():
    """Also those that only one architecture has; keys that take numbers draw fractions."""
    drawn = {"uniform": [1, 100]}
    table = BASE | {"k": 4, "samples": 20, "k_anneal_steps": drawn, "dead_after_tokens": drawn, "clip_grad_norm": drawn}
    saes = expand_sweep([table])
    assert len({sae.k_anneal_steps for sae in saes}) > 10
    assert all(type(sae.k_anneal_steps) is type(sae.dead_after_tokens) is int for sae in saes)
    assert any(sae.clip_grad_norm % 1 for sae in saes)


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ([{"k": 4}, {"k": 4}], "two SAEs are named"),
        ([{"k": 4, "name": "{banana}"}], "uses an unknown key"),
        ([{"k": 0}], "k"),
        ([{"kk": 4}], "unknown key 'kk'"),
        ([{"k": {"uniform": [4, 8]}}], "'k' is drawn at random; give samples = N, got None"),
        ([{"k": 4, "samples": 3}], "'samples' is given, but no value is drawn"),
        ([{"k": 4, "sample_seed": 3}], "sample_seed is 3, expected an integer, because values are drawn at random"),
        ([{"k": {"unifrom": [4, 8]}, "samples": 3}], "did you mean 'uniform'"),
        ([{"k": 4, "lr": {"log_uniform": [0, 1]}, "samples": 3}], "expected bounds above 0"),
        ([{"k": {"uniform": [8, 4]}, "samples": 3}], r"expected \[lowest, highest\]"),
        ([{"k": {"choice": []}, "samples": 3}], "expected a list"),
        ([{"k": {"choice": ["a"]}, "samples": 3}], "k"),
    ],
)
def test_errors(tables, message):
    with pytest.raises(ConfigError, match=message):
        names(*tables)


READS, WRITES = "blocks.1.mlp_in", "blocks.1.mlp_out"
TRANSCODER = {"architecture": "transcoder", "l1_coefficient": 1.0, "k": None}


@pytest.mark.parametrize(
    ("table", "reads", "writes", "kind"),
    [
        ({"hook_point": "blocks.2.hook_resid_post"}, ("blocks.2.resid_post",), ("blocks.2.resid_post",), "sae"),
        ({"reads": READS, "writes": "blocks.1.hook_mlp_out"}, (READS,), (WRITES,), "transcoder"),
        ({"reads": [READS], "writes": [WRITES], "skip": True}, (READS,), (WRITES,), "transcoder"),
        ({"hook_points": ["a", "b"]}, ("a", "b"), ("a", "b"), "crosscoder"),
        ({"reads": ["a", "b"], "writes": ["a", "b"]}, ("a", "b"), ("a", "b"), "crosscoder"),
        ({"reads": ["a", "b"], "writes": ["c", "d", "e"]}, ("a", "b"), ("c", "d", "e"), "crosscoder"),
        ({"reads": "a", "writes": ["a", "b"]}, ("a",), ("a", "b"), "crosscoder"),
        (TRANSCODER | {"hook_point": READS, "hook_point_out": WRITES}, (READS,), (WRITES,), "transcoder"),
    ],
)
def test_what_is_read_and_written(table, reads, writes, kind):
    """However it is spelled; the first hook point that is read is `hook_point`, and expanding again changes nothing."""
    (sae,) = expand_sweep([{"d_sae": 64, "k": 4} | table])
    assert (sae.wiring.reads, sae.wiring.writes, sae.wiring.kind) == (reads, writes, kind)
    assert sae.wiring.skip == table.get("skip", False)
    assert sae.hook_point == reads[0]
    assert expand_sweep([sae]) == [sae]


def test_a_skip_path_is_in_the_name():
    """Once: two tables that differ in it need no names of their own, and a grid over it is named as any other."""
    tables = [{"d_sae": 64, "k": 4, "reads": "a", "writes": "b", "skip": skip} for skip in (False, True, [False, True])]
    assert [sae.name for sae in expand_sweep(tables)] == [
        "topk-a-b-64-k4",
        "topk-a-b-64-skip-k4",
        "topk-a-b-64-k4-skipFalse",
        "topk-a-b-64-k4-skipTrue",
    ]


def test_lists_of_lists_of_hook_points_are_grids():
    saes = expand_sweep([{"d_sae": 64, "k": 4, "reads": [["a"], ["b", "c"]], "writes": [["d"], ["e"]]}])
    assert [(sae.wiring.reads, sae.wiring.writes) for sae in saes] == [
        (("a",), ("d",)),
        (("a",), ("e",)),
        (("b", "c"), ("d",)),
        (("b", "c"), ("e",)),
    ]
    assert [sae.name for sae in saes] == ["topk-a-d-64-k4", "topk-a-e-64-k4", "topk-b+c-d-64-k4", "topk-b+c-e-64-k4"]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"reads": "a"}, "'reads' is given without 'writes'"),
        ({"hook_point": "a", "writes": "b"}, "'writes' is given without 'reads'"),
        ({"hook_point": "a", "reads": "b", "writes": "c"}, "the first of reads is 'b'; leave hook_point out"),
        ({"hook_points": ["a", "b"], "reads": "a", "writes": "c"}, "leave 'hook_points' out"),
        ({"reads": "a", "writes": "b", "hook_point_out": "c"}, "leave 'hook_point_out' out"),
        ({"reads": [], "writes": "b"}, "reads is empty"),
        ({"reads": ["a", "b", "a"], "writes": "c"}, "reads has 'a' twice"),
        ({"reads": "a", "writes": ["blocks.0.mlp_out", "blocks.0.hook_mlp_out"]}, "mlp_out' twice"),
        ({"hook_point": "a", "skip": True}, "'a' is both read and written, so a skip path would copy it"),
        ({"reads": ["a", 3], "writes": "b"}, "expected text or a list"),
    ],
)
def test_places_that_contradict_each_other_are_refused(table, message):
    with pytest.raises(ConfigError, match=message):
        expand_sweep([{"d_sae": 64, "k": 4} | table])
