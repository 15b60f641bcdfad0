"""Write what `tools/gpu_check.sh` found as one page of Markdown, from the files that its steps left in a folder."""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import gpu_tables

LIBRARIES = ("torch", "triton", "numpy", "transformers")
REPORTS = ("step.json", "by_kernel.json", "stream.json")
RESULTS = {"0": "passed", "124": "**out of time**", "137": "**killed**", "skipped": "skipped: no time left"}


def page(folder: Path) -> str:
    """Return the page; a step that left nothing has no section."""
    title = "# Rehearsal of the GPU check" if text(folder / "rehearsal") else "# GPU check"
    lines = [title, "", f"{datetime.date.today()}, {card()}; {versions()}; commit {commit()}.", ""]
    lines += ["| step | result | seconds |", "|---|---|---|"]
    for line in text(folder / "steps.tsv").splitlines():
        name, status, seconds = line.split("\t")
        lines.append(f"| {name} | {RESULTS.get(status, f'**failed**, exit status {status}')} | {seconds} |")
    for heading, section in (
        ("Kernels against plain computations", kernels(read(folder / "kernels.json"))),
        ("Tests that need a GPU", tail(folder / "tests.log", ("FAILED", "ERROR", " passed", " failed"))),
        ("Times", times(folder)),
        ("Trainers by launches and by graphs", trainers(read(folder / "trainers.json") or {})),
        ("compute-sanitizer", tail(folder / "sanitizer.log", ("SUMMARY", "FAIL", "Invalid"))),
        ("The stages by their command line", tail(folder / "stages.log", ("stored", "trained", "loss", "rror"))),
        ("What failed steps said last", failures(folder)),
    ):
        if section:
            lines += ["", f"## {heading}", "", *section]
    return "\n".join(lines) + "\n"


def card() -> str:
    """Return the GPU's name, memory and driver."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0].split(", ")
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "no GPU"
    return f"{found[0]} with {found[1]}, driver {found[-1]}" if len(found) == 3 else ", ".join(found)


def versions() -> str:
    """Return the libraries' versions."""
    found = [f"Python {sys.version.split()[0]}"]
    for library in LIBRARIES:
        try:
            found.append(f"{library} {version(library)}")
        except PackageNotFoundError:
            found.append(f"no {library}")
    return ", ".join(found)


def commit() -> str:
    """Return the source's commit."""
    command = ["git", "rev-parse", "--short=12", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def kernels(report: dict[str, Any] | None) -> list[str]:
    """Return a row for each check and shape, and the kernels that no check launched."""
    if report is None:
        return []
    checks = report["checks"]
    failed = [check for check in checks if not check["passed"]]
    lines = [f"{len(checks) - len(failed)} of {len(checks)} checks passed."]
    if report["never_launched"]:
        lines += ["", f"**No check launched** {', '.join(report['never_launched'])}."]
    lines += ["", "| check | batch, d_sae, d_in, k | result | |", "|---|---|---|---|"]
    for check in checks:
        shape = ", ".join(f"{n:,}" for n in check["shape"])
        verdict = "passed" if check["passed"] else "**failed**"
        lines.append(f"| {check['check']} | {shape} | {verdict} | {one_line(check['says'])} |")
    return lines


def times(folder: Path) -> list[str]:
    """Return the benchmark's tables, of which each part was written by a step of its own."""
    merged: dict[str, Any] | None = None
    for name in REPORTS:
        report = read(folder / name)
        if report is None:
            continue
        if merged is None:
            merged = report
            continue
        for number, entry in enumerate(report["sizes"]):
            if number < len(merged["sizes"]):
                merged["sizes"][number] |= entry
            else:
                merged["sizes"].append(entry)
    return [] if merged is None else gpu_tables.markdown(merged).rstrip().splitlines()


def trainers(results: dict[str, Any]) -> list[str]:
    """Return a row for each SAE, how near the fused step is, and what a failed capture left."""
    lines = []
    for name, result in results.items():
        if name in ("fused_step", "failed_capture"):
            continue
        if "error" in result:
            lines.append(f"| {name} | **failed** | | | {one_line(result['error'])} |")
            continue
        launches, graphs = result["by_launches"], result["by_graphs"]
        same = "equal" if result["same_bits"] else "**differ**"
        rest = f"L0 {graphs['l0']:.1f}, {graphs['graphs']} graphs, {graphs['skipped_steps']:.0f} steps skipped"
        lines.append(f"| {name} | {same} | {launches['ms']:.3f} | {graphs['ms']:.3f} | {rest} |")
    if lines:
        lines = ["| SAE | bits | ms by launches | ms by graphs | |", "|---|---|---|---|---|", *lines]
    compared = results.get("fused_step", {})
    if "near" in compared:
        verdict = "near" if compared["near"] else "**far from**"
        whole, ops = compared["loss"], compared["loss_op_by_op"]
        lines += ["", f"TopK's loss by fused steps is {whole:.5f}, {verdict} {ops:.5f} op by op."]
    left = results.get("failed_capture", {})
    if "error" in left:
        lines += ["", f"**A capture that should fail**: {one_line(left['error'])}."]
    elif "stream_restored" in left:
        kept = f"stream restored: {left['stream_restored']}, bytes kept: {left['bytes_kept']}"
        lines += ["", f"After a capture that fails: {kept} ({one_line(left['message'])})."]
    return lines


def failures(folder: Path) -> list[str]:
    """Return the last lines of the failed steps' logs."""
    lines: list[str] = []
    for line in text(folder / "failures.tsv").splitlines():
        name, log = line.split("\t")
        said = [part[:160] for part in text(folder / log).splitlines() if part.strip()][-6:]
        lines += [f"{name}, in {log}:", "", "```", *said, "```", ""]
    return lines[:-1]


def tail(log: Path, words: tuple[str, ...]) -> list[str]:
    """Return a log's last lines that hold one of some words, as a block of code."""
    found = [line.strip()[:200] for line in text(log).splitlines() if any(word in line for word in words)]
    return ["```", *found[-25:], "```"] if found else []


def one_line(said: str) -> str:
    """Return text that fits a table's cell."""
    return " ".join(str(said).split()).replace("|", "/")[:200]


def read(file: Path) -> Any:
    """Return a JSON file's content, None where it is missing or was cut off."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return None


def text(file: Path) -> str:
    """Return a file's text, empty where there is none."""
    return file.read_text(errors="replace") if file.exists() else ""


if __name__ == "__main__":
    print(page(Path(sys.argv[1])), end="")
