"""The data sets, one file each, and how TFDS prepares them."""
