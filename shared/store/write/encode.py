"""Encode one chunk of rows and compute its moments: the work of the writer's threads."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..format.bits import float64_blocks, to_bits, to_float32
from ..format.codecs import dequantise_rows, encode_chunk, quantise
from ..format.layout import ArrayLayout, Header, scales_name
from ..format.moments import Moments, merge_moments
from ..format.roles import N_ROLES, PLACED
from ..local.shard_writer import EncodedChunks


class EncodedChunk(NamedTuple):
    """The stored bytes of one chunk of a hook point, and the moments of its training rows as readers will see them.

    `by_role` has the moments of each role's training rows; it is empty in a store without roles.
    """

    stored: EncodedChunks
    moments: Moments
    by_role: tuple[Moments, ...]


def encode_hook_chunk(
    header: Header, arrays: dict[str, ArrayLayout], name: str, bits: np.ndarray, training_roles: np.ndarray
) -> EncodedChunk:
    """Encode one chunk of a hook point. `training_roles` has each row's role, or `PLACED` if it is not trained on."""
    training = training_roles != PLACED
    if header.codec != "int8":
        stored = [(name, encode_chunk(arrays[name], bits, header.codec_level))]
        as_read = _rows_of(bits, training)
    else:
        values, scales = quantise(to_float32(bits, header.dtype))
        scales_array = arrays[scales_name(name)]
        stored = [
            (name, encode_chunk(arrays[name], values, header.codec_level)),
            (scales_array.name, encode_chunk(scales_array, scales, header.codec_level)),
        ]
        as_read = to_bits(dequantise_rows(_rows_of(values, training), scales[training]), header.dtype, name)
    d_in = bits.shape[1]
    by_role: tuple[Moments, ...] = ()
    if header.has_roles:
        roles = training_roles[training]
        by_role = tuple(Moments.of(float64_blocks(as_read[roles == r], header.dtype), d_in) for r in range(N_ROLES))
        moments = merge_moments(by_role, d_in)
    else:
        moments = Moments.of(float64_blocks(as_read, header.dtype), d_in)
    return EncodedChunk(stored, moments, by_role)


def _rows_of(rows: np.ndarray, training: np.ndarray) -> np.ndarray:
    """Return the training rows, without a copy if all rows are."""
    return rows if training.all() else rows.compress(training, axis=0)


def encode_integers(array: ArrayLayout, values: np.ndarray) -> EncodedChunks:
    """Encode one chunk of tokens or roles, padded with zeros to its full size."""
    padded = np.zeros(array.chunk_rows, dtype=np.dtype(array.dtype).newbyteorder("<"))
    padded[: len(values)] = values
    return [(array.name, encode_chunk(array, padded, 1))]
