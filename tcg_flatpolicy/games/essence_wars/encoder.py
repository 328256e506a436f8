"""The encoder for Essence Wars: one vector of the state, and embedded cards and creatures."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from tcg_flatpolicy.encoders import Encoding
from tcg_flatpolicy.games.essence_wars import engine as ew
from tcg_flatpolicy.layout import LegalLayout
from tcg_flatpolicy.table import Lookup

_is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)


class EssenceWarsEncoder(nn.Module):
    """Encodes a state as one vector, and embeds its cards and creatures.

    A card in hand is the learned row of its id. A creature is a linear layer of its record (attack,
    health, whether it can attack, ...) and its sixteen keywords, plus a learned row of its place.
    An empty place is embedded, too. The state lists the ids of the cards on a board in the order of
    play, not by place, with 0 for tokens; so their rows are summed for each board.

    The layout is of observations with the field ``state``. D is hidden_size, E is entity_size.

    Attributes:
        entity_sizes: ``{"hand": (10, E), "ally": (5, E), "enemy": (5, E)}``.
    """

    def __init__(self, layout: LegalLayout, hidden_size: int = 256, entity_size: int = 32) -> None:
        super().__init__()
        self.layout = layout
        self.hidden_size = hidden_size
        sizes = {"hand": ew.HAND, "ally": ew.BOARD, "enemy": ew.BOARD}
        self.entity_sizes = {name: (size, entity_size) for name, size in sizes.items()}
        self.cards = nn.Embedding(ew.CARD_ROWS, entity_size, padding_idx=0)
        self.creature = nn.Linear(ew.CREATURE_SIZE + ew.KEYWORDS, entity_size)
        self.place = nn.Parameter(torch.zeros(2, ew.BOARD, entity_size))
        # Of a player: numbers, and four sums of cards: hand, board, supports and commander.
        player = 5 + 5 * ew.SUPPORTS + 4 + 4 * entity_size
        first = nn.Linear(ew.PLAYERS + 2 * (player + ew.BOARD * entity_size), hidden_size)
        second = nn.Linear(hidden_size, hidden_size)
        self.trunk = nn.Sequential(first, nn.ReLU(), second, nn.ReLU())
        for linear in (self.creature, first, second):
            nn.init.orthogonal_(linear.weight, 2**0.5)
            nn.init.zeros_(linear.bias)
        with torch.no_grad():
            self.cards.weight.mul_(entity_size**-0.5)

    def forward(self, observations: Tensor) -> Encoding:
        """Encodes (B, nbytes) uint8, records of `OBSERVATION_DTYPE`.

        Returns:
            hidden (B, D) float and entities hand (B, 10, E), ally (B, 5, E), enemy (B, 5, E).

        Raises:
            TypeError, ValueError: observations that the layout does not fit.
        """
        state = self.layout.field(observations, "state")
        players = state[:, ew.PLAYERS : ew.CARDS].view(len(state), 2, ew.PLAYER_SIZE)
        numbers, hand = players[..., :5], players[..., 5:15]
        creatures = players[..., 15:75].view(len(state), 2, ew.BOARD, ew.CREATURE_SIZE)
        supports, prepared = players[..., 75:85], players[..., 85:]

        bits = (creatures[..., ew.KEYWORD_COLUMN, None] * 65535).round().int()
        keywords = (bits >> torch.arange(ew.KEYWORDS, device=state.device, dtype=torch.int32)) & 1
        records = [creatures.transpose(0, 1), keywords.transpose(0, 1).to(state.dtype)]
        dtype = self.place.dtype
        units = self.creature(torch.cat(records, dim=3).to(dtype)) + self.place.unsqueeze(1)
        units = torch.relu(units)
        ally, enemy = units.unbind()  # (B, 5, E), contiguous: the scorer gathers from them

        commanders = state[:, ew.COMMANDERS :, None]
        ids = [hand, _board_ids(state, players), supports[..., 2::5], commanders]
        rows = _card_rows(torch.cat(ids, dim=2))  # (B, 2, 10 + 5 + 2 + 1)
        sums = self._sums(rows)
        everything = [state[:, : ew.PLAYERS], numbers, supports, prepared, ally, enemy, sums]
        hidden = self.trunk(torch.cat([part.flatten(1) for part in everything], dim=1).to(dtype))
        cards = Lookup(self.cards.weight, rows[:, 0, : ew.HAND])
        return Encoding(hidden, {"hand": cards, "ally": ally, "enemy": enemy})

    def _sums(self, rows: Tensor) -> Tensor:
        """(B, 2, 18) rows of cards -> (B, 2, 4, E): sums of hand, board, supports, commander."""
        if _is_exporting():  # an export would turn embedding_bag into a loop
            kinds = self.cards(rows).split([ew.HAND, ew.BOARD, ew.SUPPORTS, 1], dim=2)
            return torch.stack([kind.sum(2) for kind in kinds], dim=2)
        first = torch.arange(0, rows.numel(), rows.shape[2], device=rows.device)[:, None]
        on_board = ew.HAND + ew.BOARD
        groups = first + first.new_tensor([0, ew.HAND, on_board, on_board + ew.SUPPORTS])
        # One bag for each group: it sums without a copy of every card's row.
        sums = functional.embedding_bag(
            rows.flatten(), self.cards.weight, groups.flatten(), mode="sum", padding_idx=0
        )
        return sums.view(len(rows), 2, 4, self.cards.embedding_dim)


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
