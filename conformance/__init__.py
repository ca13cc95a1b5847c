"""Checks any implementation of the spec against its goldens, case by case, and times it."""

from conformance.runner import Result, UsageError, check, check_backend

__all__ = ["Result", "UsageError", "check", "check_backend"]
