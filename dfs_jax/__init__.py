"""dfs_jax: training multi-exit networks in JAX. Importing the package imports nothing else."""
