"""What a server serves: a model with its adapters, by their names."""

from __future__ import annotations

import dataclasses
import time

from peftk.serve.adapter_store import AdapterStore
from peftk.serve.embedder import Embedder
from peftk.serve.engine import Engine
from peftk.serve.http import errors
from peftk.serve.http.errors import APIError


@dataclasses.dataclass(frozen=True)
class Served:
    """A model under its name, and its adapters under theirs. One of `engine` and `embedder` is None.

    Raises ValueError if an adapter has the model's name.
    """

    name: str
    store: AdapterStore
    engine: Engine | None = None
    embedder: Embedder | None = None
    since: int = dataclasses.field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        if (self.engine is None) == (self.embedder is None):
            raise TypeError("served: expected an engine or an embedder, got both or none")
        if self.name in self.store:
            raise ValueError(f"name: expected one that no adapter has, got {self.name!r}; choose another")

    def adapter(self, model: str) -> str | None:
        """The adapter that a client names, None for the base model. Raises APIError unless it is exactly a name."""
        if model == self.name:
            return None
        if model not in self.store:
            raise APIError(404, "The model does not exist.", param="model", code="model_not_found")
        return model

    def error(self, error: BaseException, model: str) -> APIError:
        """What a client that named a model is told about an error of the engine or the embedder."""
        if isinstance(error, ValueError):
            self.adapter(model)  # it may have gone since the client's request was looked at
        return errors.of(error)

    @property
    def alive(self) -> bool:
        """Whether the model's thread runs."""
        worker = self.engine or self.embedder
        return worker is not None and worker.alive

    def close(self) -> None:
        """Ends engine, embedder and store; requests that are left are cancelled."""
        if self.engine is not None:
            self.engine.close(drain=False)
        if self.embedder is not None:
            self.embedder.close()
        self.store.close()
