"""Turn one chunk of rows into stored bytes and moments: the work of the writer's threads."""

from __future__ import annotations

import numpy as np

from .codecs import encode_chunk
from .format import ArrayLayout, Header, scales_name
from .moments import Moments
from .pipeline import Encoded
from .quantise import dequantise, quantise
from .rows import to_bits, to_float64


def encode_hook_chunk(
    header: Header, arrays: dict[str, ArrayLayout], name: str, bits: np.ndarray, training: np.ndarray
) -> tuple[Encoded, Moments]:
    """Return what is stored of one chunk of a hook point, and the moments of its training rows as they will be read."""
    if header.codec != "int8":
        encoded = [(name, encode_chunk(arrays[name], bits, header.codec_level))]
        return encoded, Moments.of(to_float64(bits[training], header.dtype))
    values, scales = quantise(to_float64(bits, header.dtype).astype(np.float32))
    scales_array = arrays[scales_name(name)]
    encoded = [
        (name, encode_chunk(arrays[name], values, header.codec_level)),
        (scales_array.name, encode_chunk(scales_array, scales, header.codec_level)),
    ]
    rows_as_read = dequantise(values[training], scales[training])
    return encoded, Moments.of(to_float64(to_bits(rows_as_read, header.dtype, name), header.dtype))


def encode_tokens(array: ArrayLayout, tokens: np.ndarray) -> Encoded:
    """Return what is stored of one chunk of tokens, padded to its full size."""
    padded = np.zeros(array.chunk_rows, dtype="<i4")
    padded[: len(tokens)] = tokens
    return [(array.name, encode_chunk(array, padded, 1))]
