"""Using a trained multi-exit network: which exit answers which image, and running it that way.

Imports only jax, flax and numpy, so that answers can be served without the training stack.
"""
