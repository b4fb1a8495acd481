"""Arithmetic on the shape of a model: what is stored, what is computed, does it fit, how fast can it be; no torch."""
