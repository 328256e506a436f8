"""The map of actions, the layout of the state and the environment, held against the real engine."""

import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("pufferlib")
pytest.importorskip("essence_wars")

import pufferlib.vector
from essence_wars._core import PyGame, PyParallelGames

from tcg_flatpolicy.games.essence_wars import (
    DECKS,
    INDEX_TO_TUPLE,
    OBSERVATION_DTYPE,
    SPEC,
    TUPLE_TO_INDEX,
    EssenceWars,
    EssenceWarsEncoder,
)
from tcg_flatpolicy.games.essence_wars import engine as ew
from tcg_flatpolicy.games.essence_wars.encoder import _board_ids, _card_rows
from tcg_flatpolicy.table import as_tensors

pytestmark = pytest.mark.integration

END_TURN = 421


def random_games(count: int) -> Iterator[PyGame]:
    """Each state of some games of random decks, played at random, before its move."""
    rng = np.random.default_rng(0)
    for seed in range(count):
        game = PyGame(*(str(deck) for deck in rng.choice(DECKS, 2)), "attrition")
        game.reset(seed)
        while not game.is_done():
            yield game
            game.step(int(rng.choice(np.flatnonzero(game.action_mask()))))


def own_view(game: PyGame) -> np.ndarray:
    """(356,) the state as the player to move sees it."""
    state = game.observe()
    return ew.second_players_view(state[None])[0] if game.current_player() else state


def drawn(env: EssenceWars, rng: np.random.Generator) -> np.ndarray:
    """(num_games, 4) a legal action of each row, read from the observations alone."""
    records = env.observations.view(OBSERVATION_DTYPE)[:, 0]
    place = (rng.random(len(records)) * records["n_legal"]).astype(int)
    return records["legal"][np.arange(len(records)), place].astype(np.int32)


