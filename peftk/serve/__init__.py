"""Serving: many requests in one batch, each with an adapter of its own. Needs `pip install 'peftk[serve]'`.

store = AdapterStore(model, "adapters/")
with Engine(model, store, tokenizer=tokenizer) as engine:
    engine.generate([Request("Once", adapter="alice"), Request("Once", adapter="bob")])
"""

from peftk.serve.adapter_store import AdapterStore, Lease, StoreStats
from peftk.serve.embedder import Embedder, EmbedderStats, EmbeddingJob, Embeddings
from peftk.serve.engine import Engine, EngineStats
from peftk.serve.generation import Generation
from peftk.serve.requests import Completion, QueueFullError, Request, Token

__all__ = [
    "AdapterStore",
    "Completion",
    "Embedder",
    "EmbedderStats",
    "EmbeddingJob",
    "Embeddings",
    "Engine",
    "EngineStats",
    "Generation",
    "Lease",
    "QueueFullError",
    "Request",
    "StoreStats",
    "Token",
]
