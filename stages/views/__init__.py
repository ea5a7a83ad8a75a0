"""Pictures and metrics for people, made from finished artifacts. Views are in no cache key and in no digest."""
