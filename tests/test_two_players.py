"""Two players, one policy: the environments, and what empty lists do under PufferLib's trainer."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("pufferlib")
pytest.importorskip("essence_wars")
pytest.importorskip("pettingzoo")

import pufferlib.vector
from essence_wars._core import PyParallelGames
from pufferlib import pufferl
from pufferlib.emulation import PettingZooPufferEnv
from pufferlib.pytorch import sample_logits

import tcg_flatpolicy as fp
from tcg_flatpolicy.app.evaluate import play, play_match
from tcg_flatpolicy.games.essence_wars import (
    INDEX_TO_TUPLE,
    OBSERVATION_DTYPE,
    SPEC,
    TUPLE_TO_INDEX,
    EssenceWars,
    EssenceWarsEncoder,
)
from tcg_flatpolicy.games.essence_wars import engine as ew
from tcg_flatpolicy.games.essence_wars.parallel import EssenceWarsParallel
from tcg_flatpolicy.games.essence_wars.two_players import EssenceWarsTwoPlayers, waiting_view
from tcg_flatpolicy.puffer import compensated
from tcg_flatpolicy.verify import LegalityMonitor, audit_env

pytestmark = pytest.mark.integration

HAND = slice(ew.PLAYERS + 5, ew.PLAYERS + 5 + ew.HAND)
"""Where a state has the ids of the hand of the player from whose side it is."""
OTHERS_HAND = slice(HAND.start + ew.PLAYER_SIZE, HAND.stop + ew.PLAYER_SIZE)


def records_of(env: Any) -> np.ndarray:
    return env.observations.view(OBSERVATION_DTYPE)[:, 0]


def drawn(records: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(rows, 4) a legal action of each row, the no-op of an empty list."""
    place = (rng.random(len(records)) * records["n_legal"]).astype(int)
    return records["legal"][np.arange(len(records)), place].astype(np.int64)


def a_policy(env: Any, head: Any = "flat", recurrent: bool = False) -> fp.Policy:
    torch.manual_seed(0)
    kind = fp.RecurrentPolicy if recurrent else fp.Policy
    layout = fp.LegalLayout.from_dtype(OBSERVATION_DTYPE, "n_legal", "legal", spec=SPEC)
    return kind(env, encoder=EssenceWarsEncoder(layout, 32, 8), head=head, width=16)


def native(num_games: int = 8, **kwargs: Any) -> Any:
    return pufferlib.vector.make(
        EssenceWarsTwoPlayers,
        env_kwargs={"num_games": num_games, **kwargs},
        backend=pufferlib.vector.Serial,
        num_envs=1,
        seed=1,
    )


def emulated(num_envs: int = 4) -> Any:
    return pufferlib.vector.make(
        PettingZooPufferEnv,
        env_kwargs={"env_creator": EssenceWarsParallel},
        backend=pufferlib.vector.Serial,
        num_envs=num_envs,
        seed=1,
    )


# ---- the native environment


