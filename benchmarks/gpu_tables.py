"""The GPU benchmark's report as Markdown tables, for docs/benchmarks.md."""

from __future__ import annotations

from typing import Any


def markdown(report: dict[str, Any]) -> str:
    """Return the report's tables; a section that failed says how instead."""
    lines = [f"On {report['device']}, PyTorch {report['torch']}; medians of repeated calls, in milliseconds."]
    for entry in report["sizes"]:
        size = entry["size"]
        lines += ["", f"### d={size['d_in']} F={size['d_sae']:,} k={size['k']} batch {size['batch']:,}", ""]
        lines += ["| | ms | against |", "|---|---|---|"]
        for section, rows in entry.items():
            if section != "size":
                lines += _failed(section, rows) if "error" in rows else _SECTIONS[section](rows, entry)
    return "\n".join(lines) + "\n"


def _failed(name: str, row: dict[str, Any]) -> list[str]:
    return [f"| {name} | failed | {_cell(row['error'])[-160:]} |"]


def _cell(text: object) -> str:
    """Return text that fits a table's cell."""
    return " ".join(str(text).split()).replace("|", "/")


# What the project aims at: a whole step within this much of its floor, and each peer's step this much longer.
WITHIN_FLOOR = 1.7
OVER_SPARSIFY, OVER_OTHERS = 2.5, 4.0


def _met(met: bool, target: str) -> str:
    return f"; target {target}: {'met' if met else '**missed**'}"


def _kernels(rows: dict[str, Any], entry: dict[str, Any]) -> list[str]:
    lines = [
        f"| {name} | {row['ms']:.3f} | {row['ratio']:.2f}x its floor of {row['floor_ms']:.3f}, of {row['bound']} |"
        for name, row in rows.items()
        if isinstance(row, dict)
    ]
    hot = f"{rows['hot_latents']}, of at most {rows['most_entries']} entries"
    batch = entry["size"]["batch"]
    return [*lines, f"| rows recomputed | | {rows['recomputed_rows']} of {batch} |", f"| hot latents | | {hot} |"]


def _card(row: dict[str, Any], entry: dict[str, Any]) -> list[str]:
    reached = f"{row['flops'] / 1e12:.0f} TFLOP/s in bfloat16, {row['bytes_per_second'] / 1e12:.2f} TB/s"
    return [f"| this card at best | | {reached} |"]


def _step(row: dict[str, Any], entry: dict[str, Any]) -> list[str]:
    ours, floor = _ours(entry), entry["size"]["floor_ms"]
    tokens = entry["size"]["batch"] / ours * 1e3
    peak = f"{row['peak_bytes'] / 2**30:.2f} GiB at most" if "peak_bytes" in row else "no GPU"
    found = row.get("by_kernel", {"longest": []})
    by_kernel = [
        f"| - {_cell(kernel['kernel'])} | {kernel['us'] / 1e3:.3f} | {kernel['launches']:.0f} launches |"
        for kernel in found["longest"]
    ]
    if by_kernel:
        by_kernel.insert(0, f"| its kernels, one by one | {found['us'] / 1e3:.3f} | {found['launches']:.0f} launches |")
    return [
        f"| **whole step** | {ours:.3f} | {ours / floor:.2f}x the floor of {floor}"
        f"{_met(ours <= WITHIN_FLOOR * floor, f'{WITHIN_FLOOR}x')}; {tokens:,.0f} tokens/s |",
        f"| without a graph | {row['eager_ms']:.3f} | {peak} |",
        f"| with AuxK, {row['n_dead']} dead | {row['auxk_ms']:.3f} | {row['auxk_ms'] / ours:.2f}x the step without |",
        *by_kernel,
    ]


def _architectures(rows: dict[str, Any], entry: dict[str, Any]) -> list[str]:
    lines = []
    for name, row in rows.items():
        told = f"L0 {row['l0']:.1f}, {row['skipped_steps']:.0f} steps skipped" if "ms" in row else ""
        lines += [f"| trainer's step, {name} | {row['ms']:.3f} | {told} |"] if "ms" in row else _failed(name, row)
    return lines


def _stream(rows: dict[str, Any], entry: dict[str, Any]) -> list[str]:
    lines = []
    for name, row in rows.items():
        waits = f"waits {row['data_wait_fraction']:.1%}"
        lines.append(f"| trained from a {name} store | | {row['tokens_per_second']:,.0f} tokens/s, {waits} |")
    return lines


def _peers(rows: dict[str, Any], entry: dict[str, Any]) -> list[str]:
    lines, ours = [], _ours(entry)
    for name, row in rows.items():
        if "rehearsed" in row:
            lines.append(f"| {name} | | rehearsed |")
        elif "ms" not in row:
            lines += _failed(name, {"error": "no times", **row})
        else:
            peak = f"{row['peak_bytes'] / 2**30:.2f} GiB"
            over, target = row["ms"] / ours, OVER_SPARSIFY if name == "sparsify" else OVER_OTHERS
            # Without a time of ours there is nothing to hold it against.
            told = f"{over:.2f}x ours, {peak}{_met(over >= target, f'{target}x')}" if over == over else peak
            lines.append(f"| {name} | {row['ms']:.3f} | {told} |")
    return lines


def _ours(entry: dict[str, Any]) -> float:
    """Return our step's time, not a number where it has none."""
    return float(entry.get("step", {}).get("ms", "nan"))


_SECTIONS = {
    "card": _card,
    "kernels": _kernels,
    "step": _step,
    "architectures": _architectures,
    "stream": _stream,
    "peers": _peers,
}
