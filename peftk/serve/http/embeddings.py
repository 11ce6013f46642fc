"""POST /v1/embeddings."""

from __future__ import annotations

import asyncio
import base64

from fastapi import APIRouter
from fastapi.responses import JSONResponse
from torch import Tensor

from peftk.serve.embedder import EmbeddingJob
from peftk.serve.http import wire
from peftk.serve.http.errors import APIError
from peftk.serve.http.limits import Limits
from peftk.serve.http.served import Served


def router(served: Served, limits: Limits) -> APIRouter:
    assert served.embedder is not None
    routes, embedder = APIRouter(), served.embedder

    @routes.post("/v1/embeddings")
    async def embeddings(body: wire.EmbeddingBody) -> JSONResponse:
        adapter, texts = served.adapter(body.model), wire.several(body.input)
        if len(texts) > limits.prompts:
            raise APIError(400, f"input: expected at most {limits.prompts} texts, got {len(texts)}", param="input")
        if body.dimensions not in (None, embedder.dimensions):
            message = f"dimensions: expected {embedder.dimensions}, the model's, got {body.dimensions}"
            raise APIError(400, message, param="dimensions")
        timeout = min(limits.request_seconds, body.timeout or limits.request_seconds)
        work = asyncio.get_running_loop().run_in_executor(None, embedder.submit, texts, adapter, timeout)
        try:
            job: EmbeddingJob = await asyncio.shield(work)
        except asyncio.CancelledError:  # the client has left meanwhile; the thread goes on
            work.add_done_callback(lambda done: None if done.exception() else done.result().cancel())
            raise
        except Exception as error:
            raise served.error(error, body.model) from error
        try:
            found = await asyncio.wrap_future(job.future)
        except Exception as error:
            raise served.error(error, body.model) from error
        finally:
            job.cancel()
        data = [
            {"object": "embedding", "index": index, "embedding": _written(vector, body.encoding_format)}
            for index, vector in enumerate(found.vectors.unbind())
        ]
        used = {"prompt_tokens": found.tokens, "total_tokens": found.tokens}
        return JSONResponse({"object": "list", "data": data, "model": body.model, "usage": used})

    return routes


def _written(vector: Tensor, encoding: str) -> str | list[float]:
    """base64 is of the fp32 numbers, the low byte first."""
    if encoding == "base64":
        return base64.b64encode(vector.numpy().astype("<f4").tobytes()).decode()
    return vector.tolist()
