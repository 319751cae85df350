"""Published data sets of downstream tasks. A sample is one question; questions about an image share its bytes."""
