"""For tests of applications (docs/testing.md).

``servers`` starts embedded servers, ``history`` and ``checker`` record and check histories of any
cache, and ``store_contract`` tests a store.
"""
