"""Every operation in plain torch: the specification that kernels, tests and benchmarks are compared with."""
