"""The names of `thresher` itself: what they are, and that none costs an import before it is used."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import thresher

STAGES = ("harvest", "train", "evaluate")


def in_child(code):
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_importing_thresher_imports_nothing_else():
    code = (
        "import json, sys; before = set(sys.modules); import thresher; "
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    new = in_child(code)
    assert [name for name in new if name.startswith("thresher")] == ["thresher"]
    assert len(new) < 20
    assert not {"torch", "numpy", "msgspec"} & set(new)


def test_every_public_name_is_what_its_module_defines():
    from thresher.evaluate.config import EvaluateConfig
    from thresher.harvest.config import HarvestConfig
    from thresher.shared.core.errors import ThresherError
    from thresher.shared.intervene.edits import Ablate, Add, Clamp, Fires, Orthogonal, ProjectionCap, Scale
    from thresher.shared.intervene.metrics import KLDivergence, LogitDifference, LogProbability
    from thresher.shared.intervene.sae_model import SaeModel
    from thresher.shared.sae import Sae
    from thresher.shared.store import ActivationStore, ActivationStoreWriter
    from thresher.train.config import TrainConfig
    from thresher.train.stream.batches import ShuffledBatches

    classes = (
        ActivationStore,
        ActivationStoreWriter,
        EvaluateConfig,
        HarvestConfig,
        Sae,
        SaeModel,
        ShuffledBatches,
        ThresherError,
        TrainConfig,
        *(Ablate, Add, Clamp, Fires, Orthogonal, ProjectionCap, Scale),
        *(KLDivergence, LogitDifference, LogProbability),
    )
    for cls in classes:
        assert getattr(thresher, cls.__name__) is cls
    assert {cls.__name__ for cls in classes} | {*STAGES, "__version__"} == set(thresher.__all__) == set(dir(thresher))
    with pytest.raises(AttributeError, match="no attribute 'Sea'"):
        thresher.Sea  # noqa: B018


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_is_a_package_and_its_function(stage):
    code = f"""
import json
from thresher import {stage}
import thresher.{stage}
from thresher.{stage} import {stage} as function
from thresher.shared.core.errors import ThresherError
config = getattr(thresher, "{stage.capitalize()}Config")
found = []
for call in ({stage}, thresher.{stage}, function):
    try:
        call(config(**json.loads('''{json.dumps(MISSING[stage])}''')))
    except ThresherError as error:
        found.append(str(error))
print(json.dumps(found))
"""
    found = in_child(code)
    assert len(found) == 3
    assert len(set(found)) == 1
    assert "no-such" in found[0]


MISSING = {
    "harvest": {
        "model": "./no-such-model",
        "dataset": "./no-such-text",
        "hook_points": ["a"],
        "store": "s",
        "tokens": 8,
    },
    "train": {"store": "./no-such-store", "output": "o", "sae": [{"hook_point": "a", "d_sae": 4, "k": 1}]},
    "evaluate": {"store": "./no-such-store", "saes": "./no-such-saes", "output": "o"},
}