def test_each_row_is_a_player_as_the_engine_has_it() -> None:
    games = 8
    env = EssenceWarsTwoPlayers(games)
    env.reset(0)
    twin = PyParallelGames(games, "artificer_tokens", "broodmother_pack", "attrition", "self")
    seeds = np.random.default_rng(0)
    for game in range(games):
        twin.reset_single(game, int(seeds.integers(2**63)))
    rng, game = np.random.default_rng(0), np.arange(games)
    won = {(player, mover): 0 for player in (0, 1) for mover in (0, 1)}
    for _ in range(500):
        shown, state = records_of(env).reshape(games, 2), twin.observe_batch()
        mover = np.array(twin.current_players())
        mask = twin.action_mask_batch() > 0
        assert (shown["n_legal"][game, mover] == mask.sum(axis=1)).all()
        assert (shown["n_legal"][game, 1 - mover] == 0).all()
        assert (shown["legal"][game, 1 - mover] == 0).all()
        for g in range(games):
            listed = shown["legal"][g, mover[g]][: mask[g].sum()]
            assert (listed == INDEX_TO_TUPLE[mask[g]]).all()
            assert [env.to_move(2 * g), env.to_move(2 * g + 1)] == [mover[g] == 0, mover[g] == 1]
        # Each sees its own side first; the one who waits without the other's hand.
        sides = np.stack([state, ew.second_players_view(state)], axis=1)
        for player in (0, 1):
            waits = mover != player
            mine, seen = sides[:, player], shown["state"][:, player]
            assert (seen[~waits, 2:] == mine[~waits, 2:]).all()
            assert (seen[waits, 2 : ew.PLAYERS + ew.PLAYER_SIZE] == mine[waits, 2:95]).all()
            assert (seen[waits, OTHERS_HAND] == 0).all()
            assert (seen[:, ew.PLAYER_TO_MOVE] == waits).all()

        actions = drawn(records_of(env), rng)
        _, rewards, terminals, truncations, infos = env.step(actions)
        sent = actions.reshape(games, 2, 4)[game, mover]
        result, done = twin.step_batch(TUPLE_TO_INDEX[SPEC.ravel(sent)].astype(np.uint16))
        assert (rewards[::2] == result).all()
        assert (rewards[1::2] == -result).all()
        assert (terminals.reshape(games, 2) == done[:, None]).all()
        assert not truncations.any()
        for info in infos:
            assert info["win"] == (result[done] > 0).tolist()
        for g in np.flatnonzero(done).tolist():
            won[int(result[g] < 0), int(mover[g])] += 1
            twin.reset_single(g, int(seeds.integers(2**63)))
    # The winner is the one who moved last, or, at turn 30, any of them.
    assert won[0, 0] > 3
    assert won[1, 1] > 3
    assert env.illegal_actions == 0


def test_who_waits_is_shown_all_but_the_hand_of_who_moves() -> None:
    """Whatever else is changed in the mover's view changes what the other sees."""
    env = EssenceWarsTwoPlayers(16, deck1="random", deck2="random")
    env.reset(3)
    rng = np.random.default_rng(3)
    for _ in range(30):
        env.step(drawn(records_of(env), rng))
    states = records_of(env.games)["state"]
    views = waiting_view(states)
    for state, view in zip(states, views, strict=True):
        held = round(float(state[ew.PLAYERS + 4]) * ew.HAND)
        packed = range(ew.CARDS, ew.CARDS + held)
        hidden = {*range(HAND.start, HAND.stop), *packed}
        assert len(packed) > 0
        assert (state[list(packed)] > 0).all()
        # The numbers of cards say where the others lie: changing one moves others.
        counts = {ew.PLAYERS + 4, ew.PLAYERS + ew.PLAYER_SIZE + 4}
        for player in (ew.PLAYERS, ew.PLAYERS + ew.PLAYER_SIZE):
            counts |= set(range(player + 15, player + 75, ew.CREATURE_SIZE))
            counts |= set(range(player + 75, player + 85, 5))
        changed = np.repeat(state[None], len(state), axis=0)
        changed[np.arange(len(state)), np.arange(len(state))] += 0.5
        differs = (waiting_view(changed) != view).any(axis=1)
        for column in range(len(state)):
            if column not in counts:
                expected = column not in hidden and column != ew.PLAYER_TO_MOVE
                assert differs[column] == expected, column
        # As many of the ids of this game's cards are missing as the hand has, twice.
        assert (state[ew.CARDS :] > 0).sum() - (view[ew.CARDS :] > 0).sum() == held


@pytest.mark.parametrize("random_decks", [False, True])
def test_the_audit_finds_nothing_in_the_native_environment(random_decks: bool) -> None:
    decks = {"deck1": "random", "deck2": "random"} if random_decks else {}
    report = audit_env(EssenceWarsTwoPlayers(8, **decks), 2000)
    assert report.ok, str(report)
    assert report.figures["share of states with an empty list"] == 0.5
    checked = {name: check.cases for name, check in report.checks.items()}
    assert checked["who is to move has a list"] == checked["who waits has no list"] == 1000


