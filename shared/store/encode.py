"""Turn one chunk of rows into stored bytes and moments: the work of the writer's threads."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .codecs import encode_chunk
from .format import ArrayLayout, Header, scales_name
from .moments import Moments
from .pipeline import Encoded
from .quantise import dequantise, quantise
from .rows import float64_blocks, to_bits, to_float32


class EncodedChunk(NamedTuple):
    """What is stored of one chunk of a hook point, and the moments of its training rows as they will be read.

    Where the store keeps covariances, also the bits of those rows.
    """

    stored: Encoded
    moments: Moments
    as_read: np.ndarray | None


def encode_hook_chunk(
    header: Header, arrays: dict[str, ArrayLayout], name: str, bits: np.ndarray, training: np.ndarray
) -> EncodedChunk:
    """Encode one chunk of a hook point."""
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
        as_read = to_bits(dequantise(_rows_of(values, training), scales[training]), header.dtype, name)
    moments = Moments.of(float64_blocks(as_read, header.dtype), bits.shape[1])
    return EncodedChunk(stored, moments, as_read if header.covariance else None)


def _rows_of(rows: np.ndarray, training: np.ndarray) -> np.ndarray:
    """Return the training rows, which as a rule are all or most."""
    return rows if training.all() else rows.compress(training, axis=0)


def encode_tokens(array: ArrayLayout, tokens: np.ndarray) -> Encoded:
    """Return what is stored of one chunk of tokens, padded to its full size."""
    padded = np.zeros(array.chunk_rows, dtype="<i4")
    padded[: len(tokens)] = tokens
    return [(array.name, encode_chunk(array, padded, 1))]
