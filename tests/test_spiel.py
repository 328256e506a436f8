"""OpenSpiel's games: what they list and pay, and dou dizhu's ids as tuples."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

pyspiel = pytest.importorskip("pyspiel", reason="open_spiel is not installed")

import tcg_flatpolicy as fp  # noqa: E402
from tcg_flatpolicy.games import dou_dizhu  # noqa: E402
from tcg_flatpolicy.games.spiel import SpielGames, tuples_of  # noqa: E402


def at_random(env: SpielGames, rng: np.random.Generator) -> Any:
    """A listed tuple of each row, zeros in a row without one."""
    records = env.observations.view(env.observation_dtype)[:, 0]
    drawn = (rng.random(len(records)) * records["n_legal"]).astype(int)
    return records["legal"][np.arange(len(records)), drawn].astype(np.int64)


@pytest.mark.parametrize("game", ["kuhn_poker", "leduc_poker", "tic_tac_toe", "liars_dice"])
def test_rows_list_what_the_engine_lists_and_get_what_it_pays(game: str) -> None:
    env = SpielGames(game, opponents=None, num_games=5)
    assert env.agents_per_game == 2
    rng = np.random.default_rng(0)
    env.reset(3)
    finished = 0
    for _ in range(60):
        legal = env.legal_layout.read(torch.from_numpy(env.observations))
        states = [one.state for one in env._games]
        for number, state in enumerate(states):
            for player in (0, 1):
                row = legal[2 * number + player : 2 * number + player + 1]
                mine = state.legal_actions() if state.current_player() == player else []
                assert row.actions[:, 0].tolist() == mine
        before = [state.clone() for state in states]
        actions = at_random(env, rng)
        _, rewards, terminals, _, infos = env.step(actions)
        paid: list[float] = []
        for number, state in enumerate(before):
            state.apply_action(int(actions[2 * number + state.current_player(), 0]))
            over = state.is_terminal()
            assert terminals[2 * number : 2 * number + 2].tolist() == [over, over]
            wanted = state.returns() if over else [0.0, 0.0]
            assert rewards[2 * number : 2 * number + 2].tolist() == wanted
            paid += state.returns() if over else []
        assert [x for info in infos for x in info["episode_return"]] == paid
        finished += len(paid) // 2
    assert finished > 20


def test_one_learner_is_always_to_move() -> None:
    env = SpielGames("leduc_poker", num_games=40, seed=1)
    rng = np.random.default_rng(0)
    env.reset(1)
    seats = set()
    for _ in range(30):
        records = env.observations.view(env.observation_dtype)[:, 0]
        assert (records["n_legal"] > 0).all()
        assert [one.state.current_player() for one in env._games] == records["seat"].tolist()
        seats |= set(records["seat"].tolist())
        env.step(at_random(env, rng))
    assert seats == {0, 1}
    fixed = SpielGames("leduc_poker", seat=1, num_games=4)
    fixed.reset(1)
    assert set(fixed.observations.view(fixed.observation_dtype)["seat"].ravel()) == {1}


def test_a_seed_gives_the_same_games() -> None:
    def run() -> list[Any]:
        env = SpielGames("leduc_poker", num_games=6)
        rng = np.random.default_rng(2)
        env.reset(7)
        return [
            (env.observations.copy(), env.step(at_random(env, rng))[1].copy()) for _ in range(40)
        ]

    for (seen, paid), (again, as_much) in zip(run(), run(), strict=True):
        assert np.array_equal(seen, again)
        assert np.array_equal(paid, as_much)


def test_chance_is_as_the_game_says() -> None:
    """Kuhn poker's two cards: six deals, equally likely; a chi-square of 6,000."""
    env = SpielGames("kuhn_poker", opponents=None, num_games=6000)
    env.reset(5)
    deals = [tuple(one.state.history()) for one in env._games]
    kinds, counts = np.unique(deals, axis=0, return_counts=True)
    assert len(kinds) == 6
    assert ((counts - 1000) ** 2 / 1000).sum() < 30.9  # 1 in 100,000 with five degrees of freedom


