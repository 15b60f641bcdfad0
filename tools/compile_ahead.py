"""Compile every kernel for given GPUs on a machine that has none, and report what each takes.

`python tools/compile_ahead.py 80 90` prints a JSON line for each kernel, variant and
target: registers per thread, bytes of stack (spills) and of shared memory, and whether the tensor cores'
instructions are there. The tests hold these against what the GPUs have.

`python tools/compile_ahead.py 90 --counts` prints a Markdown table instead, with the machine instructions of each
variant. `--kernel NAME` limits either to one kernel.
"""

# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from thresher.train.kernels.csc import MAX_SEGMENT
from thresher.train.kernels.fused_state import GROUP
from thresher.train.kernels.triton import adam as optimizer
from thresher.train.kernels.triton import csc, feature_major, merge, select, step_ends, threshold, tile, token_major
from thresher.train.kernels.triton.dequantise import rows_kernel

CAPABILITIES = (80, 90)

# How launches type each argument. What is not named is a pointer to float32 or a 32-bit integer.
POINTERS = {
    "*bf16": {"x_ptr", "W_ptr", "target_ptr", "W_enc_shadow_ptr", "W_dec_shadow_ptr", "out_bf16_ptr"},
    "*i64": {
        "offsets_ptr",
        "order_ptr",
        "starts_ptr",
        "places_ptr",
        "tokens_since_fired_ptr",
    },
    "*i16": {"sorted_ptr"},
    "*i32": {
        "keys_ptr",
        "failed_ptr",
        "n_failed_ptr",
        "top_indices_ptr",
        "indices_ptr",
        "rows_ptr",
        "slot_columns_ptr",
        "slots_ptr",
        "counts_ptr",
        "n_active_ptr",
        "n_dead_ptr",
        "n_dead_of_groups_ptr",
    },
    "*fp64": {"betas_ptr", "norm_ptr", "now_ptr", "failure_ptr", "metrics_ptr"},
}
FLOATS = {"keep1", "keep2", "new1", "new2", "eps", "factor", "scale", "max_norm", "total_variance", "limit"}
FLOATS |= {"coefficient", "aux_coefficient"}
# Rows are a multiple of 16 elements long in every model worth compiling for, so loads are of 16 bytes.
MULTIPLES_OF_16 = {"d_in", "stride", "stride_x", "stride_W", "stride_g", "stride_target", "stride_keys", "n_keys"}


# What goes through the pipe of half rate on sm_80 and sm_90.
HALF_RATE = {"ISETP", "SEL", "IMNMX", "VIMNMX", "VIMNMX3", "FSETP", "FSEL", "FMNMX", "LOP3", "SHF", "PLOP3", "FSET"}


class Variant(NamedTuple):
    """A kernel, its compile-time constants and its launch options; `max_registers` is by capability."""

    kernel: Any
    constants: dict[str, Any]
    num_warps: int
    num_stages: int = 3
    max_registers: Mapping[int, int | None] = MappingProxyType({})
    types: tuple[tuple[str, str], ...] = ()


