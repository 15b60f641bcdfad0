"""The direction of imports: each folder imports only what stands above it in `FLOORS`, and no files import in a circle.

Imports inside functions and under `TYPE_CHECKING` count as well.
"""

from __future__ import annotations

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("shared", "harvest", "train", "evaluate", "thresher")

# From the ground up. An entry is a folder, or a file of a folder whose other files stand elsewhere.
FLOORS = [
    "shared/core",
    "shared/core/terminal",
    "shared/core/cli.py",
    "shared/core/compute",
    "shared/display",
    "shared/synthetic",
    "shared/hub",
    "shared/model/loading",
    "shared/model/probe",
    "shared/model",
    "shared/sae/formats",
    "shared/sae/sources",
    "shared/sae",
    "shared/intervene",
    "shared/store/config.py",
    "shared/store/format",
    "shared/store/local",
    "shared/store/remote",
    "shared/store/write",
    "shared/store/read",
    "shared/store/share",
    "shared/store/foreign",
    "shared/store",
    "shared/exchange",
    "shared",
    "harvest/config.py",
    "harvest/documents",
    "harvest/tokens",
    "harvest/model",
    "harvest/steps.py",
    "harvest/ranks",
    "harvest",
    "train/config.py",
    "train/kernels",
    "train/stream",
    "train/architectures/contract.py",
    "train/architectures/parts",
    "train/architectures",
    "train/parallel",
    "train/step",
    "train/sweep",
    "train/checkpoints",
    "train/warm_start.py",
    "train/reporting",
    "train",
    "evaluate/config.py",
    "evaluate/saes",
    "evaluate/metrics",
    "evaluate/baselines",
    "evaluate/ground_truth",
    "evaluate/with_model",
    "evaluate/features",
    "evaluate/suite",
    "evaluate/results",
    "evaluate/report",
    "evaluate/causal",
    "evaluate/circuits",
    "evaluate/explain/llm",
    "evaluate/explain/corpus.py",
    "evaluate/explain/rules",
    "evaluate/explain",
    "evaluate/microscope/config.py",
    "evaluate/microscope/data",
    "evaluate/microscope/search",
    "evaluate/microscope/model",
    "evaluate/microscope/page",
    "evaluate/microscope/server",
    "evaluate/microscope",
    "evaluate/notebook",
    "evaluate",
    "thresher",
]
SAME_FLOOR = {
    "harvest/steps.py": ["estimate", "prefetch", "progress", "resume", "reuse"],
}
STAGES = ("harvest", "train", "evaluate")


def floor_of(file: Path, root: Path = ROOT) -> int:
    """Return the entry of `FLOORS` that a file stands on."""
    path = file.relative_to(root).as_posix()
    for entry, names in SAME_FLOOR.items():
        if path in [f"{Path(entry).parent}/{name}.py" for name in names]:
            return FLOORS.index(entry)
    found = [entry for entry in FLOORS if path == entry or path.startswith(f"{entry}/")]
    return FLOORS.index(max(found, key=len))


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Return Thresher's files by module name."""
    found = {}
    for package in PACKAGES:
        for file in (root / package).rglob("*.py"):
            parts = file.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imported(file: Path, known: dict[str, Path], root: Path = ROOT) -> set[str]:
    """Return the modules of Thresher that a file imports, relative or absolute."""
    package = list(file.relative_to(root).parts[:-1])
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            module = node.module.split(".") if node.module else []
            if node.level:
                base = package[: len(package) - node.level + 1] + module
            elif module and module[0] == "thresher":
                base = module[1:]
            else:
                continue
            for name in node.names:
                inner = ".".join([*base, name.name])
                found.add(inner if inner in known else ".".join(base))
        elif isinstance(node, ast.Import):
            found |= {name.name.removeprefix("thresher.") for name in node.names if name.name.startswith("thresher.")}
    return found & known.keys()


def test_imports_only_go_down():
    known = modules()
    assert len(known) > 200
    upward = []
    for name, file in known.items():
        for other in imported(file, known):
            if floor_of(known[other]) > floor_of(file):
                upward.append(f"{name} imports {other}")
            if name.split(".")[0] in STAGES and other.split(".")[0] not in ("shared", name.split(".")[0]):
                upward.append(f"{name} imports another stage, {other}")
    assert not upward


def test_no_files_import_in_a_circle():
    known = modules()
    graph = {name: imported(file, known) - {name} for name, file in known.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(" -> ".join(reversed(error.args[1]))) from None


def test_the_check_sees_every_kind_of_import(tmp_path):
    file = tmp_path / "train" / "deep" / "a.py"
    file.parent.mkdir(parents=True)
    known = dict.fromkeys(["harvest.run", "train.x", "evaluate.run", "shared", "train.deep.b", "shared.core"], file)
    file.write_text(
        "from ...harvest.run import harvest\nfrom .. import x\nimport thresher.evaluate.run\n"
        "def f():\n    from thresher import shared\n    from .b import c\n"
        "if TYPE_CHECKING:\n    from ...shared.core import errors\n"
    )
    assert imported(file, known, tmp_path) == known.keys()


def test_every_floor_is_there_and_folders_are_of_a_size_to_read():
    assert [entry for entry in FLOORS if not (ROOT / entry).exists()] == []
    crowded = {}
    for package in PACKAGES:
        for folder in {file.parent for file in (ROOT / package).rglob("*.py")}:
            for suffix in ("py", "js", "css"):
                n = len([file for file in folder.glob(f"*.{suffix}") if file.stem not in ("__init__", "__main__")])
                if n > 12:
                    crowded[f"{folder.relative_to(ROOT)}/*.{suffix}"] = n
    assert not crowded


def test_contributing_names_every_floor():
    plan = (ROOT / "CONTRIBUTING.md").read_text().split("## Floors")[1].split("```")[1]
    named = {line.split("/")[0]: line for line in re.sub(r"\n +", " ", plan).split("\n") if line}
    assert list(named) == list(dict.fromkeys(entry.split("/")[0] for entry in FLOORS))
    floors = [entry.split("/") for entry in FLOORS if not entry.endswith(".py")]
    missing = ["/".join(parts) for parts in floors if not set(parts) <= set(re.findall(r"\w+", named[parts[0]]))]
    assert missing == []


def test_no_page_that_everyone_reads_is_too_long():
    limits = {"README.md": 120, "CONTRIBUTING.md": 150, "docs/benchmarks.md": 150}
    assert {
        name: n for name, limit in limits.items() if (n := len((ROOT / name).read_text().splitlines())) > limit
    } == {}


def test_no_file_is_too_long_to_read():
    limits = dict.fromkeys(PACKAGES, 400) | dict.fromkeys(("tests", "benchmarks", "tools"), 500)
    long = {
        str(file.relative_to(ROOT)): n
        for folder, limit in limits.items()
        for suffix in ("py", "js", "css", "html")
        for file in (ROOT / folder).rglob(f"*.{suffix}")
        if (n := len(file.read_text().splitlines())) > limit
    }
    assert not long
