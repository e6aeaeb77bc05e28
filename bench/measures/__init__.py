"""What is measured besides hits: one module each, with a function that measures and one that makes
the table."""