def variants() -> Iterator[Variant]:
    """Yield what the launches use at the sizes that matter."""
    whole = {"BLOCK_ROWS": 128, "BLOCK_LATENTS": 128, "BLOCK_D": 64}
    # Of what `select_tiling` may choose, 24,576 latents' choice for k = 32 first.
    packed = {"COLUMN_BITS": 7}
    for n_candidates in (5, 2, 4, 6, 8, 16, 32):
        constants = {"N_CANDIDATES": n_candidates} | packed | whole
        yield Variant(select.candidates_kernel, constants, 8, max_registers={90: 128})
    # 960 keys of a row at 24,576 latents, 4,096 at 131,072, and more than registers hold.
    for n_held, held in ((1024, True), (4096, True), (merge.MAX_HELD_KEYS, True), (merge.MAX_HELD_KEYS, False)):
        warps = merge.merge_warps(n_held, wide=False)
        constants = {"N_CANDIDATES": 5, "KEYS": n_held, "PLACED": 256 * warps, "HELD": held, "REDO": False} | packed
        yield Variant(merge.merge_kernel, constants, warps)
    wide = {"COLUMN_BITS": 0}
    for n_held, held in ((512, True), (merge.MAX_HELD_KEYS, True), (merge.MAX_HELD_KEYS, False)):
        for redo in (False, True):
            warps = merge.merge_warps(n_held, wide=True)
            constants = {"N_CANDIDATES": 5, "KEYS": n_held, "PLACED": 256 * warps, "HELD": held, "REDO": redo} | wide
            yield Variant(merge.merge_kernel, constants, warps, types=(("keys_ptr", "*i64"),))
    for k in (32, 64, 128):
        yield Variant(
            select.recompute_kernel,
            {"K_PADDED": k} | packed | whole | {"BLOCK_ROWS": 16},
            4,
            max_registers=dict.fromkeys(CAPABILITIES, select.recompute_registers(packed["COLUMN_BITS"])),
            types=(("keys_ptr", "*i64"),),
        )
    for fill in (False, True):
        yield Variant(threshold.threshold_kernel, {"N_SLOTS": 8, "FILL": fill} | whole, 8)
    # In float32 products are no tensor cores'.
    small = {"BLOCK_ROWS": 64, "BLOCK_LATENTS": 64, "BLOCK_D": 32}
    exact = (("x_ptr", "*fp32"), ("W_ptr", "*fp32"), ("keys_ptr", "*i64"))
    for n_candidates in (4, 8):
        constants = {"N_CANDIDATES": n_candidates} | wide | small
        yield Variant(select.candidates_kernel, constants, 8, max_registers={90: 128}, types=exact)
    for k in (32, 128):
        constants = {"K_PADDED": k} | wide | small | {"BLOCK_ROWS": 16, "BLOCK_LATENTS": max(64, k)}
        yield Variant(select.recompute_kernel, constants, 4, types=exact)
    for fill in (False, True):
        yield Variant(threshold.threshold_kernel, {"N_SLOTS": 8, "FILL": fill} | small, 8, types=exact)
    shadows = (("x_ptr", "*fp32"), ("W_enc_shadow_ptr", "*fp32"), ("W_dec_shadow_ptr", "*fp32"))
    for d_in in (768, 2304, 4096):
        tiling = tile.row_tiling(d_in)
        rows = {"ENTRIES": tiling.entries, "WIDTHS": tiling.widths}
        token = token_major.token_tiling(64 if d_in == 4096 else 32, d_in, 2)
        chosen = {"K": token.k, "BLOCK_D": token.channels, "STAGES": token.stages}
        latents = rows | {"MAX_SEGMENT": MAX_SEGMENT}
        bfloat16_matrix = (("matrix_ptr", "*bf16"),)
        alone, both = latents | {"ALSO": False}, latents | {"ALSO": True}
        yield Variant(token_major.decode_kernel, rows, tiling.num_warps)
        yield Variant(token_major.grad_values_kernel, rows, tiling.num_warps)
        yield Variant(token_major.reconstruct_kernel, chosen, token.num_warps)
        residual = {"WIDTHS": tiling.widths}
        for kind in ("*bf16", "*fp32"):
            types = (("e_hat_ptr", kind), ("out_ptr", "*bf16"))
            yield Variant(token_major.auxk_residual_kernel, residual, tiling.num_warps, types=types)
        # Architectures that use the ops one at a time decode from the float32 weights; AuxK's target is float32.
        for kernel in (token_major.decode_kernel, token_major.grad_values_kernel):
            yield Variant(kernel, rows, tiling.num_warps, types=exact[1:2])
        types = (("target_ptr", "*fp32"),)
        yield Variant(token_major.reconstruct_kernel, chosen, token.num_warps, types=types)
        yield Variant(feature_major.segments_kernel, both, tiling.num_warps, types=bfloat16_matrix)
        yield Variant(feature_major.segments_kernel, alone, tiling.num_warps)
        yield Variant(feature_major.grad_weights_kernel, latents, tiling.num_warps)
        # Unclipped, and the two launches of a clipped update, without AuxK and with it.
        passes = ((False, True), (True, True), (False, False))
        for (norm_only, sum_bias), dense in itertools.product(passes, (False, True)):
            constants = latents | {"NORM_ONLY": norm_only, "SUM_BIAS": sum_bias, "DENSE": dense}
            constants["GROUP"] = GROUP
            limits: dict[int, int | None] = dict.fromkeys(CAPABILITIES, optimizer.UPDATE_REGISTERS)
            for types in ((), shadows):
                yield Variant(optimizer.update_kernel, constants, tiling.num_warps, max_registers=limits, types=types)
    # Triton makes constants of arguments that are 1, as the width is in `sum_by_latent`, of which every step has one.
    tiling = tile.row_tiling(1)
    ones = {
        "ENTRIES": tiling.entries,
        "WIDTHS": tiling.widths,
        "MAX_SEGMENT": MAX_SEGMENT,
        "d_in": 1,
    }
    yield Variant(feature_major.segments_kernel, ones | {"ALSO": False}, tiling.num_warps)
    yield Variant(feature_major.grad_weights_kernel, ones, tiling.num_warps)
    # Narrow keys are enough for up to 65,535 latents.
    for kind in ("*i16", "*i32"):
        for kernel in (csc.keys_kernel, csc.places_kernel):
            yield Variant(kernel, {"BLOCK": 256}, 4, types=(("keys_ptr", kind),))
    yield Variant(step_ends.begin_kernel, {"N_STEPS": 4, "BLOCK": 1024}, 4)
    yield Variant(step_ends.update_b_dec_kernel, {"BLOCK": 256}, 4)
    for kind in ("*fp32", "*fp64"):
        yield Variant(step_ends.clip_kernel, {"BLOCK": 1024}, 4, types=(("squares_ptr", kind),))
    for auxk, watch in itertools.product((True, False), repeat=2):
        yield Variant(step_ends.finish_kernel, {"AUXK": auxk, "WATCH": watch, "BLOCK": 1024}, 4)
    for quantised, limited in ((True, False), (False, False), (False, True)):
        constants = {"QUANTISED": quantised, "LIMITED": limited, "ALSO": not quantised, "D": 1024}
        kinds = ("*i8", "*bf16", "*bf16") if quantised else ("*bf16", "*fp32", "*bf16")
        types = tuple(zip(("stored_ptr", "out_ptr", "also_ptr"), kinds, strict=True))
        yield Variant(rows_kernel, constants, 4, types=types)


