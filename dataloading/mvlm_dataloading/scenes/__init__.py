"""Composed scenes with known truth: real artwork, generated layout, and questions that text alone cannot answer."""
