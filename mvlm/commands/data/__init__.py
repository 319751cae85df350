"""The commands `mvlm data ...` of downstream tasks."""