def argument_type(name: str) -> str:
    """Return Triton's name of an argument's type."""
    for kind, names in POINTERS.items():
        if name in names:
            return kind
    return "*fp32" if name.endswith("_ptr") else "fp32" if name in FLOATS else "i32"


def compile_variant(variant: Variant, capability: int) -> dict[str, Any]:
    """Compile a variant and return what it takes."""
    names = variant.kernel.arg_names
    types = {name: argument_type(name) for name in names}
    types |= {name: kind for name, kind in variant.types if name in types}
    types |= dict.fromkeys(variant.constants, "constexpr")
    multiples = MULTIPLES_OF_16 - set(variant.constants)
    aligned = [place for place, name in enumerate(names) if types[name].startswith("*") or name in multiples]
    source = ASTSource(
        variant.kernel, types, variant.constants, {(place,): [["tt.divisibility", 16]] for place in aligned}
    )
    options: dict[str, Any] = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    options["maxnreg"] = variant.max_registers.get(capability)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    usage = disassembled(compiled.asm["cubin"], triton.knobs.nvidia.cuobjdump.path, "-res-usage").split("Function")[-1]
    fields = dict(part.rsplit(":", 1) for part in usage.split() if ":" in part and part.rsplit(":", 1)[1].isdigit())
    return {
        "triton": triton.__version__,
        "kernel": variant.kernel.__name__,
        "capability": capability,
        "constants": variant.constants,
        "float32": ("W_ptr", "*fp32") in variant.types,
        "registers": int(fields["REG"]),
        "stack": int(fields["STACK"]) + int(fields["LOCAL"]),
        "shared": compiled.metadata.shared,
        "tensor_cores": any(name in compiled.asm["ptx"] for name in ("wgmma.mma_async", "mma.sync")),
        "num_warps": variant.num_warps,
        "cubin": compiled.asm["cubin"],
    }


