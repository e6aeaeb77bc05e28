"""For tests of any cache: record what happened (``history``), decide whether a read was stale
(``checker``). docs/checker.md."""
