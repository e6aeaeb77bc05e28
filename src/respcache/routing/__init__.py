"""Which routes there are, and which of them are cached."""
