"""Statistics for operators: what processes publish, how it is read back, and how it is shown.

``shapes`` defines what is published and its bytes, ``report`` fills it in for this process,
``publisher`` writes and reads it on the cache server. ``rows`` and ``metrics`` convert it for the
dashboard and for exporters.
"""
