"""Benchmarks that are part of the checkout, but not of the package."""
