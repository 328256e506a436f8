"""Proof that an environment's legal lists and a policy's actions are right, before training."""

from tcg_flatpolicy.verify.codes import CODES, Code
from tcg_flatpolicy.verify.findings import AuditError, Check, Finding, Report

__all__ = ["CODES", "AuditError", "Check", "Code", "Finding", "Report"]
