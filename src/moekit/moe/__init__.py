"""The mixture-of-experts layer: router, dispatch, experts, balance. Pure maths: no collectives, no files."""
