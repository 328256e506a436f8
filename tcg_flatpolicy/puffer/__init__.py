"""All that is known about PufferLib: its policies, its trainer's questions, its trainer's state."""

from tcg_flatpolicy.puffer.config import close_vecenv, config, trainer
from tcg_flatpolicy.puffer.contract import MISSING_PUFFERLIB, check_contract, compensated
from tcg_flatpolicy.puffer.decisions import Decisions, EntropyTarget, decisions
from tcg_flatpolicy.puffer.face import LegalNormal
from tcg_flatpolicy.puffer.games import WinRate, play_games
from tcg_flatpolicy.puffer.loading import load
from tcg_flatpolicy.puffer.next_generation import NextGenerationPolicy
from tcg_flatpolicy.puffer.play import Greedy, RandomLegal, TopK
from tcg_flatpolicy.puffer.policy import FlatPolicy, Policy, RecurrentPolicy
from tcg_flatpolicy.puffer.replay import recorded
from tcg_flatpolicy.puffer.trainer_state import (
    restore_trainer,
    resume_trainer,
    save_trainer,
    trainer_state,
)

__all__ = [
    "MISSING_PUFFERLIB",
    "Decisions",
    "EntropyTarget",
    "FlatPolicy",
    "Greedy",
    "LegalNormal",
    "NextGenerationPolicy",
    "Policy",
    "RandomLegal",
    "RecurrentPolicy",
    "TopK",
    "WinRate",
    "check_contract",
    "close_vecenv",
    "compensated",
    "config",
    "decisions",
    "load",
    "play_games",
    "recorded",
    "restore_trainer",
    "resume_trainer",
    "save_trainer",
    "trainer",
    "trainer_state",
]
