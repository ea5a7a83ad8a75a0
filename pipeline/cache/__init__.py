"""The one cache: keys, code fingerprints, outside files, artifacts."""
