"""Grids expand to named configurations."""

import pytest

from thresher.shared.errors import ConfigError
from thresher.train.config import SaeConfig
from thresher.train.sweep import expand_sweep

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
    assert expand_sweep([SaeConfig(**BASE, k=4, name="x")])[0].name == "x"


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ([{"k": 4}, {"k": 4}], "two SAEs are named"),
        ([{"k": 4, "name": "{banana}"}], "uses an unknown key"),
        ([{"k": 0}], "k"),
        ([{"kk": 4}], "unknown key 'kk'"),
    ],
)
def test_errors(tables, message):
    with pytest.raises(ConfigError, match=message):
        names(*tables)
