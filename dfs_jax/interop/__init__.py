"""PyTorch weights in and out: `torch.py` converts, `names.py` holds the official names,
`files.py` reads and writes weight files, `python -m dfs_jax.interop` is the command.
"""
