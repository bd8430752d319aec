"""Image files as pixels: the one meaning of a file, for training, evaluation and answers alike."""

# Of files that are read as images, in letters of any size; what is in a file decides its format.
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
