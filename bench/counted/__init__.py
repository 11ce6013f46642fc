"""`python -m bench.counted`: counts launches, bytes and products of a linear layer, for peftk and other libraries.

`docs/counted.md` explains the method and shows a run.

Nothing is run or measured here. `lora_linear.py` and `lora_wgrad.py` compute in closed form what peftk's launches do;
tests compare that with what Triton's interpreter executes. `peers.py` models published kernels from their source.
"""
