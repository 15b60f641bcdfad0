"""The configurations that come with the project are valid and fit what is harvested for them."""

from pathlib import Path

import pytest

from thresher.shared.config import load_config, read_toml
from thresher.shared.hook_points import canonical_hook_point
from thresher.train.architectures import make_architecture
from thresher.train.config import TrainConfig
from thresher.train.sweep import expand_sweep

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize("path", sorted((CONFIGS / "train").glob("*.toml")), ids=lambda path: path.stem)
def test_configuration_fits_its_harvest(path):
    config = load_config(TrainConfig, path, [])
    harvest = read_toml(CONFIGS / "harvest" / path.name)
    assert config.store == harvest["store"]
    assert config.output == f"{Path(config.store).parent}/saes"
    saes = expand_sweep(config.sae)
    for sae in saes:
        make_architecture(sae, 256)
    harvested = {canonical_hook_point(name) for name in harvest["hook_points"]}
    assert {sae.hook_point for sae in saes} <= harvested


def test_every_harvest_has_a_sweep():
    names = [sorted(path.name for path in (CONFIGS / stage).glob("*.toml")) for stage in ("harvest", "train")]
    assert names[0] == names[1]


def test_the_demo_trains_six_saes():
    saes = expand_sweep(load_config(TrainConfig, CONFIGS / "train" / "demo.toml", []).sae)
    assert [(sae.architecture, sae.k, sae.hook_point[-12:]) for sae in saes] == [
        ("topk", 16, "2.resid_post"),
        ("topk", 32, "2.resid_post"),
        ("topk", 64, "2.resid_post"),
        ("standard", None, "2.resid_post"),
        ("standard", None, "2.resid_post"),
        ("topk", 32, "1.resid_post"),
    ]