def trajectory(
    seed: int, steps: int = 60, **kwargs: Any
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    env = EssenceWars(num_games=8, **kwargs)
    env.reset(seed)
    rng, seen, infos = np.random.default_rng(9), [env.observations.copy()], []
    for _ in range(steps):
        infos += env.step(drawn(env, rng))[4]
        seen.append(env.observations.copy())
    return np.stack(seen), infos


# ---- the map of actions


def in_our_words(refusal: str) -> tuple[int, ...]:
    """The tuple that the engine's words for an action mean."""
    name, numbers = re.fullmatch(r"Illegal action: (\w+)(.*)", refusal).groups()  # type: ignore[union-attr]
    values = [int(n) for n in re.findall(r"\d+", numbers)]
    primary = {"PlayCard": 1, "Attack": 2, "UseAbility": 3, "CommanderInsight": 4}
    primary["PlayCardOverload"] = 5
    if name == "UseAbility":
        target = re.search(r"target: (\w+)", numbers).group(1)  # type: ignore[union-attr]
        first = {"NoTarget": 0, "EnemySlot": 1, "AllySlot": 6}[target]
        values = [*values[:2], first + sum(values[2:])]
    return (primary[name], *values, *[0] * (3 - len(values)))


def test_every_index_means_what_the_engine_says() -> None:
    seen: dict[int, tuple[int, ...]] = {}
    for game in random_games(4):
        for index in np.flatnonzero(game.action_mask() == 0).tolist():
            if index not in seen:
                with pytest.raises(ValueError, match="Illegal action") as refusal:
                    game.fork().step(index)
                seen[index] = in_our_words(str(refusal.value))
        # The engine never refuses to end a turn, so it cannot say what 421 is. It is this:
        after = game.fork()
        after.step(END_TURN)
        assert after.is_done() or after.current_player() != game.current_player()
        if len(seen) == 541:
            break
    assert set(range(542)) - set(seen) == {END_TURN}
    for index, action in seen.items():
        assert tuple(INDEX_TO_TUPLE[index]) == action
    assert tuple(INDEX_TO_TUPLE[END_TURN]) == (0, 0, 0, 0)
    assert SPEC.describe(INDEX_TO_TUPLE[END_TURN]) == "end_turn"
    assert SPEC.describe(seen[419]) == "use_ability(ally[4], ability[4], ally[4])"
    assert SPEC.describe(seen[140]) == "attack(ally[4], enemy[0])"


def test_the_map_is_one_to_one_and_within_the_spec() -> None:
    assert SPEC.nvec.tolist() == [6, 10, 12, 11]
    assert INDEX_TO_TUPLE.shape == (542, 4)
    assert (TUPLE_TO_INDEX[SPEC.ravel(INDEX_TO_TUPLE)] == np.arange(542)).all()
    assert (TUPLE_TO_INDEX >= 0).sum() == 542
    assert all(SPEC.explain(action) is None for action in INDEX_TO_TUPLE.tolist())


# ---- the layout of the state


def test_creatures_hand_and_cards_lie_where_the_encoder_reads_them() -> None:
    attacks = cards_played = abilities = empty_attacks = 0
    for game in random_games(12):
        state = own_view(game)
        ids = np.rint(state * ew.CARD_ID_SCALE).astype(int)
        mine, enemy = state[21:81].reshape(5, 12), state[110:170].reshape(5, 12)
        hand, enemy_hand = round(state[10] * 10), round(state[99] * 10)
        for primary, first, second, target in INDEX_TO_TUPLE[game.action_mask() > 0].tolist():
            if primary == 1:
                cards_played += 1
                assert first < hand
                assert ids[11 + first] >= 1000
            elif primary == 2:
                attacks += 1
                assert mine[first, 0] == 1
                assert mine[first, 4] == 1  # can attack
                if enemy[second, 0] == 0:  # hits the player
                    after = game.fork()
                    player = game.current_player()
                    before = game.observe()[(95, 6)[player]]
                    after.step(120 + first * 5 + second)
                    assert after.observe()[(95, 6)[player]] < before
                    empty_attacks += 1
            elif primary == 3:
                abilities += 1
                assert mine[first, 0] == 1
                assert target == 0 or np.concatenate([enemy, mine])[target - 1, 0] == 1
        # The packed cards: own hand, creatures, supports, then the enemy's.
        creatures, supports = int(mine[:, 0].sum()), state[81:91].reshape(2, 5)
        assert (ids[184 : 184 + hand] == ids[11 : 11 + hand]).all()
        start = 184 + hand + creatures
        owned = supports[supports[:, 0] > 0, 2]
        assert (state[start : start + len(owned)] == owned).all()
        start += len(owned)
        assert (ids[start : start + enemy_hand] == ids[100 : 100 + enemy_hand]).all()
        assert (ids[ew.CARDS + ew.MOST_CARDS : 354] == 0).all()
        assert (ids[354:] // 1000 == 5).all()
        assert (np.abs(state[184:] * ew.CARD_ID_SCALE - ids[184:]) < 1e-3).all()
        assert (ids[184:354] % 1000 < 100).all()
    assert min(attacks, cards_played, abilities, empty_attacks) > 100


def test_turning_the_view_twice_changes_nothing_but_the_mover() -> None:
    states = np.stack([game.observe() for game in random_games(3)])
    twice = ew.second_players_view(ew.second_players_view(states))
    states[:, ew.PLAYER_TO_MOVE] = 0
    assert (twice == states).all()
    once = ew.second_players_view(states)
    assert (once[:, 354:] == states[:, [355, 354]]).all()
    assert (once[:, 6:95] == states[:, 95:184]).all()


def test_the_cards_on_a_board_are_found() -> None:
    """A creature card just played is the last of its board's cards."""
    played = 0
    for game in random_games(8):
        player = game.current_player()
        for index in np.flatnonzero(game.action_mask()[:120]).tolist():
            before = game.observe()
            after = game.fork()
            after.step(index)
            state = after.observe()[None]
            players = state[:, 6:184].reshape(1, 2, 89)
            old = before[6:184].reshape(2, 89)[player]
            if players[0, player, 15:75:12].sum() != old[15:75:12].sum() + 1 or after.is_done():
                continue
            board = _board_ids(torch.from_numpy(state), torch.from_numpy(players.copy()))
            on_board = int(players[0, player, 15:75:12].sum())
            last = float(board[0, player, on_board - 1])
            if last:  # not a token that came along
                assert last == old[5 + index // 12]
                played += 1
            assert (board[0, player, on_board:] == 0).all()
    assert played > 100


# ---- the environment


@pytest.mark.parametrize("kwargs", [{}, {"opponent": "self"}, {"deck1": "random"}])
def test_a_seed_gives_the_same_run(kwargs: dict[str, Any]) -> None:
    first, infos = trajectory(3, **kwargs)
    again, infos_again = trajectory(3, **kwargs)
    other, _ = trajectory(4, **kwargs)
    assert (first == again).all()
    assert infos == infos_again
    assert (first != other).any(axis=(1, 2)).all()


def test_a_second_reset_goes_on_with_the_generator_and_forgets_the_games_before() -> None:
    env = EssenceWars(num_games=4)
    first = env.reset(1)[0].copy()
    rng = np.random.default_rng(0)
    for _ in range(5):
        env.step(drawn(env, rng))
    second = env.reset()[0].copy()
    assert (first != second).any()
    infos = []
    steps = 0
    while not infos:
        infos = env.step(drawn(env, rng))[4]
        steps += 1
    assert infos[0]["episode_length"] == [steps] * len(infos[0]["win"])


@pytest.mark.parametrize("kwargs", [{}, {"deck2": "random"}, {"opponent": "self"}])
def test_observations_hold_the_engines_state_and_mask(kwargs: dict[str, Any]) -> None:
    env = EssenceWars(num_games=300, **kwargs)
    env.reset(0)
    rng = np.random.default_rng(0)
    for _ in range(25):
        env.step(drawn(env, rng))
        observations = torch.from_numpy(env.observations)
        legal = env.legal_layout.read(observations)
        mask = np.concatenate([batch.action_mask_batch() for batch in env._batches]) > 0
        rows, index = np.nonzero(mask)
        assert (legal.actions.numpy() == INDEX_TO_TUPLE[index]).all()
        assert (legal.rows.numpy() == rows).all()
        state = np.concatenate([batch.observe_batch() for batch in env._batches])
        first_to_move = state[:, ew.PLAYER_TO_MOVE] == 0
        read = env.legal_layout.field(observations, "state").numpy()
        assert (read[first_to_move] == state[first_to_move]).all()
    if kwargs.get("opponent") == "self":
        assert 0 < first_to_move.sum() < 300
    else:
        assert first_to_move.all()
    unused = np.arange(ew.MAX_LEGAL) >= mask.sum(axis=1)[:, None]
    assert (env._records["legal"][unused] == 0).all()


def test_episode_statistics_agree_with_what_was_played() -> None:
    env = EssenceWars(num_games=16, opponent="random")
    env.reset(5)
    rng = np.random.default_rng(1)
    moves, returns, legal = np.zeros(16), np.zeros(16), np.zeros(16)
    games = wins = 0
    for _ in range(250):
        moves += 1
        legal += env._records["n_legal"]
        _, rewards, terminals, truncations, infos = env.step(drawn(env, rng))
        returns += rewards
        assert not truncations.any()
        assert set(np.unique(rewards)) <= {-1.0, 0.0, 1.0}
        assert (rewards[~terminals] == 0).all()
        assert bool(infos) == bool(terminals.any())
        for info in infos:
            assert info["episode_length"] == moves[terminals].tolist()
            assert info["episode_return"] == returns[terminals].tolist()
            assert info["win"] == (returns[terminals] > 0).tolist()
            assert info["draw"] == (returns[terminals] == 0).tolist()
            np.testing.assert_allclose(info["legal_actions"], (legal / moves)[terminals])
            assert info["illegal_actions"] == [0] * int(terminals.sum())
            games += len(info["win"])
            wins += sum(info["win"])
        for counter in (moves, returns, legal):
            counter[terminals] = 0
    assert games > 40
    assert 0 < wins < games


def test_the_agent_moves_first_and_greedy_beats_random_play() -> None:
    env = EssenceWars(num_games=64)
    env.reset(0)
    state = env._records["state"]
    assert (state[:, 0] * 30 == 1).all()  # the first turn
    assert (state[:, 110:170] == 0).all()  # and nothing on the enemy's board
    rng = np.random.default_rng(0)
    wins: list[float] = []
    while len(wins) < 200:
        for info in env.step(drawn(env, rng))[4]:
            wins += info["win"]
    assert np.mean(wins) < 0.1


def test_self_play_gives_each_row_to_the_player_to_move() -> None:
    env = EssenceWars(num_games=8, opponent="self")
    env.reset(0)
    twin = PyParallelGames(8, "artificer_tokens", "broodmother_pack", "attrition", "self")
    seeds = np.random.default_rng(0)
    for game in range(8):
        twin.reset_single(game, int(seeds.integers(2**63)))
    rng = np.random.default_rng(0)
    ended = {0: 0, 1: 0}
    for _ in range(400):
        actions = drawn(env, rng)
        movers = np.array(twin.current_players())
        _, rewards, terminals, _, infos = env.step(actions)
        results, done = twin.step_batch(TUPLE_TO_INDEX[SPEC.ravel(actions)].astype(np.uint16))
        assert (terminals == done).all()
        assert (rewards == np.where(movers == 1, -results, results)).all()
        for info in infos:
            assert info["win"] == (results[done] > 0).tolist()
        for game in np.flatnonzero(done).tolist():
            ended[int(movers[game])] += 1
            twin.reset_single(game, int(seeds.integers(2**63)))
        state, current = twin.observe_batch(), np.array(twin.current_players()) == 1
        state[current] = ew.second_players_view(state[current])
        assert (env._records["state"] == state).all()
    assert min(ended.values()) > 0


def test_random_decks_change_from_game_to_game() -> None:
    env = EssenceWars(num_games=32, deck1="random", deck2="random")
    env.reset(0)
    rng = np.random.default_rng(0)
    commanders = env._records["state"][:, 354:].copy()
    assert len(np.unique(commanders[:, 0])) > 4
    assert len(np.unique(commanders[:, 1])) > 4
    changed = 0
    for _ in range(60):
        _, _, terminals, _, _ = env.step(drawn(env, rng))
        now = env._records["state"][:, 354:].copy()
        assert (now[~terminals] == commanders[~terminals]).all()
        changed += int((now[terminals] != commanders[terminals]).any(axis=1).sum())
        commanders = now
    assert changed > 10
    one_side = EssenceWars(num_games=32, deck2="random")
    one_side.reset(0)
    assert len(np.unique(one_side._records["state"][:, 354])) == 1


def test_decks_are_the_engines_own() -> None:
    assert sorted(deck for deck in PyGame.list_decks() if "test" not in deck) == list(DECKS)


# ---- illegal actions and other bad input


def test_an_illegal_action_raises_and_is_named() -> None:
    env = EssenceWars(num_games=3)
    with pytest.raises(RuntimeError, match="call reset"):
        env.step(np.zeros((3, 4), dtype=np.int64))
    env.reset(0)
    before = env.observations.copy()
    actions = np.zeros((3, 4), dtype=np.int64)
    actions[1] = (2, 0, 3, 0)
    with pytest.raises(ValueError, match="not legal") as refusal:
        env.step(actions)
    message = str(refusal.value)
    assert message.startswith(
        "game 1: (2, 0, 3, 0): attack(ally[0], enemy[3]) is not legal; of the "
    )
    assert "end_turn" in message
    assert env.illegal_actions == 1
    assert (env.observations == before).all()
    env.step(np.zeros((3, 4), dtype=np.int64))  # nothing had moved, the game goes on


@pytest.mark.parametrize(
    ("action", "message"),
    [
        ((6, 0, 0, 0), "6 is not a primary"),
        ((0, 3, 0, 0), "end_turn does not use this slot"),
        ((2, 7, 0, 0), r"7 is outside 0..4"),
        ((-1, 0, 0, 0), "-1 is not a primary"),
        ((1, 0, 0, 11), "play_card does not use this slot"),
        ((2**40, 0, 0, 0), "is not a primary"),
        ((1, 0, 11, 0), r"play_card\(hand\[0\], place\[11\]\) is not legal"),
    ],
)
def test_what_is_no_action_at_all_is_explained(action: tuple[int, ...], message: str) -> None:
    env = EssenceWars(num_games=1)
    env.reset(0)
    with pytest.raises(ValueError, match=message):
        env.step(np.array([action]))


def test_actions_of_a_wrong_form() -> None:
    env = EssenceWars(num_games=2)
    env.reset(0)
    with pytest.raises(ValueError, match=r"actions must be \(2, 4\), got \(4,\)"):
        env.step(np.zeros(4, dtype=np.int64))
    with pytest.raises(TypeError, match="actions must be integers, got float32"):
        env.step(np.zeros((2, 4), dtype=np.float32))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_games": 0}, "num_games must be at least 1, got 0"),
        ({"deck1": "tokens"}, "deck1='tokens' is not a deck; take 'random' or one of"),
        ({"deck2": ""}, "deck2='' is not a deck"),
        ({"game_mode": "duel"}, "game_mode='duel' does not exist; take one of"),
        ({"opponent": "me"}, "Valid options: 'greedy', 'random', 'self'"),
        ({"illegal": "skip"}, "illegal='skip' does not exist; take 'raise', 'random' or 'noop'"),
    ],
)
def test_arguments_that_do_not_exist(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EssenceWars(**kwargs)


@pytest.mark.parametrize("kwargs", [{}, {"opponent": "random"}, {"deck2": "random"}])
def test_a_seed_gives_the_same_games_again_in_the_same_environment(kwargs: dict[str, Any]) -> None:
    env = EssenceWars(num_games=8, **kwargs)
    seen = []
    for _ in range(2):
        env.reset(7)
        rng = np.random.default_rng(7)
        for _ in range(80):
            env.step(drawn(env, rng))
        seen.append(env.observations.copy())
    assert (seen[0] == seen[1]).all()


def test_illegal_actions_are_replaced_and_counted() -> None:
    env = EssenceWars(num_games=4, illegal="random")
    env.reset(0)
    rng = np.random.default_rng(0)
    sent = reported = 0
    moved = []
    for _ in range(120):
        actions = drawn(env, rng)
        actions[2] = (2, 0, 0, 1)
        sent += 1
        moved.append(env._to_index(actions)[2])
        env.illegal_actions -= 1
        env._illegal_seen[2] -= 1
        for info in env.step(actions)[4]:
            reported += sum(info["illegal_actions"])
    assert env.illegal_actions == sent
    assert reported + env._illegal_seen.sum() == sent
    assert (env._illegal_seen[[0, 1, 3]] == 0).all()
    assert len(set(moved)) > 20


@pytest.mark.parametrize("illegal", [(2, 0, 0, 1), (2, 7, 0, 0), (9, 0, 0, 0), (-1, 0, 0, 0)])
def test_illegal_actions_end_the_turn_and_are_counted(illegal: tuple[int, ...]) -> None:
    """As if the agent had sent end_turn: an environment to which it did stays equal throughout."""
    env, twin = EssenceWars(num_games=4, illegal="noop"), EssenceWars(num_games=4)
    env.reset(0)
    twin.reset(0)
    rng = np.random.default_rng(0)
    sent = reported = games = 0
    for _ in range(80):
        actions = drawn(env, rng)
        ended = actions.copy()
        actions[2], ended[2] = illegal, (0, 0, 0, 0)
        sent += 1
        _, rewards, terminals, _, infos = env.step(actions)
        twin.step(ended)
        assert (env.observations == twin.observations).all()
        assert (rewards == twin.rewards).all()
        assert (terminals == twin.terminals).all()
        for info in infos:
            reported += sum(info["illegal_actions"])
            games += sum(n > 0 for n in info["illegal_actions"])
    assert games > 1
    assert env.illegal_actions == sent
    assert twin.illegal_actions == 0
    assert reported + env._illegal_seen.sum() == sent
    assert (env._illegal_seen[[0, 1, 3]] == 0).all()


def test_more_legal_actions_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    env = EssenceWars(num_games=4)
    monkeypatch.setattr(ew, "MAX_LEGAL", 1)
    with pytest.raises(
        ValueError, match=r"game \d has \d+ legal actions, .* for 1; raise MAX_LEGAL"
    ):
        env.reset(0)


@pytest.mark.parametrize("missing", ["pufferlib", "essence_wars"])
def test_without_the_packages_it_says_what_to_install(missing: str) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None; import tcg_flatpolicy.games.essence_wars"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: tcg_flatpolicy.games.essence_wars needs ")
    assert missing in last
    assert "pip install essence-wars" in last


# ---- under PufferLib


def draw_from(observations: np.ndarray, vecenv: Any) -> np.ndarray:
    records = observations.reshape(-1, OBSERVATION_DTYPE.itemsize).view(OBSERVATION_DTYPE)[:, 0]
    place = records["n_legal"].astype(int) // 2
    chosen = records["legal"][np.arange(len(records)), place]
    return chosen.astype(vecenv.action_space.dtype)


def run_vecenv(vecenv: Any, steps: int) -> tuple[np.ndarray, int]:
    observations, _ = vecenv.reset(seed=7)
    seen, games = [observations.copy()], 0
    for _ in range(steps):
        observations, rewards, terminals, _, infos = vecenv.step(draw_from(observations, vecenv))
        assert (rewards[~terminals] == 0).all()
        games += sum(len(info["win"]) for info in infos)
        seen.append(observations.copy())
    return np.stack(seen), games


def test_serial_and_multiprocessing_play_the_same_games() -> None:
    options: dict[str, Any] = {"num_envs": 2, "seed": 1, "env_kwargs": {"num_games": 5}}
    serial = pufferlib.vector.make(EssenceWars, backend=pufferlib.vector.Serial, **options)
    alone, games = run_vecenv(serial, 100)
    serial.close()
    parallel = pufferlib.vector.make(
        EssenceWars,
        backend=pufferlib.vector.Multiprocessing,
        num_workers=2,
        overwork=True,
        **options,
    )
    try:
        together, games_together = run_vecenv(parallel, 100)
    finally:
        parallel.close()
    assert alone.shape == (101, 10, OBSERVATION_DTYPE.itemsize)
    assert games == games_together > 5
    assert (alone == together.reshape(alone.shape)).all()
    assert (alone[:, :5] != alone[:, 5:]).any()


# ---- the encoder


@pytest.fixture(scope="module")
def observations() -> torch.Tensor:
    """(48, nbytes) uint8: states from the middle of games."""
    env = EssenceWars(num_games=48, deck1="random", deck2="random")
    env.reset(0)
    rng = np.random.default_rng(0)
    for _ in range(14):
        env.step(drawn(env, rng))
    return torch.from_numpy(env.observations)


@pytest.fixture
def encoder() -> EssenceWarsEncoder:
    torch.manual_seed(0)
    return EssenceWarsEncoder(EssenceWars(num_games=1).legal_layout, hidden_size=48, entity_size=16)


def changed(observations: torch.Tensor, **columns: Any) -> torch.Tensor:
    """A copy with columns of the state set: ``at=[...], to=values``."""
    records = observations.numpy().copy()
    records.view(OBSERVATION_DTYPE)[:, 0]["state"][:, columns["at"]] = columns["to"]
    return torch.from_numpy(records)


def test_the_encoder_gives_the_shapes_it_declares(
    encoder: EssenceWarsEncoder, observations: torch.Tensor
) -> None:
    encoding = encoder(observations)
    assert encoding.hidden.shape == (48, encoder.hidden_size) == (48, 48)
    assert encoder.entity_sizes == {"hand": (10, 16), "ally": (5, 16), "enemy": (5, 16)}
    assert {n: e.shape[1:] for n, e in encoding.entities.items()} == encoder.entity_sizes
    empty = encoder(observations[:0])
    assert empty.hidden.shape == (0, 48)
    assert empty.entities["hand"].shape == (0, 10, 16)


def test_every_parameter_takes_part(
    encoder: EssenceWarsEncoder, observations: torch.Tensor
) -> None:
    encoding = encoder(observations)
    entities = as_tensors(encoding.entities).values()
    sum((e**2).sum() for e in (encoding.hidden, *entities)).backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
        assert torch.isfinite(parameter.grad).all(), name


def test_swapping_two_cards_in_hand_swaps_their_rows_and_nothing_else(
    encoder: EssenceWarsEncoder, observations: torch.Tensor
) -> None:
    state = encoder.layout.field(observations, "state").numpy()
    before = encoder(observations)
    after = encoder(changed(observations, at=[11, 13], to=state[:, [13, 11]]))
    order = [2, 1, 0, 3, 4, 5, 6, 7, 8, 9]
    hands = [one.entities["hand"].rows() for one in (before, after)]
    assert torch.equal(hands[1], hands[0][:, order])
    assert not torch.equal(hands[1], hands[0])
    assert torch.equal(after.entities["ally"], before.entities["ally"])
    torch.testing.assert_close(after.hidden, before.hidden)


def test_a_creature_is_told_by_its_record_its_keywords_and_its_place(
    encoder: EssenceWarsEncoder, observations: torch.Tensor
) -> None:
    with torch.no_grad():
        encoder.places["creature"].normal_()
    guard, rush = 0x0008 / 65535, 0x0001 / 65535
    ally = changed(observations, at=list(range(21, 81)), to=0)
    ally = changed(ally, at=[21 + 12 * k for k in range(5)], to=1)
    rows = [
        encoder(changed(ally, at=[30, 42, 54, 66, 78], to=keyword)).entities["ally"][0]
        for keyword in (guard, rush, 0x8000 / 65535)
    ]
    for k in range(5):
        for other in (rows[1][k], rows[2][k], rows[0][(k + 1) % 5]):
            assert (rows[0][k] - other).abs().max() > 0.05
    before, after = encoder(observations), encoder(changed(observations, at=[111], to=0.7))
    assert torch.equal(before.entities["ally"], after.entities["ally"])
    assert torch.equal(before.entities["enemy"][:, 1:], after.entities["enemy"][:, 1:])
    assert not torch.equal(before.entities["enemy"][:, 0], after.entities["enemy"][:, 0])


def test_card_rows_are_distinct_and_unknown_ids_share_one() -> None:
    known = torch.tensor([0, *(1000 * s + n for s in range(1, 6) for n in range(100))])
    rows = _card_rows((known.double() / 6000).float())
    assert len(rows.unique()) == 501
    assert rows[0] == 0
    assert int(rows.max()) < ew.CARD_ROWS
    assert 1 not in rows
    strange = torch.tensor([1, 999, 1100, 1999, 6000, 7123, -5, -1000])
    assert (_card_rows(strange / 6000) == 1).all()


def test_the_encoder_survives_unknown_ids_and_refuses_wrong_bytes(
    encoder: EssenceWarsEncoder, observations: torch.Tensor
) -> None:
    strange = changed(observations, at=[11, 100, 184, 354], to=3.7)
    assert torch.isfinite(encoder(strange).hidden).all()
    with pytest.raises(ValueError, match="bytes"):
        encoder(observations[:, :-1])
    with pytest.raises(TypeError, match="bytes"):
        encoder(observations.float())


def test_the_trunk_hears_of_each_group_of_cards(
    encoder: EssenceWarsEncoder, observations: torch.Tensor
) -> None:
    """A card in either hand, a support of either side, a card on a board, a commander."""
    unheard_of = 2099 / 6000
    row = int(_card_rows(torch.tensor(unheard_of)))
    state = encoder.layout.field(observations, "state")
    on_board = int((state[:, 21:81:12].sum(1) > 0).nonzero()[0])
    first = 184 + round(float(state[on_board, 10]) * 10)
    for column in (11, 100, 83, 172, 354, 355, first):
        encoder.zero_grad()
        encoder(changed(observations, at=[column], to=unheard_of)).hidden.sum().backward()
        of_cards = encoder.tables["cards"].weight.grad
        assert of_cards is not None
        assert of_cards[row].abs().sum() > 0, column


def test_an_empty_list_where_a_player_is_to_move_is_the_engine_s_fault(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    env = EssenceWars(3, seed=1)
    env.reset(1)

    class Mute:
        """The engine's batch, but with a game that lists nothing."""

        def __init__(self, batch: Any) -> None:
            self.batch = batch

        def __getattr__(self, name: str) -> Any:
            return getattr(self.batch, name)

        def action_mask_batch(self) -> Any:
            mask = self.batch.action_mask_batch()
            mask[1] = 0
            return mask

    monkeypatch.setattr(env, "_batches", [Mute(batch) for batch in env._batches])
    with pytest.raises(RuntimeError, match="game 1: the engine lists no legal action"):
        env.reset()  # a seed would make new batches
