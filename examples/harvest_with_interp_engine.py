"""Read activations with interp-engine, in transformers or vLLM, and make a store of them with tokens and documents.

    python examples/harvest_with_interp_engine.py [MODEL] [OUTPUT]

Each file is a document, cut into contexts; a rest that fills no context is left out. The addresses are interp-engine's:
here what an MLP reads and writes, on which a transcoder is trained, and the residual stream behind it. Needs
interp-engine (pip install interp-engine; with a GPU 'interp-engine[vllm]', which then runs the model in vLLM).
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import numpy as np
import torch

from thresher import ActivationStoreWriter

MODEL = Path(__file__).parents[1] / "models" / "stdlib-lm"
TEXTS = Path(__file__).parents[1] / "docs"
ADDRESSES = {
    "blocks.1.mlp_in": "mlp_in.1",
    "blocks.1.mlp_out": "mlp_out.1",
    "blocks.1.resid_post": "resid_post.1",
}
CONTEXT_SIZE, BATCH = 128, 8
DTYPE = "float32"  # of the model and the store; bfloat16 on a GPU
HELD_OUT = 20  # one document of so many


def main(model: str | Path, output: Path) -> Path:
    try:
        from interp_engine import capture, load_model
    except ImportError:
        raise SystemExit("error: interp-engine is not installed; pip install interp-engine") from None
    lm = load_model(str(model), dtype=DTYPE)
    paths = sorted(TEXTS.glob("*.md"))
    texts = [path.read_text(encoding="utf-8") for path in paths]
    digests = [hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts]
    hashes = [int.from_bytes(digest, "big") >> 1 for digest in digests]
    cut = [lm.to_tokens(text)[0].cpu().unfold(0, CONTEXT_SIZE, CONTEXT_SIZE) for text in texts]  # with a BOS at first
    tokens = torch.cat(cut)
    documents = [number for number, contexts in enumerate(cut) for _ in contexts]
    starts = [CONTEXT_SIZE * number for contexts in cut for number in range(len(contexts))]
    writer = ActivationStoreWriter(
        output / "store",
        dict.fromkeys(ADDRESSES, lm.d_model),
        context_size=CONTEXT_SIZE,
        dtype=DTYPE,
        mask_token_ids=[lm.tokenizer.bos_token_id],
        metadata={"model": str(model), "tokenizer": str(model)},
    )
    with writer:  # a killed process resumes at n_committed_contexts
        for first in range(writer.n_committed_contexts, len(tokens), BATCH):
            ids, of = tokens[first : first + BATCH], documents[first : first + BATCH]
            cache = capture(lm, ids, list(ADDRESSES.values()))
            writer.append(
                {name: cache[address].cpu() for name, address in ADDRESSES.items()},
                ids,
                held_out=[hashes[number] % HELD_OUT == 0 for number in of],
                documents=np.repeat(np.array(of)[:, None], CONTEXT_SIZE, axis=1),
                positions=np.array(starts[first : first + BATCH])[:, None] + np.arange(CONTEXT_SIZE),
                document_info={number: (hashes[number], paths[number].name) for number in of},
            )
    print(f"stored {tokens.numel():,} rows of {len(set(documents))} documents in '{output / 'store'}'")
    return output / "store"


if __name__ == "__main__":
    given = dict(enumerate(sys.argv))
    main(given.get(1, MODEL), Path(given.get(2, "runs/examples/harvest_with_interp_engine")))
