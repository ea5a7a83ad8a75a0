"""The artifact cache: keys, code fingerprints, digests of external files, manifests."""
