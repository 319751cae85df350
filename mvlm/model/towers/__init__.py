"""Encoders of other libraries behind the interface of ours."""