def test_a_waiting_player_may_send_the_no_op_only() -> None:
    env = EssenceWarsTwoPlayers(3)
    for sent in (0, 1):  # the no-op and another tuple
        with pytest.raises(RuntimeError, match=r"Players\.step before reset"):
            env.step(np.full((6, 4), sent))
    env.reset(0)
    before = env.observations.copy()
    actions = np.zeros((6, 4), dtype=np.int64)
    actions[3] = (1, 0, 0, 0)
    with pytest.raises(ValueError, match=r"row 3: \(1, 0, 0, 0\) from a player who waits"):
        env.step(actions)
    actions[3], actions[2] = 0, (2, 0, 3, 0)
    with pytest.raises(ValueError, match=r"game 1: \(2, 0, 3, 0\): attack.* is not legal"):
        env.step(actions)
    assert env.illegal_actions == 2
    assert (env.observations == before).all()
    with pytest.raises(ValueError, match=r"actions must be \(6, 4\), got \(3, 4\)"):
        env.step(actions[:3])
    with pytest.raises(TypeError, match="actions must be integers, got float64"):
        env.step(np.zeros((6, 4)))


@pytest.mark.parametrize("illegal", ["random", "noop"])
def test_illegal_actions_of_both_players_are_counted(illegal: Any) -> None:
    env, twin = EssenceWarsTwoPlayers(4, illegal=illegal), EssenceWarsTwoPlayers(4)
    env.reset(0)
    twin.reset(0)
    rng = np.random.default_rng(0)
    reported = 0
    for _ in range(100):
        actions = drawn(records_of(env), rng)
        sent = actions.copy()
        waits = records_of(env)["n_legal"] == 0
        sent[waits] = (1, 0, 0, 0)
        for info in env.step(sent)[4]:
            reported += sum(info["illegal_actions"])
        twin.step(actions)  # what a waiting player sends does nothing
        assert (env.observations == twin.observations).all()
    assert env.illegal_actions == 400
    assert 0 < reported < 400
    # A move that is not legal: replaced, as EssenceWars does.
    game = env.games
    sent = np.zeros((8, 4), dtype=np.int64)
    mover = 2 * np.arange(4) + game.second_to_move
    sent[mover] = (2, 0, 0, 1)
    env.step(sent)
    assert env.illegal_actions == 404


@pytest.mark.parametrize("decks", [{}, {"deck1": "random"}])
def test_what_was_saved_goes_on_in_another_environment(decks: dict[str, Any]) -> None:
    env = EssenceWarsTwoPlayers(4, record=True, **decks)
    env.reset(5)
    rng = np.random.default_rng(5)
    while not env.terminals.any():  # rewards and terminals are of the last step
        env.step(drawn(records_of(env), rng))
    other = EssenceWarsTwoPlayers(4, record=True, **decks)
    other.load_state_dict(env.state_dict())
    for _ in range(60):
        for name in ("observations", "rewards", "terminals", "truncations"):
            assert (getattr(env, name) == getattr(other, name)).all(), name
        actions = drawn(records_of(env), rng)
        assert env.step(actions)[4] == other.step(actions)[4]
    with pytest.raises(RuntimeError, match="record=True"):
        EssenceWarsTwoPlayers(4).state_dict()


def test_under_multiprocessing_it_plays_the_same_games() -> None:
    options: dict[str, Any] = {"num_envs": 2, "seed": 1, "env_kwargs": {"num_games": 3}}
    seen = []
    for backend, more in (
        (pufferlib.vector.Serial, {}),
        (pufferlib.vector.Multiprocessing, {"num_workers": 2, "overwork": True}),
    ):
        vecenv = pufferlib.vector.make(EssenceWarsTwoPlayers, backend=backend, **more, **options)
        try:
            observations, _ = vecenv.reset(seed=7)
            rng = np.random.default_rng(0)
            for _ in range(60):
                records = observations.reshape(12, -1).view(OBSERVATION_DTYPE)[:, 0]
                observations, rewards, terminals, _, _ = vecenv.step(drawn(records, rng))
                seen.append((observations.copy().reshape(12, -1), rewards.copy(), terminals.copy()))
        finally:
            vecenv.close()
    for alone, together in zip(seen[:60], seen[60:], strict=True):
        assert all((a.ravel() == b.ravel()).all() for a, b in zip(alone, together, strict=True))


# ---- through the game's PettingZoo environment


