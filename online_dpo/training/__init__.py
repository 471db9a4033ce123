"""Training a policy: supervised and by preferences. Knows nothing of rounds or run directories."""
