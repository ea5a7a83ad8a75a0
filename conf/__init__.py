"""Typed settings: YAML in, frozen pydantic models out. Nothing here imports torch."""
