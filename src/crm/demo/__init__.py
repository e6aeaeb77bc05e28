"""Demo data, and the demo: traffic, outages, a check of every response."""