def test_both_environments_play_the_same_games() -> None:
    """They share no code between the engine and the row but the map of actions."""
    env, other = EssenceWarsTwoPlayers(1), EssenceWarsParallel()
    env.reset(11)
    shown, _ = other.reset(seed=11)
    rng = np.random.default_rng(0)
    ended = longest = 0
    while ended < 10:
        records = records_of(env)
        for player, agent in enumerate(other.possible_agents):
            assert env.to_move(player) == other.to_move(agent) == other.to_move(player)
            if env.to_move(player):
                for name, value in shown[agent].items():
                    assert (value == records[name][player]).all(), name
            else:
                assert not any(value.any() for value in shown[agent].values())
        # Hoard, so that games last: end the turn only where nothing else is legal.
        actions = drawn(records, rng)
        mover = int(env.to_move(1))
        if records["n_legal"][mover] > 1:
            while not actions[mover].any():
                actions[mover] = drawn(records, rng)[mover]
        _, rewards, terminals, _, infos = env.step(actions)
        shown, paid, over, cut, told = other.step(dict(zip(other.agents, actions, strict=True)))
        assert list(paid.values()) == rewards.tolist()
        assert list(over.values()) == terminals.tolist()
        assert not any(cut.values())
        if terminals[0]:
            ended += 1
            for name in ("win", "draw", "episode_return", "episode_length", "legal_actions"):
                assert told["player_0"][name] == infos[0][name][0]
            assert told["player_1"]["win"] == float(rewards[1] > 0)
            longest = max(longest, told["player_1"]["episode_length"])
            assert not any(value.any() for one in shown.values() for value in one.values())
            assert not other.agents
            shown, _ = other.reset()  # goes on with its own generator, as the native one
        else:
            assert told == {"player_0": {}, "player_1": {}}
    assert longest > 100  # where the game's own environment cuts off


def test_an_emulated_observation_is_a_native_one() -> None:
    env = PettingZooPufferEnv(env_creator=EssenceWarsParallel)
    assert env.obs_dtype == OBSERVATION_DTYPE
    assert env.single_action_space == EssenceWars(1).single_action_space
    env.reset(seed=2)
    twin = EssenceWarsParallel()
    twin.reset(seed=2)
    records = records_of(env)
    assert (records["n_legal"] > 0).tolist() == [True, False]
    for agent, space in ((a, env.env.observation_space(a)) for a in env.possible_agents):
        assert space.contains(twin.reset(seed=2)[0][agent])


@pytest.mark.parametrize("kind", ["parallel", "emulated", "vector"])
def test_the_audit_finds_nothing_through_pettingzoo(kind: str) -> None:
    if kind == "parallel":
        report = audit_env(EssenceWarsParallel(), 800, layout=("n_legal", "legal"))
    elif kind == "emulated":
        report = audit_env(PettingZooPufferEnv(env_creator=EssenceWarsParallel), 800)
    else:
        report = audit_env(emulated(), 800)
    assert report.ok, str(report)
    assert report.figures["share of states with an empty list"] == 0.5
    checked = {name: check.cases for name, check in report.checks.items()}
    assert checked["who is to move has a list"] > 300
    assert checked["who waits has no list"] > 300


def test_bad_input_through_pettingzoo() -> None:
    env = EssenceWarsParallel()
    noop = np.zeros(4, dtype=np.int64)
    with pytest.raises(RuntimeError, match="no game is running"):
        env.step({"player_0": noop})
    env.reset(seed=0)
    with pytest.raises(ValueError, match="player_0 is to move, and there is no action of it"):
        env.step({"player_1": noop})
    with pytest.raises(ValueError, match=r"player_1: \(1, 0, 0, 0\) from a player who waits"):
        env.step({"player_0": noop, "player_1": np.array([1, 0, 0, 0])})
    with pytest.raises(ValueError, match=r"player_0: \(2, 0, 3, 0\): .* is not legal; of the"):
        env.step({"player_0": np.array([2, 0, 3, 0])})
    assert env.illegal_actions == 2
    with pytest.raises(ValueError, match="'player_2' is not an agent; there are player_0 and play"):
        env.step({"player_0": noop, "player_2": noop})
    with pytest.raises(ValueError, match=r"an action must be \(4,\), got \(3,\)"):
        env.step({"player_0": noop[:3]})
    with pytest.raises(TypeError, match="player_0: actions must be integers, got float32"):
        env.step({"player_0": noop.astype(np.float32)})
    env.step({"player_0": noop})  # nothing had moved, the game goes on
    assert env.to_move("player_1")


