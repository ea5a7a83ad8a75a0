"""The command `dpar`."""
