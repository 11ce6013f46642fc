"""Weights in packed form: what each format holds, and how it is read."""
