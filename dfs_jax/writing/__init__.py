"""How results leave the process: files written whole or not at all, JSON, tables.

This stands at the bottom: every package may import it, and it needs numpy alone, so that
`early_exit/bundle.py` can use it without the training stack.
"""
