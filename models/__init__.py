"""Pure PyTorch models: tensors in, tensors out. Nothing here reads a file, knows a rank or talks to a server.

Letters of the shapes in all signatures. The test suite checks them at every call (README.md in this folder):

    B  images of a batch; B2 is B, or 2 B with the unconditional half of a guided batch behind it
    T  tokens of an image, in raster order
    S  positions of a sequence: T with a class position, T - 1 without, or fewer
    N  rows of a flattened batch
    P  patches of a packed batch: those of its first image, then of the second, and so on
    G  rows of the packed global sequence: P patches and B class rows
    L  tokens of a patch, padded to the longest
    R  rows that take part in a step; R2 as B2
    D  width
    H  heads
    K  width of a head
    F  rotated pairs of a head: K / 2
    V  codebook size
    C, h, w              channels, height and width of a feature map
    3, height, width     pixels

A letter that stands for something else in one file is explained there.
"""
