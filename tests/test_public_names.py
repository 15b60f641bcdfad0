"""The public names: those of `thresher` cost no import before they are used, and those of modules are defined once."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path, PurePath

import pytest

import thresher
from thresher.shared.core.errors import ConfigError, ThresherError

ROOT = Path(__file__).parents[1]
PACKAGES = ("shared", "harvest", "train", "evaluate", "thresher")

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
    from thresher.evaluate.causal.contrast import contrast
    from thresher.evaluate.causal.steering_curve import steering_curve
    from thresher.evaluate.circuits.run import graph
    from thresher.evaluate.config import EvaluateConfig
    from thresher.evaluate.explain.run import explain
    from thresher.evaluate.features.files import FeatureIndex
    from thresher.evaluate.notebook.latent_card import show
    from thresher.harvest.config import HarvestConfig
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
        FeatureIndex,
        HarvestConfig,
        Sae,
        SaeModel,
        ShuffledBatches,
        ThresherError,
        TrainConfig,
        *(Ablate, Add, Clamp, Fires, Orthogonal, ProjectionCap, Scale),
        *(KLDivergence, LogitDifference, LogProbability),
    )
    functions = (contrast, explain, graph, show, steering_curve)
    for each in (*classes, *functions):
        assert getattr(thresher, each.__name__) is each
    names = {each.__name__ for each in (*classes, *functions)} | {*STAGES, "__version__"}
    assert names == set(thresher.__all__) == set(dir(thresher))
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


@pytest.mark.parametrize(
    ("function", "settings"),
    [
        ("explain", {"evaluation": "./no-such"}),
        ("graph", {"model": "./no-such", "transcoders": "./no-such", "text": "a", "output": "o"}),
    ],
)
def test_what_is_beyond_the_stages_takes_keywords_too(function, settings):
    function = getattr(thresher, function)
    with pytest.raises(ThresherError, match="no-such"):
        function(**settings)
    with pytest.raises(ConfigError, match="unknown"):
        function(**settings, unknown=1)


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

# Names that every module of a kind defines, by the modules that may.
CONTRACTS = {
    "**/*command.py": {"CONFIG", "SUMMARY", "USAGE", "actions", "main"},
    "shared/core/cli.py": {"main"},
    "shared/sae/formats/**": {
        *("CONFIG_NAME", "FORMAT", "WEIGHTS_NAME"),
        *("read", "recognises", "weights_name", "write"),
    },
    "shared/store/foreign/**": {"FORMAT", "read", "recognises"},
    "train/kernels/**": {
        *("decode", "dequantise", "grad_values", "grad_weights", "grad_weights_and_bias", "normalise"),
        *("pre_activations", "reconstruct", "select_batch_topk", "select_threshold", "select_topk"),
        *("sum_by_latent", "to_csc", "topk_of_rows", "update", "update_b_dec"),
        *("auxk_residual", "begin_step", "clip_gradients", "finish_step"),
    },
}


def definitions(root):
    """Return the files, relative to `root`, that define each public class, function and constant of a module."""
    found = {}
    for file in sorted(file for package in PACKAGES for file in (root / package).rglob("*.py")):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names = [node.name]
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                stored = [part for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)]
                names = [part.id for part in stored if isinstance(part.ctx, ast.Store)]
            else:
                continue
            for name in names:
                if not name.startswith("_"):
                    found.setdefault(name, set()).add(file.relative_to(root).as_posix())
    return found


def defined_twice(found):
    """Return the names that several files define, except those that a contract gives to all of its modules."""
    twice = {}
    for name, files in found.items():
        patterns = [pattern for pattern, names in CONTRACTS.items() if name in names]
        others = [file for file in files if not any(matches(file, pattern) for pattern in patterns)]
        if len(files) > 1 and others:
            twice[name] = sorted(files)
    return twice


def matches(file, pattern):
    """Return whether a path is in the folder of a pattern that ends with `/**`, or matches it."""
    return file.startswith(pattern[:-2]) if pattern.endswith("/**") else PurePath(file).match(pattern)


def test_a_public_name_is_defined_once():
    found = definitions(ROOT)
    assert len(found) > 1000
    assert defined_twice(found) == {}


def test_every_name_of_a_contract_is_defined_by_several_modules():
    found = definitions(ROOT)
    once = {name for names in CONTRACTS.values() for name in names if len(found.get(name, ())) < 2}
    assert once == set()


def test_a_second_definition_is_seen(tmp_path):
    files = {
        "shared/a.py": "class Plan:\n    pass\ndef read():\n    pass\n_T = 1\ndef one():\n    two = 2\n",
        "train/b.py": "from shared.a import read\nPlan: type = int\n_T = 1\ntwo = 2\n",
        "train/c.py": "async def read():\n    pass\nSIZE, (x, y) = 1, (2, 3)\n",
        "evaluate/d.py": "x = 2\nSIZE[0] = Plan.x = 1\ndef main():\n    pass\n",
        "evaluate/x_command.py": "def main():\n    pass\n",
        "shared/y/command.py": "def main():\n    pass\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert defined_twice(definitions(tmp_path)) == {
        "Plan": ["shared/a.py", "train/b.py"],
        "read": ["shared/a.py", "train/c.py"],
        "x": ["evaluate/d.py", "train/c.py"],
        "main": ["evaluate/d.py", "evaluate/x_command.py", "shared/y/command.py"],
    }
    (tmp_path / "evaluate" / "d.py").unlink()
    assert defined_twice(definitions(tmp_path)).keys() == {"Plan", "read"}
