"""pi0rl: reinforcement learning for pi0 policies on the LIBERO benchmark."""

__version__ = "0.1.0"
