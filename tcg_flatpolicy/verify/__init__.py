"""Proof that an environment's legal lists and a policy's actions are right, before training."""

from tcg_flatpolicy.verify.codes import CODES, Code
from tcg_flatpolicy.verify.enumeration import (
    Comparison,
    compare_enumerations,
    enumerate_legal,
    list_from_head_masks,
    whole,
)
from tcg_flatpolicy.verify.environment import audit_env
from tcg_flatpolicy.verify.findings import AuditError, Check, Finding, Report
from tcg_flatpolicy.verify.monitor import IllegalActionError, LegalityMonitor
from tcg_flatpolicy.verify.policy import audit_policy
from tcg_flatpolicy.verify.trainer import audit_trainer

__all__ = [
    "CODES",
    "AuditError",
    "Check",
    "Code",
    "Comparison",
    "Finding",
    "IllegalActionError",
    "LegalityMonitor",
    "Report",
    "audit_env",
    "audit_policy",
    "audit_trainer",
    "compare_enumerations",
    "enumerate_legal",
    "list_from_head_masks",
    "whole",
]
