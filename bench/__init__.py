"""Benches: one module a claim, each a function that yields figures. `python -m bench` runs them all."""
