"""Files on disk: written whole, locked, hashed, and read tensor by tensor; and what the machine has."""