def test_what_is_refused() -> None:
    spec = fp.ActionSpec([fp.Primary("a", fp.Index("x", 2)), fp.Primary("b")])
    with pytest.raises(ValueError, match="ids 0 and 2 have the same tuple"):
        tuples_of([[0, 0], [0, 1], [0, 0]], 3, spec)
    with pytest.raises(ValueError, match=r"with row for id: row 1.*b does not use this slot"):
        tuples_of([[0, 0], [1, 1], [1, 0]], 3, spec)
    with pytest.raises(ValueError, match="tuples of 1 values, and the spec's have 2"):
        tuples_of([[0], [1], [2]], 3, spec)
    with pytest.raises(TypeError, match="give both or none"):
        SpielGames("kuhn_poker", spec=spec)
    with pytest.raises(TypeError, match="players move at the same time"):
        SpielGames("matrix_rps")
    with pytest.raises(ValueError, match=r"seat=2: it is one of 0\.\.1"):
        SpielGames("kuhn_poker", seat=2)
    with pytest.raises(ValueError, match="num_games must be at least 1"):
        SpielGames("kuhn_poker", num_games=0)
    small = SpielGames("tic_tac_toe", room=5)
    with pytest.raises(ValueError, match=r"has \d legal actions.*room=\d or more"):
        small.reset(0)
    env = SpielGames("leduc_poker", num_games=2)
    env.reset(0)
    with pytest.raises(ValueError, match=r"row 0: \(7,\) is not legal"):
        env.step(np.array([[7], [1]]))


def test_to_tuple_may_be_a_function() -> None:
    spec = fp.ActionSpec([fp.Primary(f"row {k}", fp.Index("column", 3)) for k in range(3)])
    env = SpielGames("tic_tac_toe", spec=spec, to_tuple=lambda k: divmod(k, 3), opponents=None)
    rng = np.random.default_rng(0)
    env.reset(0)
    for _ in range(30):
        env.step(at_random(env, rng))


# ---- dou dizhu


def test_the_file_holds_what_the_engine_says() -> None:
    assert np.array_equal(dou_dizhu.tuples(), dou_dizhu.ask_engine())
    assert len(np.unique(dou_dizhu.tuples(), axis=0)) == 26057


def test_a_play_takes_the_cards_that_it_names() -> None:
    """The hand after a play is the hand before, less the tuple's cards."""
    env = dou_dizhu.make(30, seed=3)
    rng = np.random.default_rng(4)
    env.reset(3)
    for _ in range(40):
        states = [one.state.clone() for one in env._games]
        actions = at_random(env, rng)
        for state, action in zip(states, actions, strict=True):
            if action[0] != 2:
                continue
            player = state.current_player()
            before = hand_of(state, player)
            state.apply_action(env._ids[action.astype(env._tuples.dtype).tobytes()])
            if not state.is_terminal():
                after = hand_of(state, player)
                assert (before - after).tolist() == action[1:16].tolist()
        env.step(actions)


def hand_of(state: Any, player: int) -> Any:
    """(15,) cards of each rank in a player's hand, as the engine writes it."""
    words = state.observation_string(player).split("\n")[0].removeprefix("My hand ")
    words = words.replace("(BWJ)", "b").replace("(CJ)", "r")
    return np.array([words.count(rank) for rank in dou_dizhu.RANKS])


@pytest.mark.integration
def test_it_trains(trainers: Any) -> None:
    env = dou_dizhu.make(16, seed=1)
    from pufferlib import vector

    vecenv = vector.make(dou_dizhu.make, env_kwargs={"num_games": 16}, backend=vector.Serial)
    trainer = trainers(vecenv, fp.FlatPolicy(env, hidden_size=32))
    for _ in range(3):
        trainer.evaluate()
        trainer.train()
    assert abs(float(trainer.ratio.mean()) - 1) < 0.2
