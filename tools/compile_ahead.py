"""Compile every kernel for given GPUs on a machine that has none, and report what each takes.

`python tools/compile_ahead.py 80 90` prints a JSON line for each kernel, variant and
target: registers a thread, bytes of stack (spills) and of shared memory, and whether the tensor cores'
instructions are there. The tests hold these against what the GPUs have.
"""

# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from thresher.train.kernels.csc import MAX_SEGMENT
from thresher.train.kernels.triton import adam as optimizer
from thresher.train.kernels.triton import feature_major, select, threshold, token_major
from thresher.train.kernels.triton.dequantise import rows_kernel

CAPABILITIES = (80, 90)

# How launches type each argument. What is not named is a pointer to float32 or a 32-bit integer.
POINTERS = {
    "*bf16": {"x_ptr", "W_ptr", "target_ptr", "W_enc_shadow_ptr", "W_dec_shadow_ptr", "out_bf16_ptr"},
    "*i64": {
        "keys_ptr",
        "offsets_ptr",
        "order_ptr",
        "starts_ptr",
        "segment_starts_ptr",
        "segment_latents_ptr",
        "places_ptr",
    },
    "*i32": {"failed_ptr", "top_indices_ptr", "indices_ptr", "rows_ptr", "slot_columns_ptr", "slots_ptr", "counts_ptr"},
}
FLOATS = {"keep1", "keep2", "new1", "new2", "eps", "factor"}
# Rows are a multiple of 16 elements long in every model worth compiling for, so loads are of 16 bytes.
MULTIPLES_OF_16 = {"d_in", "stride", "stride_x", "stride_W", "stride_g", "stride_target", "stride_keys", "n_keys"}


class Variant(NamedTuple):
    """A kernel, its compile-time constants and its launch options."""

    kernel: Any
    constants: dict[str, Any]
    num_warps: int
    num_stages: int = 3
    limit_registers: bool = False
    types: tuple[tuple[str, str], ...] = ()