def test_without_pettingzoo_it_says_what_to_install() -> None:
    code = """
import sys
sys.modules["pettingzoo"] = None
import tcg_flatpolicy.games.essence_wars.two_players
print("the native one needs none")
import tcg_flatpolicy.games.essence_wars.parallel
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "the native one needs none"
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(
        "ImportError: tcg_flatpolicy.games.essence_wars.parallel needs pettingzoo"
    )
    assert "pip install pettingzoo" in last


# ---- one policy of both


@pytest.mark.parametrize("recurrent", [False, True])
@pytest.mark.parametrize("make", [native, emulated])
def test_a_policy_of_both_players_trains_without_an_illegal_action(
    trainers: Any, make: Any, recurrent: bool
) -> None:
    vecenv = make()
    policy = a_policy(vecenv.driver_env, recurrent=recurrent)
    before = [parameter.clone() for parameter in policy.parameters()]
    vecenv = LegalityMonitor(vecenv)  # raises at an action that is not in the list shown
    trainer = trainers(vecenv, policy, use_rnn=recurrent, bptt_horizon=16)
    for _ in range(4):
        trainer.evaluate()
        trainer.train()
        assert (trainer.ratio - 1).abs().max() < 1e-4
    assert trainer.global_step == 4 * 16 * vecenv.num_agents
    env = vecenv.driver_env
    assert getattr(env, "env", env).illegal_actions == 0
    assert any((a != b).any() for a, b in zip(before, policy.parameters(), strict=True))
    # And it plays one side against a built-in opponent, as it is.
    came_to = play(policy, EssenceWars(4), games=4, seed=0)
    assert came_to.games == 4
    assert came_to.illegal == 0


def gradients(trainer: Any) -> list[torch.Tensor]:
    """Those of each parameter at the trainer's next step, after it has clipped their norm."""
    kept: list[torch.Tensor] = []

    def keep(optimizer: Any, *_: Any) -> None:
        for group in optimizer.param_groups:
            kept.extend(p.grad.clone() for p in group["params"])

    handle = trainer.optimizer.register_step_pre_hook(keep)
    trainer.train()
    handle.remove()
    torch.set_autocast_enabled("cpu", False)
    return kept


@pytest.mark.parametrize("head", ["flat", "autoregressive"])
@pytest.mark.usefixtures("each_kernel")
def test_empty_rows_give_no_gradient_of_the_policy(trainers: Any, head: str) -> None:
    """The trainer's gradient, all rows, is that of a loss over the rows with lists alone."""
    vecenv = native(16)
    policy = a_policy(vecenv.driver_env, head)
    changes: dict[str, Any] = {"vf_coef": 0.0, "ent_coef": 0.05, "max_grad_norm": 1e9}
    trainer = trainers(vecenv, policy, bptt_horizon=16, **changes)
    trainer.evaluate()
    trainer.train()  # so that the weights are not those of a start, where all is near uniform
    trainer.evaluate()
    rows = Decisions(trainer, policy)
    expected = torch.autograd.grad(rows.loss, list(policy.parameters()), allow_unused=True)
    trainer.last_log_time = 0  # or it may keep its losses to itself
    got = gradients(trainer)
    for (name, parameter), ours, theirs in zip(
        policy.named_parameters(), expected, got, strict=True
    ):
        ours = torch.zeros_like(parameter) if ours is None else ours / 2  # half of all rows
        torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-6, msg=name)
    assert max(g.abs().max() for g in got) > 1e-4
    assert trainer.losses["entropy"] == pytest.approx(rows.entropy / 2, rel=1e-4)


