"""Read activations with nnsight, and make a store of them with tokens, roles and documents.

    python examples/harvest_with_nnsight.py [MODEL] [OUTPUT]

Each text is a document, cut into contexts; a BOS begins each context. nnsight returns the output of a block, which is
`blocks.1.resid_post`, and any other value of its trace can be stored in the same way. Held-out documents are chosen by
hash, so that no document is both trained on and evaluated. Needs nnsight (pip install nnsight).
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from thresher import ActivationStoreWriter

MODEL = Path(__file__).parents[1] / "models" / "stdlib-lm"
TEXTS = Path(__file__).parents[1] / "docs"
BLOCK, CONTEXT_SIZE, BATCH = 1, 128, 8
PLACED, TEXT = 0, 1  # roles: a BOS that was put before the text, and the text (docs/FORMAT.md)
HELD_OUT = 20  # one document of so many


def contexts_of(tokenizer: Any, bos: int) -> list[tuple[int, str, int, np.ndarray, np.ndarray]]:
    """Return number, name, hash, tokens and positions of each context; a rest that fills no context is left out."""
    found = []
    for number, path in enumerate(sorted(TEXTS.glob("*.md"))):
        tokens = tokenizer(path.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
        digest = int.from_bytes(hashlib.blake2b(np.array(tokens, np.int32).tobytes(), digest_size=8).digest(), "big")
        for start in range(0, len(tokens) - CONTEXT_SIZE + 2, CONTEXT_SIZE - 1):
            part = tokens[start : start + CONTEXT_SIZE - 1]
            positions = np.arange(start, start + CONTEXT_SIZE)  # the BOS has position 0, the text is numbered from 1
            positions[0] = 0
            found.append((number, path.name, digest >> 1, np.array([bos, *part], np.int32), positions))
    return found


def main(model: str | Path, output: Path) -> Path:
    try:
        from nnsight import LanguageModel
    except ImportError:
        raise SystemExit("error: nnsight is not installed; pip install nnsight") from None
    lm = LanguageModel(str(model), device_map="cpu", dispatch=True, dtype=torch.float32)
    bos = lm.tokenizer.bos_token_id if lm.tokenizer.bos_token_id is not None else lm.tokenizer.eos_token_id
    contexts = contexts_of(lm.tokenizer, bos)
    name, width = f"blocks.{BLOCK}.resid_post", lm.config.hidden_size
    writer = ActivationStoreWriter(
        output / "store",
        {name: width},
        context_size=CONTEXT_SIZE,
        dtype="float32",
        mask_token_ids=[bos],
        roles=True,
        metadata={"model": str(model), "tokenizer": str(model)},
    )
    with writer:  # a killed process resumes at n_committed_contexts
        for first in range(writer.n_committed_contexts, len(contexts), BATCH):
            batch = contexts[first : first + BATCH]
            tokens = np.stack([context[3] for context in batch])
            with torch.no_grad(), lm.trace(torch.from_numpy(tokens).long()):
                saved = lm.transformer.h[BLOCK].output.save()
            activations = getattr(saved, "value", saved)
            activations = activations[0] if isinstance(activations, tuple) else activations
            roles = np.full(tokens.shape, TEXT, np.int8)
            roles[:, 0] = PLACED
            writer.append(
                {name: activations},
                tokens,
                held_out=[context[2] % HELD_OUT == 0 for context in batch],
                documents=np.repeat([[context[0]] for context in batch], CONTEXT_SIZE, axis=1),
                positions=np.stack([context[4] for context in batch]),
                roles=roles,
                document_info={context[0]: (context[2], context[1]) for context in batch},
            )
    print(f"stored {len(contexts) * CONTEXT_SIZE:,} rows of {contexts[-1][0] + 1} documents in '{output / 'store'}'")
    return output / "store"


if __name__ == "__main__":
    main(*sys.argv[1:2] or [MODEL], Path(sys.argv[2] if len(sys.argv) > 2 else "runs/examples/harvest_with_nnsight"))