def variants() -> Iterator[Variant]:
    """Yield what the launches use at the sizes that matter."""
    tile = {"BLOCK_ROWS": 128, "BLOCK_LATENTS": 128, "BLOCK_D": 64}
    # All that `select_tiling` may choose, 24,576 latents' choice for k = 32 first.
    for n_candidates in (8, 4, 2, 16, 32):
        yield Variant(select.candidates_kernel, {"N_CANDIDATES": n_candidates} | tile, 8, limit_registers=True)
    for k in (32, 64, 128):
        for redo in (False, True):
            constants = {"N_CANDIDATES": 8, "K_PADDED": k, "CHUNK": select.merge_chunk(4096, k), "REDO": redo}
            yield Variant(select.merge_kernel, constants, select.merge_warps(redo))
        yield Variant(select.recompute_kernel, {"K_PADDED": k} | tile | {"BLOCK_ROWS": 16}, 4)
    for fill in (False, True):
        yield Variant(threshold.threshold_kernel, {"N_SLOTS": 8, "FILL": fill} | tile, 8)
    # In float32 products are no tensor cores'.
    small = {"BLOCK_ROWS": 64, "BLOCK_LATENTS": 64, "BLOCK_D": 32}
    exact = (("x_ptr", "*fp32"), ("W_ptr", "*fp32"))
    for n_candidates in (4, 8):
        constants = {"N_CANDIDATES": n_candidates} | small
        yield Variant(select.candidates_kernel, constants, 8, limit_registers=True, types=exact)
    for k in (32, 128):
        constants = {"K_PADDED": k} | small | {"BLOCK_ROWS": 16, "BLOCK_LATENTS": max(64, k)}
        yield Variant(select.recompute_kernel, constants, 4, types=exact)
    for fill in (False, True):
        yield Variant(threshold.threshold_kernel, {"N_SLOTS": 8, "FILL": fill} | small, 8, types=exact)
    shadows = (("x_ptr", "*fp32"), ("W_enc_shadow_ptr", "*fp32"), ("W_dec_shadow_ptr", "*fp32"))
    for d_in in (768, 4096):
        tiling = token_major.row_tiling(d_in)
        rows = {"ENTRIES": tiling.entries, "D": tiling.d}
        latents = rows | {"MAX_SEGMENT": MAX_SEGMENT}
        bfloat16_matrix = (("matrix_ptr", "*bf16"),)
        yield Variant(token_major.decode_kernel, rows, tiling.num_warps)
        yield Variant(token_major.grad_values_kernel, rows, tiling.num_warps)
        yield Variant(token_major.reconstruct_kernel, rows, tiling.num_warps)
        # Architectures that use the ops one at a time decode from the float32 weights; AuxK's target is float32.
        for kernel in (token_major.decode_kernel, token_major.grad_values_kernel):
            yield Variant(kernel, rows, tiling.num_warps, types=exact[1:])
        yield Variant(token_major.reconstruct_kernel, rows, tiling.num_warps, types=(("target_ptr", "*fp32"),))
        yield Variant(feature_major.segments_kernel, latents, tiling.num_warps, types=bfloat16_matrix)
        yield Variant(feature_major.grad_weights_kernel, latents, tiling.num_warps)
        for norm_only, dense in ((False, False), (True, False), (False, True), (True, True)):
            constants = latents | {"NORM_ONLY": norm_only, "DENSE": dense}
            yield Variant(optimizer.update_kernel, constants, tiling.num_warps)
            yield Variant(optimizer.update_kernel, constants, tiling.num_warps, types=shadows)
    # Triton makes constants of arguments that are 1, as the width is in `sum_by_latent`, of which every step has one.
    tiling = token_major.row_tiling(1)
    ones = {
        "ENTRIES": tiling.entries,
        "D": tiling.d,
        "MAX_SEGMENT": MAX_SEGMENT,
        "d_in": 1,
    }
    yield Variant(feature_major.segments_kernel, ones, tiling.num_warps)
    yield Variant(feature_major.grad_weights_kernel, ones, tiling.num_warps)
    for quantised in (True, False):
        constants = {"QUANTISED": quantised, "ALSO": not quantised, "D": 1024}
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
    types = {name: argument_type(name) for name in names} | dict(variant.types)
    types |= dict.fromkeys(variant.constants, "constexpr")
    multiples = MULTIPLES_OF_16 - set(variant.constants)
    aligned = [place for place, name in enumerate(names) if types[name].startswith("*") or name in multiples]
    source = ASTSource(
        variant.kernel, types, variant.constants, {(place,): [["tt.divisibility", 16]] for place in aligned}
    )
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    if variant.limit_registers and capability >= 90:
        options["maxnreg"] = 128
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("Function")[-1]
    fields = dict(part.rsplit(":", 1) for part in usage.split() if ":" in part and part.rsplit(":", 1)[1].isdigit())
    return {
        "kernel": variant.kernel.__name__,
        "capability": capability,
        "constants": variant.constants,
        "float32": ("W_ptr", "*fp32") in variant.types,
        "registers": int(fields["REG"]),
        "stack": int(fields["STACK"]) + int(fields["LOCAL"]),
        "shared": compiled.metadata.shared,
        "tensor_cores": any(name in compiled.asm["ptx"] for name in ("wgmma.mma_async", "mma.sync")),
    }


def main(arguments: list[str]) -> None:
    """Compile for the capabilities given, such as 80 and 90; with `--each-once`, one variant of a kernel."""
    capabilities = [int(argument) for argument in arguments if argument.isdigit()] or list(CAPABILITIES)
    for capability in capabilities:
        seen: set[str] = set()
        for variant in variants():
            name = variant.kernel.__name__
            if "--each-once" in arguments and name in seen:
                continue
            seen.add(name)
            print(json.dumps(compile_variant(variant, capability)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