def disassembled(cubin: bytes, *command: str) -> str:
    """Return what a tool of the CUDA toolkit, which Triton ships, prints of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        return subprocess.run([*command, file.name], check=True, capture_output=True, text=True).stdout


def counts(cubin: bytes) -> dict[str, int | str]:
    """Return a kernel's static instructions: all, by kind, and its loops' bodies; how often a loop runs is not in it.

    Compares, selects, minima, maxima, shifts and logic (`alu`) issue at half the rate of others. A `turn` is a load
    from global memory behind a store to it: such a load may have to wait for what it could have been issued with.
    """
    text = disassembled(cubin, triton.knobs.nvidia.nvdisasm.path, "-c")
    operations: list[str] = []
    labels: dict[str, int] = {}
    bodies: list[str] = []
    for line in text.splitlines():
        if label := re.match(r"(\.L_x_\w+):", line):
            labels[label[1]] = len(operations)
        if instruction := re.search(r"\*/\s+(?:@!?U?P\w+ )?([A-Z]\w*)([^;]*);", line):
            operations.append(instruction[1])
            target = re.search(r"\((\.L_x_\w+)\)", instruction[2])
            if instruction[1] == "BRA" and target and labels.get(target[1], len(operations)) < len(operations) - 1:
                body = operations[labels[target[1]] :]
                bodies.append(f"{len(body)} ({sum(one in HALF_RATE for one in body)} alu)")
    memory = [name for name in operations if name in ("LDG", "STG")]
    return {
        "instructions": len(operations),
        "alu": sum(name in HALF_RATE for name in operations),
        "shuffles": operations.count("SHFL"),
        "loads": memory.count("LDG"),
        "stores": memory.count("STG"),
        "turns": sum(pair == ("STG", "LDG") for pair in itertools.pairwise(memory)),
        "loops": ", ".join(bodies),
    }


def print_counts(results: Iterable[dict[str, Any]]) -> None:
    """Print a row of Markdown for each compiled variant."""
    columns = ("registers", "stack", "shared", "instructions", "alu", "shuffles", "loads", "stores", "turns", "loops")
    print(f"| kernel | constants | sm | warps | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 4)}")
    for result in results:
        constants = ", ".join(f"{name} {value}" for name, value in result["constants"].items())
        row = result | counts(result["cubin"])
        cells = (row["kernel"], constants, row["capability"], row["num_warps"], *(row[name] for name in columns))
        print(f"| {' | '.join(map(str, cells))} |", flush=True)


def compiled(capabilities: Iterable[int], kernel: str | None, each_once: bool) -> Iterator[dict[str, Any]]:
    """Yield what each variant takes on each target: of one kernel if it is named, and one variant of each if asked."""
    for capability in capabilities:
        seen: set[str] = set()
        for variant in variants():
            name = variant.kernel.__name__
            if kernel in (None, name) and not (each_once and name in seen):
                seen.add(name)
                yield compile_variant(variant, capability)


def main(arguments: list[str]) -> None:
    """Compile for the capabilities given, such as 80 and 90, and print what each variant takes."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("capabilities", nargs="*", type=int, default=CAPABILITIES, help="such as 80 and 90")
    parser.add_argument("--each-once", action="store_true", help="compile the first variant of each kernel alone")
    parser.add_argument("--kernel", help="compile one kernel alone, such as merge_kernel")
    parser.add_argument("--counts", action="store_true", help="print a table of machine instructions")
    options = parser.parse_args(arguments)
    results = compiled(options.capabilities, options.kernel, options.each_once)
    if options.counts:
        print_counts(results)
    else:
        for result in results:
            del result["cubin"]
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
