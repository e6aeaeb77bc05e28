"""What the cache counts and traces."""
