"""OpenAI's HTTP API over an Engine or an Embedder: `peftk serve MODEL --adapters DIR`. docs/http.md describes it."""