class Decisions:
    """PPO's policy and entropy loss over the rows with lists, computed without the other rows."""

    def __init__(self, trainer: Any, policy: fp.Policy) -> None:
        config = trainer.config
        advantages = pufferl.compute_puff_advantage(
            trainer.values.clone(),
            trainer.rewards,
            trainer.terminals,
            torch.ones_like(trainer.values),
            torch.zeros_like(trainer.values),
            config["gamma"],
            config["gae_lambda"],
            config["vtrace_rho_clip"],
            config["vtrace_c_clip"],
        ).flatten()
        weight = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        observations = trainer.observations.flatten(0, 1)
        records = observations.numpy().view(OBSERVATION_DTYPE)[:, 0]
        decides = torch.from_numpy(records["n_legal"] > 0)
        assert decides.float().mean() == 0.5
        face, _ = policy(observations[decides], {})
        actions = trainer.actions.flatten(0, 1)[decides]
        _, log_prob, entropy = sample_logits(face, action=actions)
        ratio = (log_prob - trainer.logprobs.flatten()[decides]).exp()
        policy_loss = -(weight[decides] * ratio).mean()
        self.entropy = float(entropy.detach().mean())
        self.returns = advantages + trainer.values.flatten()
        self.loss = policy_loss - config["ent_coef"] * entropy.mean()


def test_compensated_restores_the_balance_of_the_losses(trainers: Any) -> None:
    """The gradient is half of that in which each loss is a mean over the rows that it is about."""
    vecenv = native(16)
    policy = a_policy(vecenv.driver_env)
    plain: dict[str, Any] = {"vf_coef": 0.8, "ent_coef": 0.05, "max_grad_norm": 1e9}
    trainer = trainers(vecenv, policy, bptt_horizon=16, **compensated(plain))
    trainer.evaluate()
    rows = Decisions(trainer, policy)
    _, value = policy(trainer.observations.flatten(0, 1), {})
    value_loss = 0.5 * ((value.flatten() - rows.returns) ** 2).mean()
    parameters = list(policy.parameters())
    whole = torch.autograd.grad(rows.loss + 0.8 * value_loss, parameters)
    norm = torch.cat([g.flatten() for g in whole]).norm()
    trainer.config["max_grad_norm"] = compensated({**plain, "max_grad_norm": 0.3 * norm})[
        "max_grad_norm"
    ]
    got = gradients(trainer)
    for (name, _), ours, theirs in zip(policy.named_parameters(), whole, got, strict=True):
        torch.testing.assert_close(theirs, 0.5 * 0.3 * ours, rtol=1e-3, atol=1e-6, msg=name)


def test_compensated_leaves_the_rest_and_refuses_what_is_no_share() -> None:
    config = {"vf_coef": 0.5, "max_grad_norm": 0.4, "ent_coef": 0.01, "gamma": 0.9}
    assert compensated(config, 0.25) == {**config, "vf_coef": 0.125, "max_grad_norm": 0.1}
    assert config["vf_coef"] == 0.5
    for share in (0.0, -0.5, 1.5, float("nan")):
        with pytest.raises(ValueError, match="share must be above 0 and at most 1"):
            compensated(config, share)


def test_the_example_trains_and_says_what_it_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    source = (Path(__file__).parent.parent / "examples" / "two_players.py").read_text()
    for written, smaller in (
        ("STEPS = 500_000", "STEPS = 512"),
        ("num_games=128,", "num_games=8, minibatch_size=512,"),
        ('"num_games": 128', '"num_games": 8'),
        ("EssenceWars(100), 500)", "EssenceWars(20), 20)"),
    ):
        assert source.count(written) == 1
        source = source.replace(written, smaller)
    monkeypatch.chdir(tmp_path)
    variables: dict[str, Any] = {}
    try:
        exec(compile(source, "examples/two_players.py", "exec"), variables)
    finally:
        variables["trainer"].utilization.stop()
        torch.set_autocast_enabled("cpu", False)
    assert variables["trainer"].global_step == 512
    said = capfd.readouterr().out
    assert "0 illegal actions" in said
    assert re.search(r"never met: .*% .* of 20 games", said)


# ---- playing against each other


