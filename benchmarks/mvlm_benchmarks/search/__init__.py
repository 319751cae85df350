"""Vector engines compared: recall, latency, size and build time at a million vectors."""
