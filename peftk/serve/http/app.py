"""The ASGI application of a server."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from fastapi import FastAPI
from fastapi.responses import Response

from peftk.serve.http import completions, embeddings, errors, models
from peftk.serve.http.limits import Limits
from peftk.serve.http.metrics import Metrics
from peftk.serve.http.middleware import Guarded, Measured, Received
from peftk.serve.http.security import Keys
from peftk.serve.http.served import Served


def make_app(served: Served, limits: Limits, keys: Keys) -> FastAPI:
    """An application that serves a model; `served` is closed when it ends."""
    metrics = Metrics(served)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        try:
            yield
        finally:
            served.close()

    app = FastAPI(title="peftk", lifespan=lifespan, openapi_url=None, redirect_slashes=False)
    errors.install(app)

    @app.get("/health")
    async def health() -> Response:
        return Response(status_code=200 if served.alive else 503)

    @app.get("/metrics")
    def measured() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    app.include_router(models.router(served, limits))
    if served.engine is not None:
        app.include_router(completions.router(served, limits, metrics))
    if served.embedder is not None:
        app.include_router(embeddings.router(served, limits))
    # the last one is the outermost
    app.add_middleware(Received, limits=limits)
    app.add_middleware(Guarded, keys=keys)
    app.add_middleware(Measured, metrics=metrics)
    return app
