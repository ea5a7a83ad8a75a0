"""Images: sources, listing, decoding, and conversion to tensors."""
