"""The encoder for Essence Wars: one vector of the state, and embedded cards and creatures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tcg_flatpolicy.encoders import Cards, Declared, Entities, Number
from tcg_flatpolicy.games.essence_wars import engine as ew
from tcg_flatpolicy.layout import LegalLayout

_CARDS = ("hand", "board", "supports", "commander")
"""Of each player, in the state's vector as the sums of their rows."""
_NAMES_BEFORE = {"cards.weight": "tables.cards.weight", "place": "places.creature"}
_NAMES_BEFORE |= {f"creature.{one}": f"linears.creature.{one}" for one in ("weight", "bias")}


class EssenceWarsEncoder(Declared):
    """Encodes a state as one vector, and embeds its cards and creatures.

    A card in hand is the learned row of its id. A creature is a linear layer of its record (attack,
    health, whether it can attack, ...) and its sixteen keywords, plus a learned row of its place.
    An empty place is embedded, too: its record says so. The state lists the ids of the cards on a
    board in the order of play, not by place, with 0 for tokens; so their rows are summed for each
    board.

    The layout is of observations with the field ``state``. D is hidden_size, E is entity_size.

    Attributes:
        entity_sizes: ``{"hand": (10, E), "ally": (5, E), "enemy": (5, E)}``.
    """

    def __init__(self, layout: LegalLayout, hidden_size: int = 256, entity_size: int = 32) -> None:
        creatures = [
            Entities(
                name,
                ew.BOARD,
                Number(f"{name}.record"),
                Number(f"{name}.keywords"),
                kind="creature",
                places=True,
                pool="flat",
            )
            for name in ("ally", "enemy")
        ]
        super().__init__(
            layout,
            *map(Number, ("turn", "players", "supports", "prepared")),
            *creatures,
            *(Cards(f"{who}.{what}", ew.CARD_ROWS) for who in ("me", "other") for what in _CARDS),
            Entities("hand", ew.HAND, Cards("me.hand", ew.CARD_ROWS), pool="none"),
            hidden_size=hidden_size,
            entity_size=entity_size,
        )

    def read(self, observations: Tensor) -> Mapping[str, Tensor]:
        """The state (B, 356) by what it holds."""
        state = self.layout.field(observations, "state")
        players = state[:, ew.PLAYERS : ew.CARDS].view(len(state), 2, ew.PLAYER_SIZE)
        creatures = players[..., 15:75].view(len(state), 2, ew.BOARD, ew.CREATURE_SIZE)
        bits = (creatures[..., ew.KEYWORD_COLUMN, None] * 65535).round().int()
        keywords = (bits >> torch.arange(ew.KEYWORDS, device=state.device, dtype=torch.int32)) & 1
        commanders = state[:, ew.COMMANDERS :, None]
        ids = [players[..., 5:15], _board_ids(state, players), players[..., 77:85:5], commanders]
        rows = _card_rows(torch.cat(ids, dim=2)).split([ew.HAND, ew.BOARD, ew.SUPPORTS, 1], dim=2)
        found = {
            "turn": state[:, : ew.PLAYERS],
            "players": players[..., :5],
            "supports": players[..., 75:85],
            "prepared": players[..., 85:],
        }
        for side, (creature, player) in enumerate((("ally", "me"), ("enemy", "other"))):
            found[f"{creature}.record"] = creatures[:, side]
            found[f"{creature}.keywords"] = keywords[:, side]
            for name, of_both in zip(_CARDS, rows, strict=True):
                found[f"{player}.{name}"] = of_both[:, side]
        return found

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        for before, now in _NAMES_BEFORE.items():
            if prefix + before in state_dict:
                state_dict[prefix + now] = state_dict.pop(prefix + before)
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _board_ids(state: Tensor, players: Tensor) -> Tensor:
    """(B, 356) states, (B, 2, 89) their players -> (B, 2, 5) ids on each board, as played."""
    hand = (players[..., 4] * ew.HAND).round().long()
    creatures = players[..., 15 : 75 : ew.CREATURE_SIZE].sum(dim=2).long()
    held = hand + creatures + players[..., 75:85:5].sum(dim=2).long()
    start = torch.stack([hand[:, 0], held[:, 0] + hand[:, 1]], dim=1)
    place = torch.arange(ew.BOARD, device=state.device)
    at = (start[..., None] + place).clamp(0, ew.MOST_CARDS - 1)
    packed = state[:, ew.CARDS : ew.CARDS + ew.MOST_CARDS]
    ids = packed.gather(1, at.flatten(1)).view_as(at)
    return ids * (place < creatures[..., None])


def _card_rows(ids: Tensor) -> Tensor:
    """Rows of the card table for ids as the state holds them: divided by 6000, 0 for no card.

    The engine numbers the cards of each of its five sets from a full thousand, at present up to 82.
    An id above 99 in its set, or of no set, gets the unused row 1.
    """
    ids = (ids * ew.CARD_ID_SCALE).round().long()
    rows = ids // 1000 * 100 + ids % 1000
    known = (ids == 0) | ((ids >= 1000) & (ids < ew.CARD_ID_SCALE) & (ids % 1000 < 100))
    return torch.where(known, rows, 1)


class Described:
    """What all environments of the game share.

    ``action_spec`` is `SPEC`; ``legal_layout`` says where the legal list lies in an observation.
    """

    action_spec = ew.SPEC
    legal_layout = ew.LAYOUT

    def describe(self, record: np.void) -> str:
        """One observation in words: what each player has."""
        return ew.describe(record["state"])

    def make_encoder(self, hidden_size: int = 256, entity_size: int = 32) -> EssenceWarsEncoder:
        """A new encoder of these observations; sizes as of `EssenceWarsEncoder`."""
        return EssenceWarsEncoder(ew.LAYOUT, hidden_size, entity_size)
