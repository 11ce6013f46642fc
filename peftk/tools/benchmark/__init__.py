"""`peftk bench`: latency compared with nn.Linear and HF PEFT, after a check of every result. See docs/benchmarks.md."""
