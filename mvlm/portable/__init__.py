"""Trained models for other runtimes: torch.export, ONNX, the Hugging Face hub, and open_clip's interface."""
