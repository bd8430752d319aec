"""What runs below the layers: formulations of convolution and pooling, the tags by which layers are
found in a traced computation, and the compiler and allocator options of the platform.
"""
