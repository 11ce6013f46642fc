"""`python -m bench.counted`: launches, bytes and products of a linear, beside models of other libraries.

`docs/counted.md` says how and shows a run.

Nothing is run or measured here: `lora_linear.py` and `lora_wgrad.py` say what peftk's launches do, in closed form, and
tests prove them equal to what the interpreter sees; `peers.py` says it of published kernels, from their source.
"""
