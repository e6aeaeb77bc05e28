"""Decisions of the cache: pure code. No I/O, no asyncio, no clock and no randomness of its own;
imports nothing else of ours."""
