"""Hidden states that vLLM's `ExampleHiddenStatesConnector` wrote: one safetensors file per request.

A file holds `hidden_states` `[tokens, layers, hidden]` in the model's data type and `token_ids` `[tokens]`. The files
do not say which layers these are: that is the engine's `eagle_aux_hidden_state_layer_ids`. Id `i` is the residual
stream after `i` blocks, without the final norm; id 0 is the embedding.
https://docs.vllm.ai/en/latest/features/speculative_decoding/extract_hidden_states/
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ...core.errors import StoreError
from .safetensors_parts import read_slice, tensors_of
from .source import Format, Options, Rows, Shape, chosen, dtype_name, shared_value
from .tensor_folder import safetensors_files

STATES, _TOKENS = "hidden_states", "token_ids"


class HiddenStates:
    """Files of requests, in the order of their names; each is a document."""

    def __init__(self, path: Path, options: Options) -> None:
        self._files = safetensors_files(path)
        infos = [tensors_of(file) for file in self._files]
        for file, info in zip(self._files, infos, strict=True):
            if STATES not in info or _TOKENS not in info:
                raise StoreError(
                    f"'{file}' holds {', '.join(info)}; vLLM's files of hidden states hold {STATES} and {_TOKENS}"
                )
            states, tokens = info[STATES].shape, info[_TOKENS].shape
            if len(states) != 3 or tokens != states[:1]:
                raise StoreError(
                    f"'{file}' holds {STATES} {list(states)} and {_TOKENS} {list(tokens)}; expected [tokens, layers, "
                    "hidden] and [tokens]"
                )
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


def _hook_point(layer: int) -> str:
    return f"blocks.{layer - 1}.resid_post" if layer else "blocks.0.resid_pre"


def _is_in(path: Path) -> bool:
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))[:1]
    return bool(files) and files[0].suffix == ".safetensors" and {STATES, _TOKENS} == tensors_of(files[0]).keys()


FORMAT = Format("vllm", _is_in, HiddenStates)
