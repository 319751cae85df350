"""Recognition with frozen features: zero-shot by class names, linear probe, few-shot."""
