"""Plans carried out: written, checked and hashed, in local processes or on a Ray cluster."""
