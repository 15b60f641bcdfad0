"""The configurations that come with the project are valid and fit what is harvested for them."""

import re
import tomllib
from pathlib import Path

import numpy as np
import pytest

from thresher.shared.core.config import load_config, read_toml
from thresher.shared.core.errors import ConfigError
from thresher.shared.model.hook_points import canonical_hook_point
from thresher.train.architectures import ARCHITECTURES, make_architecture
from thresher.train.config import TrainConfig
from thresher.train.sweep.grids import expand_sweep

CONFIGS = Path(__file__).parents[2] / "configs"
SECOND_SWEEPS = {"mixed.toml": "demo.toml"}
"""Sweeps over the store that another configuration harvests."""


@pytest.mark.parametrize("path", sorted((CONFIGS / "train").glob("*.toml")), ids=lambda path: path.stem)
def test_configuration_fits_its_harvest(path):
    config = load_config(TrainConfig, path, [])
    harvest = read_toml(CONFIGS / "harvest" / SECOND_SWEEPS.get(path.name, path.name))
    assert config.store == harvest["store"]
    assert config.output == f"{Path(config.store).parent}/{path.stem if path.name in SECOND_SWEEPS else 'saes'}"
    saes = expand_sweep(config.sae)
    for sae in saes:
        make_architecture(sae, 256)
    harvested = {canonical_hook_point(name) for name in harvest["hook_points"]}
    assert {place for sae in saes for place in sae.wiring.hook_points} <= harvested


def test_every_harvest_has_a_sweep():
    names = [sorted(path.name for path in (CONFIGS / stage).glob("*.toml")) for stage in ("harvest", "train")]
    assert names[0] == [name for name in names[1] if name not in SECOND_SWEEPS]


def test_the_demo_trains_six_saes():
    saes = expand_sweep(load_config(TrainConfig, CONFIGS / "train" / "demo.toml", []).sae)
    assert [(sae.architecture, getattr(sae, "k", None), sae.hook_point[-12:]) for sae in saes] == [
        ("topk", 16, "2.resid_post"),
        ("topk", 32, "2.resid_post"),
        ("topk", 64, "2.resid_post"),
        ("standard", None, "2.resid_post"),
        ("standard", None, "2.resid_post"),
        ("topk", 32, "1.resid_post"),
    ]


def test_the_mixed_sweep_has_saes_of_every_architecture():
    saes = expand_sweep(load_config(TrainConfig, CONFIGS / "train" / "mixed.toml", []).sae)
    assert len(saes) == 15
    assert {sae.architecture for sae in saes} == set(ARCHITECTURES)


def test_every_architecture_has_a_page_whose_examples_are_valid():
    docs = CONFIGS.parent / "docs/architectures"
    assert {page.stem for page in docs.glob("*.md")} == {"README", "cross_layer_transcoder", *ARCHITECTURES}
    for page in docs.glob("*.md"):
        examples = re.findall(r"```toml\n(.*?)```", page.read_text(), re.DOTALL)
        assert examples, page.name
        for example in examples:
            for sae in expand_sweep(tomllib.loads(example)["sae"]):
                assert page.stem in ("README", "cross_layer_transcoder" if sae.cross_layer else sae.architecture)
                make_architecture(sae, 256)


@pytest.mark.parametrize(
    "wrong",
    [
        {"normalize_activations": "layer_norm"},
        {"tokens": -5},
        {"batch_size": 0},
        {"epochs": float("nan")},
        {"sae": []},
        {"output": ""},
    ],
)
def test_a_configuration_made_in_python_is_checked(wrong):
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))}: expected"):
        TrainConfig(**{"store": "s", "output": "o", "sae": [{"hook_point": "h", "d_sae": 8, "k": 2}]} | wrong)


def test_a_configuration_made_in_python_takes_paths_and_numpy_numbers():
    table = {"hook_point": "h", "d_sae": np.int64(8), "k": np.array([2, 3]), "lr": np.float64(0.5)}
    config = TrainConfig(store=Path("a/s"), output=Path("o"), sae=[table], tokens=np.int64(1280))
    plain = {"hook_point": "h", "d_sae": 8, "k": [2, 3], "lr": 0.5}
    assert config == TrainConfig(store="a/s", output="o", sae=[plain], tokens=1280)
    assert [sae.k for sae in expand_sweep(config.sae)] == [2, 3]
