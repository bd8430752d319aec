"""The data sets, one file each with `load(config)`; and what TFDS keeps on disk of them."""
