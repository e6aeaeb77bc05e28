"""What this process keeps in its own memory: answers, and what it knows of generations."""
