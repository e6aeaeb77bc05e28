"""How a request is answered: plans, lookups, proofs, fills."""
