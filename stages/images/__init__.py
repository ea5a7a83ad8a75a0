"""Images: where they come from, how they are listed and decoded."""
