"""Embed texts by a server that answers as OpenAI's embeddings endpoint does."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import torch
from jaxtyping import Float
from torch import Tensor

from ....shared.core.errors import LlmError, one_line

KEY_VARIABLE = "OPENAI_API_KEY"
ANSWER_SECONDS = 60


class EmbeddingsServer:
    """An embeddings endpoint, such as `http://localhost:8000/v1`; the key is that of OPENAI_API_KEY, if it is set.

    Raises:
        LlmError: the server does not answer, or not with embeddings.
    """

    def __init__(self, url: str, model: str):
        self._url, self._model = url.rstrip("/") + "/embeddings", model
        self.name = f"{model} at {url}"
        self.size = int(self.embed(["text"]).shape[1])

    def embed(self, texts: Sequence[str]) -> Float[Tensor, "texts size"]:
        """Return unit vectors, in float32 on the CPU."""
        headers = {"content-type": "application/json"}
        if key := os.environ.get(KEY_VARIABLE):
            headers["authorization"] = f"Bearer {key}"
        body = json.dumps({"model": self._model, "input": [text or " " for text in texts]}).encode()
        try:
            with urlopen(Request(self._url, body, headers), timeout=ANSWER_SECONDS) as answer:
                rows = sorted(json.loads(answer.read())["data"], key=lambda row: row["index"])
                vectors = torch.tensor([row["embedding"] for row in rows], dtype=torch.float32)
        except HTTPError as error:
            raise LlmError(f"the embeddings server '{self._url}' refuses the request: {error.code}") from None
        except (URLError, OSError) as error:
            raise LlmError(f"the embeddings server '{self._url}' does not answer: {one_line(error)}") from None
        except (ValueError, KeyError, TypeError) as error:
            raise LlmError(f"'{self._url}' did not answer with embeddings: {one_line(error)}") from None
        if vectors.ndim != 2 or len(vectors) != len(texts):
            raise LlmError(f"'{self._url}' answered {len(texts)} texts with {list(vectors.shape)} numbers")
        return torch.nn.functional.normalize(vectors, dim=1)
