"""Verification of a finished run: hashes of its files, steps made again, and its evaluation."""

from mvlm.verify.verify import verify_run

__all__ = ["verify_run"]
