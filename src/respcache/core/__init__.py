"""The decisions of the cache, as pure code: no I/O, no asyncio, no clock, no randomness.

Modules here import no other part of respcache.
"""