class Fixed(torch.nn.Module):
    """Plays a tuple that follows from the state's bytes, and counts in its own state."""

    hidden_size = 1

    def __init__(self, salt: int) -> None:
        super().__init__()
        self.salt = salt
        self.inner = torch.nn.Dropout().eval()
        self.counted: list[list[float]] = []

    def choose(self, records: np.ndarray) -> np.ndarray:
        """(rows, 4) the tuple of each row, the no-op of an empty list."""
        numbers = records["state"].copy().view(np.uint8).sum(axis=1, dtype=np.int64) + self.salt
        place = numbers % np.maximum(records["n_legal"], 1)
        return records["legal"][np.arange(len(records)), place].astype(np.int64)

    def forward_eval(self, observations: torch.Tensor, state: Any = None) -> Any:
        assert not any(module.training for module in self.modules())
        self.counted.append(state["lstm_h"][:, 0].tolist())
        state["lstm_h"] = state["lstm_h"] + 1
        records = observations.numpy().copy().view(OBSERVATION_DTYPE)[:, 0]
        chosen = torch.from_numpy(self.choose(records))[:, None]
        legal = fp.LegalActions.from_padded(chosen, torch.ones(len(chosen)).long())
        return fp.puffer.LegalNormal(fp.LegalCategorical(legal, torch.zeros(len(chosen)))), None


@pytest.mark.parametrize("swapped", [False, True])
def test_a_match_counts_the_first_players_wins(swapped: bool) -> None:
    players = [Fixed(0), Fixed(7)][:: -1 if swapped else 1]
    env = EssenceWarsTwoPlayers(4, "random", "random")  # for games of unequal length
    came_to = play_match(*players, env, games=20, seed=9)
    # Played by hand, each slot five games.
    env.reset(9)
    done = np.zeros(4, dtype=int)
    wins = draws = actions = too_many = 0
    while (done < 5).any():
        records = records_of(env)
        sent = np.zeros((8, 4), dtype=np.int64)
        sent[::2], sent[1::2] = players[0].choose(records[::2]), players[1].choose(records[1::2])
        _, rewards, terminals, _, _ = env.step(sent)
        actions += 4
        for game in np.flatnonzero(terminals[::2]).tolist():
            too_many += done[game] >= 5
            if done[game] < 5:
                done[game] += 1
                wins += rewards[2 * game] > 0
                draws += rewards[2 * game] == 0
    assert too_many > 0
    assert 0 < wins < 20
    assert (came_to.games, came_to.wins, came_to.draws) == (20, wins, draws)
    assert (came_to.actions, came_to.illegal) == (actions, 0)
    for player in players:  # each keeps its state from game to game, and its mode
        assert player.counted == [[float(step)] * 4 for step in range(actions // 4)]
        assert (player.training, player.inner.training) == (True, False)


def test_a_match_of_recurrent_policies_and_what_it_refuses() -> None:
    env = EssenceWarsTwoPlayers(2)
    policy = a_policy(env, recurrent=True)
    generator = torch.get_rng_state()
    first = play_match(policy, fp.Greedy(policy), env, games=2, seed=1)
    assert first.illegal == 0
    assert first.games == 2
    assert torch.equal(torch.get_rng_state(), generator)
    assert play_match(policy, policy, env, 2, 1, stopped=lambda: True).games == 0
    with pytest.raises(ValueError, match="3 games cannot be shared equally by 2 slots"):
        play_match(policy, policy, env, games=3, seed=1)
    with pytest.raises(ValueError, match=r"two agents a game, and EssenceWars has 1: use play"):
        play_match(policy, policy, EssenceWars(4), games=4, seed=1)
    odd = EssenceWars(3)
    odd.agents_per_game = 2  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="two rows a game, the environment has 3"):
        play_match(policy, policy, odd, games=3, seed=1)
    with pytest.raises(ValueError, match="games must be at least 1, got -2"):
        play_match(policy, policy, env, games=-2, seed=1)


def test_play_refuses_both_players_as_agents_and_games_that_are_none() -> None:
    env = EssenceWarsTwoPlayers(2)
    policy = a_policy(env)
    with pytest.raises(ValueError, match=r"has 2 agents a game.*with play_match\(\)"):
        play(policy, env, games=4, seed=1)
    for games in (0, -4):
        with pytest.raises(ValueError, match=f"games must be at least 1, got {games}"):
            play(policy, EssenceWars(4), games=games, seed=1)
