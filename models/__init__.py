"""Pure PyTorch: tensors in, tensors out. No file, rank, store or server is known here.

Shape legend: B images in a batch · T tokens of an image (raster order) · M patches of an image · P patches of a packed
batch (the sum of M over its images, class positions left out) · D width · H heads · K head width · V codebook size ·
C, h, w channels, height and width of an image or feature map.
"""
