"""One training run: configuration made into objects, state, step, loop, and its workdir."""
