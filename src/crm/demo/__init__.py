"""The demo: seed data, and ``make demo`` with simulated traffic and outages."""
