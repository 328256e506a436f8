"""PettingZoo environments, AEC and parallel, whose legal actions are an ``action_mask``."""

from __future__ import annotations

from typing import Any

from gymnasium import spaces

from tcg_flatpolicy.adapters.rows import Ids, Rows, ToTuple, split_mask, without_mask
from tcg_flatpolicy.spec import ActionSpec


class ListedAgents:
    """What :func:`from_parallel` and :func:`from_aec` return: a PettingZoo ParallelEnv."""

    def __init__(self, env: Any, spec: ActionSpec | None, to_tuple: ToTuple | None) -> None:
        self.env, self.metadata = env, getattr(env, "metadata", {})
        self.possible_agents: list[Any] = list(env.possible_agents)
        self.render_mode = getattr(env, "render_mode", None)
        first = self.possible_agents[0]
        for agent in self.possible_agents:
            for kind in ("action_space", "observation_space"):
                one, other = getattr(env, kind)(agent), getattr(env, kind)(first)
                if one != other:
                    raise ValueError(
                        f"{kind} of {agent} is {one}, and that of {first} is {other}; one policy "
                        "needs the same for all agents: pad them"
                    )
        space = env.action_space(first)
        if not isinstance(space, spaces.Discrete):
            raise TypeError(f"the action space is {space}; an action_mask is of Discrete(n)")
        self._start = int(space.start)
        self._ids = Ids(int(space.n), spec, to_tuple)
        self.action_spec = self._ids.spec
        self._space = without_mask(env.observation_space(first))
        self._rows = Rows(self._space, self.action_spec, int(space.n))
        self.legal_layout = self._rows.layout

    @property
    def agents(self) -> list[Any]:
        """Those that are in the game."""
        return list(self.env.agents)

    def observation_space(self, agent: Any) -> Any:
        """Box, uint8 (nbytes,)."""
        return self._rows.space

    def action_space(self, agent: Any) -> Any:
        """The spec's MultiDiscrete."""
        return self.action_spec.action_space

    def _row(self, agent: Any, observation: Any, info: Any, moves: bool) -> Any:
        """A row of bytes; whoever does not move has an empty list."""
        seen, mask = split_mask(observation, info, self._space)
        if moves and mask is None:
            raise ValueError(f"{agent} has no action_mask, neither in its observation nor its info")
        return self._rows.row(seen, self._ids.listed(mask) if moves else [])

    def _id(self, action: Any) -> int:
        return self._ids.of(action) + self._start

    def render(self) -> Any:
        """The environment's own."""
        return self.env.render()

    def close(self) -> None:
        """Closes the environment."""
        self.env.close()


class ListedParallel(ListedAgents):
    """A parallel environment: all agents act at once."""

    def reset(self, seed: int | None = None, options: Any = None) -> Any:
        """Rows of bytes and infos, by agent."""
        observations, infos = self.env.reset(seed=seed, options=options)
        return self._shown(observations, infos, {}), infos

    def step(self, actions: Any) -> Any:
        """Plays a tuple of each agent; an agent whose list is empty sends the no-op as it is."""
        sent = {agent: self._id(action) for agent, action in actions.items()}
        observations, rewards, ended, cut, infos = self.env.step(sent)
        over = {agent: ended[agent] or cut[agent] for agent in ended}
        return self._shown(observations, infos, over), rewards, ended, cut, infos

    def _shown(self, observations: Any, infos: Any, over: Any) -> dict[Any, Any]:
        return {
            agent: self._row(agent, seen, infos.get(agent), not over.get(agent, False))
            for agent, seen in observations.items()
        }


class ListedTurns(ListedAgents):
    """An AEC environment: one agent acts, and the others wait with an empty list."""

    def reset(self, seed: int | None = None, options: Any = None) -> Any:
        """Rows of bytes and infos, by agent."""
        self.env.reset(seed=seed, options=options)
        return self._shown(), self.env.infos

    def step(self, actions: Any) -> Any:
        """Plays the tuple of the agent that is to move; those of others are not looked at."""
        env = self.env
        env.step(self._id(actions[env.agent_selection]))
        rewards, ended, cut = dict(env.rewards), dict(env.terminations), dict(env.truncations)
        shown, infos = self._shown(), dict(env.infos)
        while env.agents and self._is_over(env.agent_selection):
            env.step(None)  # an agent that is out of the game is taken out
            for agent, reward in env.rewards.items():
                rewards[agent] = rewards.get(agent, 0) + reward
        return shown, rewards, ended, cut, infos

    def _is_over(self, agent: Any) -> bool:
        return bool(self.env.terminations[agent] or self.env.truncations[agent])

    def _shown(self) -> dict[Any, Any]:
        env = self.env
        return {
            agent: self._row(
                agent,
                env.observe(agent),
                env.infos.get(agent),
                agent == env.agent_selection and not self._is_over(agent),
            )
            for agent in env.agents
        }


def from_parallel(
    env: Any, *, spec: ActionSpec | None = None, to_tuple: ToTuple | None = None
) -> ListedParallel:
    """A PettingZoo ParallelEnv with its legal lists in the observations.

    Args:
        env: with the action space ``Discrete(n)``, and ``action_mask`` (n,) in its observations or
            infos. An agent with nothing in its mask waits, and sends the spec's no-op.
        spec: what the tuples mean; one value of n if left out.
        to_tuple: function of an action's number that gives its tuple; checked to give each another
            one.

    Raises:
        TypeError: another action space.
        ValueError: agents with unlike spaces, or tuples outside the spec or not distinct.
    """
    return ListedParallel(env, spec, to_tuple)


def from_aec(
    env: Any, *, spec: ActionSpec | None = None, to_tuple: ToTuple | None = None
) -> ListedTurns:
    """A PettingZoo AECEnv as a ParallelEnv, in which whoever is not to move has an empty list.

    Arguments and exceptions are those of :func:`from_parallel`.
    """
    return ListedTurns(env, spec, to_tuple)
