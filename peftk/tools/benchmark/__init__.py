"""`peftk bench`: latency beside nn.Linear and HF PEFT, checked before it is timed. `docs/benchmarks.md` says how."""
