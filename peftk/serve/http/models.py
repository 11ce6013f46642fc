"""GET /v1/models, POST /v1/load_lora_adapter and /v1/unload_lora_adapter."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter
from fastapi.responses import PlainTextResponse

from peftk.checkpoints.files import CheckpointError
from peftk.serve.http.errors import APIError
from peftk.serve.http.limits import Limits
from peftk.serve.http.security import check_new_name, checkpoint_folder
from peftk.serve.http.served import Served
from peftk.serve.http.wire import LoadBody, UnloadBody


def router(served: Served, limits: Limits) -> APIRouter:
    routes = APIRouter()
    changing = asyncio.Lock()  # one load or unload at a time

    def card(name: str) -> dict[str, Any]:
        parent = None if name == served.name else served.name
        return {"id": name, "object": "model", "created": served.since, "owned_by": "peftk", "parent": parent}

    @routes.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card(name) for name in (served.name, *served.store.names)]}

    @routes.get("/v1/models/{model}")
    async def model(model: str) -> dict[str, Any]:
        served.adapter(model)
        return card(model)

    @routes.post("/v1/load_lora_adapter")
    async def load(body: LoadBody) -> PlainTextResponse:
        check_new_name(body.lora_name)
        if served.store.folder is None:
            raise APIError(400, "This server was started without a folder of adapters.", code="no_adapters_folder")
        folder = checkpoint_folder(served.store.folder, body.lora_path)
        async with changing:
            if body.lora_name == served.name:
                raise APIError(400, "lora_name: expected another name than the base model's", param="lora_name")
            if body.lora_name in served.store and not body.load_inplace:
                message = f"The lora adapter '{body.lora_name}' has already been loaded."
                raise APIError(400, message, param="lora_name", code="already_loaded")
            try:
                await asyncio.to_thread(served.store.server.prepare, folder)  # that it fits, before it gets a name
                served.store.add(body.lora_name, folder)
            except CheckpointError as error:
                raise APIError(400, str(error), param="lora_path", code="bad_checkpoint") from error
            served.store.lease(body.lora_name).release()  # begins to read it
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @routes.post("/v1/unload_lora_adapter")
    async def unload(body: UnloadBody) -> PlainTextResponse:
        name, note = body.lora_name, ""
        async with changing:
            if name not in served.store:
                raise APIError(404, "The lora adapter cannot be found.", param="lora_name", code="model_not_found")
            try:
                await asyncio.to_thread(served.store.remove, name, cancel=body.cancel, timeout=limits.drain_seconds)
            except TimeoutError:
                note = " Requests that began with it go on."
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.{note}")

    return routes
