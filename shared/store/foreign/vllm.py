"""Hidden states that vLLM's `ExampleHiddenStatesConnector` wrote: one safetensors file per request.

A file holds `hidden_states` `[tokens, layers, hidden]` in the model's data type and `token_ids` `[tokens]`. The files
do not say which layers these are: that is the engine's `eagle_aux_hidden_state_layer_ids`. Id `i` is the residual
stream after `i` blocks, without the final norm; id 0 is the embedding.
https://docs.vllm.ai/en/latest/features/speculative_decoding/extract_hidden_states/
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int32
from safetensors.torch import load_file
from torch import Tensor

from ...core.errors import StoreError
from .safetensors_parts import read_slice, tensors_of
from .source import Format, Options, Rows, Shape, chosen, dtype_name, reading_foreign, shared_value
from .tensor_folder import safetensors_files

STATES, _TOKENS = "hidden_states", "token_ids"


class HiddenStates:
    """Files of requests, in the order of their names; each is a document."""

    def __init__(self, path: Path, options: Options) -> None:
        self._files = safetensors_files(path)
        infos = [tensors_of(file) for file in self._files]
        for file, info in zip(self._files, infos, strict=True):
            check_layout(file, {name: found.shape for name, found in info.items()})
        shapes = [info[STATES].shape[1:] for info in infos]
        n_layers, width = shared_value("layers and width", shapes, self._files)
        layers = options.layers
        if layers is None or len(layers) != n_layers or len(set(layers)) != n_layers or min(layers) < 0:
            raise StoreError(
                f"'{path}' holds {n_layers} layers, and its files do not say which; give their ids in order, as in "
                f"eagle_aux_hidden_state_layer_ids: --layers {','.join(map(str, range(1, n_layers + 1)))}"
                + (f" (got {layers})" if layers is not None else "")
            )
        places = {_hook_point(layer): place for place, layer in enumerate(layers)}
        self._places = {name: places[name] for name in chosen(list(places), options.hook_points, path)}
        self.shape = Shape(
            hook_points={name: int(width) for name in self._places},
            dtype=dtype_name([info[STATES].dtype for info in infos], path),
            part_names=[file.stem for file in self._files],
            part_rows=[info[STATES].shape[0] for info in infos],
            documents=True,
            has_tokens=True,
            files=self._files,
        )

    def read(self, part: int, start: int, stop: int) -> Rows:
        states = read_slice(self._files[part], STATES, start, stop)
        activations = {name: states[:, place] for name, place in self._places.items()}
        return Rows(activations, read_slice(self._files[part], _TOKENS, start, stop).numpy())

    def document(self, part: int) -> np.ndarray:
        return read_slice(self._files[part], _TOKENS, 0, self.shape.part_rows[part]).numpy()


def check_layout(file: Path, shapes: Mapping[str, Sequence[int]]) -> None:
    """Raise `StoreError` unless a file's tensors have the names and shapes of hidden states."""
    if STATES not in shapes or _TOKENS not in shapes:
        raise StoreError(
            f"'{file}' holds {', '.join(shapes)}; vLLM's files of hidden states hold {STATES} and {_TOKENS}"
        )
    states, tokens = tuple(shapes[STATES]), tuple(shapes[_TOKENS])
    if len(states) != 3 or tokens != states[:1]:
        raise StoreError(
            f"'{file}' holds {STATES} {list(states)} and {_TOKENS} {list(tokens)}; expected [tokens, layers, "
            "hidden] and [tokens]"
        )


def hidden_states_of(
    file: Path, tensors: Mapping[str, Tensor] | None, tokens: Int32[np.ndarray, " context"], n_layers: int
) -> Float[Tensor, "context layers hidden"]:
    """Return the hidden states of one request, from its file unless its tensors are given.

    Raises:
        StoreError: they are not those of these tokens, or not of so many layers.
    """
    if tensors is None:
        with reading_foreign(file):
            tensors = load_file(file)
    check_layout(file, {name: tensor.shape for name, tensor in tensors.items()})
    states = tensors[STATES].cpu()
    if not np.array_equal(tensors[_TOKENS].cpu().numpy(), tokens):
        raise StoreError(f"'{file}' holds the hidden states of other tokens than those of its request")
    if states.shape[1] != n_layers:
        raise StoreError(f"'{file}' holds {states.shape[1]} layers; {n_layers} were asked for")
    return states


def _hook_point(layer: int) -> str:
    return f"blocks.{layer - 1}.resid_post" if layer else "blocks.0.resid_pre"


def _is_in(path: Path) -> bool:
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))[:1]
    return bool(files) and files[0].suffix == ".safetensors" and {STATES, _TOKENS} == tensors_of(files[0]).keys()


FORMAT = Format("vllm", _is_in, HiddenStates)
