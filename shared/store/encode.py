"""Turn one chunk of rows into stored bytes and moments: the work of the writer's threads."""

from __future__ import annotations

import numpy as np

from .codecs import encode_chunk
from .format import ArrayLayout, Header, scales_name
from .moments import Moments
from .pipeline import Encoded
from .quantise import dequantise, quantise
from .rows import float64_blocks, to_bits, to_float32


def encode_hook_chunk(
    header: Header, arrays: dict[str, ArrayLayout], name: str, bits: np.ndarray, training: np.ndarray
) -> tuple[Encoded, Moments]:
    """Return what is stored of one chunk of a hook point, and the moments of its training rows as they will be read."""
    if header.codec != "int8":
        encoded = [(name, encode_chunk(arrays[name], bits, header.codec_level))]
        return encoded, Moments.of(float64_blocks(_rows_of(bits, training), header.dtype), bits.shape[1])
    values, scales = quantise(to_float32(bits, header.dtype))
    scales_array = arrays[scales_name(name)]
    encoded = [
        (name, encode_chunk(arrays[name], values, header.codec_level)),
        (scales_array.name, encode_chunk(scales_array, scales, header.codec_level)),
    ]
    as_read = to_bits(dequantise(_rows_of(values, training), scales[training]), header.dtype, name)
    return encoded, Moments.of(float64_blocks(as_read, header.dtype), bits.shape[1])


def _rows_of(rows: np.ndarray, training: np.ndarray) -> np.ndarray:
    """Return the training rows, which as a rule are all or most."""
    return rows if training.all() else rows.compress(training, axis=0)


def encode_tokens(array: ArrayLayout, tokens: np.ndarray) -> Encoded:
    """Return what is stored of one chunk of tokens, padded to its full size."""
    padded = np.zeros(array.chunk_rows, dtype="<i4")
    padded[: len(tokens)] = tokens
    return [(array.name, encode_chunk(array, padded, 1))]
