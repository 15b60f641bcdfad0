"""`make test-gpu` finds its tests on a machine that has the package's source and only what those tests import."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent
MISSING = ("dask", "datasets", "flask", "hypothesis", "moto", "obstore", "tensorstore", "xarray", "zarr")
WITHOUT_THEM = f"""
from importlib.machinery import PathFinder

find = PathFinder.find_spec

def find_others(name, path=None, target=None):
    return None if name.partition(".")[0] in {MISSING} else find(name, path, target)

PathFinder.find_spec = staticmethod(find_others)
"""


def test_the_tests_that_need_a_gpu_are_found_without_libraries_that_only_others_import(tmp_path):
    (tmp_path / "without_them.py").write_text(WITHOUT_THEM)
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "pytest", "-p", "without_them", "-m", "gpu", "--collect-only", str(TESTS)]
    environment = os.environ | {"PYTHONPATH": path, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=TESTS.parent, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = {line.partition("::")[0] for line in done.stdout.splitlines() if "::" in line}
    for file in (
        "train/test_gpu.py",
        "train/stream/test_gpu_windows.py",
        "train/kernels/triton/test_select.py",
        "evaluate/test_run.py",
    ):
        assert f"tests/{file}" in found
    assert "tests/harvest/documents/test_documents.py" not in found
