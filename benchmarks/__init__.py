"""Measurements of pi0rl beside the reference implementations."""
