"""What is done to pixels: augmentation, mixing, normalisation."""
