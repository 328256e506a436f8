"""The policies that PufferLib's trainer calls, in its shapes and by its names.

Shapes: B rows of observations, S segments of T steps (PufferLib's horizon), D hidden size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any, TypeVar

import gymnasium
import torch
from torch import Tensor, nn

from tcg_flatpolicy.actor_critic import ActorCritic, Decided
from tcg_flatpolicy.distribution import TupleDistribution
from tcg_flatpolicy.heads import HeadFactory
from tcg_flatpolicy.layout import LegalLayout
from tcg_flatpolicy.meaning import action_dtype, meaning
from tcg_flatpolicy.puffer.face import LegalNormal
from tcg_flatpolicy.spec import ActionSpec
from tcg_flatpolicy.table import Embedded
from tcg_flatpolicy.wrapping import env_attribute

_Method = TypeVar("_Method", bound=Callable[..., Any])


def _of_its_own(method: _Method) -> _Method:
    """The same function with code of its own: torch.compile keeps 8 graphs at most of each code."""
    assert isinstance(method, FunctionType)
    code, name = method.__code__.replace(co_name=method.__name__), method.__name__
    own = FunctionType(code, method.__globals__, name, method.__defaults__, method.__closure__)
    own.__kwdefaults__ = method.__kwdefaults__
    return functools.update_wrapper(own, method)  # type: ignore[return-value]


def _fresh_weights(method: _Method) -> _Method:
    """Under autocast, casts weights anew in each call.

    PufferLib's train() enters autocast and never leaves it, so autocast's own cache of cast weights
    is never cleared, and every layer would silently keep the weights of the first minibatch.
    """

    @functools.wraps(method)
    def call(*arguments: Any, **named: Any) -> Any:
        if torch.compiler.is_compiling():
            return method(*arguments, **named)  # a compiled graph casts in each call
        cached = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)
        try:
            return method(*arguments, **named)
        finally:
            torch.set_autocast_cache_enabled(cached)

    return _of_its_own(call)  # type: ignore[return-value]


class Policy(ActorCritic):
    """A feed-forward policy for PufferLib's trainer that plays only legal tuples.

    Pass it to ``PuffeRL(config, vecenv, policy)`` as it is; or call :meth:`distribution` and use
    what it returns in any trainer.

    Args:
        env: brings ``action_spec`` and ``legal_layout`` (itself or through ``.driver_env`` and
            ``.env``), and ``single_action_space`` for the dtype of actions. May be None when spec
            and layout are given.
        spec: what tuples mean; the environment's if left out.
        layout: where the legal list is; the environment's if left out.
        head, encoder, hidden_size, width, invalid, critic_only: as of ActorCritic.

    Raises:
        ValueError: no spec or layout anywhere, two that disagree, a spec that does not fit the
            action space; and as ActorCritic.
    """

    is_continuous = False

    def __init_subclass__(cls, **named: Any) -> None:
        super().__init_subclass__(**named)
        for name in ("forward", "forward_eval"):
            setattr(cls, name, _of_its_own(getattr(cls, name)))

    def __init__(
        self,
        env: Any = None,
        *,
        head: str | HeadFactory = "flat",
        spec: ActionSpec | None = None,
        layout: LegalLayout | None = None,
        encoder: nn.Module | None = None,
        hidden_size: int = 256,
        width: int = 64,
        invalid: str = "raise",
        critic_only: Sequence[str] = (),
        **memory: Any,
    ) -> None:
        spec, layout = meaning(env, spec=spec, layout=layout)
        dtype = action_dtype(env, spec)
        what: dict[str, Any] = {"head": head, "encoder": encoder, "hidden_size": hidden_size}
        what |= {"width": width, "invalid": invalid, "critic_only": critic_only, **memory}
        super().__init__(spec, layout, **what)
        self._action_dtype = dtype
        space = env_attribute(env, "single_action_space")
        self._discrete = isinstance(space, gymnasium.spaces.Discrete)
        self._encoded: list[tuple[Tensor, Embedded]] = []

    @_fresh_weights
    def distribution(
        self, observations: Tensor, state: Any = None
    ) -> tuple[TupleDistribution, Tensor]:
        """The head's distribution over each row's tuples, and values: for loops of your own.

        Nothing checks at which settings tuples were drawn. This library's heads give a
        LegalCategorical or a LegalAutoregressive.

        Args:
            observations: (B, columns), as LegalLayout.read takes them: values are (B, 1). Or
                (S, T, columns): S * T rows, values (S, T). A legal list that is broken or not
                within the spec raises a ValueError that names the row.
            state: of a RecurrentPolicy, as for forward_eval; without one a game begins.
        """
        decided = self._carry(observations, state)
        return decided.distribution, _shaped(decided.value, observations)

    @_fresh_weights
    def forward_eval(self, observations: Tensor, state: Any = None) -> tuple[LegalNormal, Tensor]:
        """The rollout's forward: a LegalNormal of B rows, and values (B, 1).

        Args:
            observations: (B, columns).
            state: the trainer's dict. A RecurrentPolicy reads ``lstm_h`` and ``lstm_c``, each
                (B, D), and replaces them.

        Raises:
            RuntimeError: the trainer's use_rnn does not fit the policy.
            ValueError: a broken legal list, or a state of another size.
        """
        return self._face(self._carry(observations, state), observations)

    @_fresh_weights
    def forward(self, observations: Tensor, state: Any = None) -> tuple[LegalNormal, Tensor]:
        """The update's forward: the same, of one step or of whole segments from a zero state.

        Observations (B, columns), or (S, T, columns) when the trainer's use_rnn is set -> a
        LegalNormal of B or S * T rows, and values (B, 1) or (S, T). State is not used. Asking the
        LegalNormal for the log-prob of tuples raises a RuntimeError if the exploration was changed
        since the rollout drew them.
        """
        return self._face(self.run(observations), observations)

    @_fresh_weights
    def encode_observations(self, observations: Tensor, state: Any = None) -> Tensor:
        """Observations (B, columns) -> hidden (B, D).

        PufferLib's LSTMWrapper hands on nothing but hidden, so the observations and entities wait
        in the policy for decode_actions, which reads the lists: do not write over them in between.
        A copy of the policy has no batch that waits.
        """
        if not torch.compiler.is_compiling():
            # The wrapper calls this before its LSTM, whose weights autocast would keep, too.
            torch.clear_autocast_cache()
        hidden, entities = self.encode(observations)
        self._encoded = [*self._encoded[:1], (observations, entities)]
        return hidden

    @_fresh_weights
    def decode_actions(self, hidden: Tensor) -> tuple[LegalNormal, Tensor]:
        """Hidden (B, D), of the batch just encoded -> (LegalNormal, values (B, 1)).

        It raises a RuntimeError unless one batch was encoded since the last call, of that size.
        """
        encoded, self._encoded = self._encoded, []
        if not encoded:
            raise RuntimeError("decode_actions needs encode_observations to be called before it")
        if len(encoded) > 1:
            raise RuntimeError(
                "two batches were encoded since the last decode_actions, and it cannot tell whose "
                "hidden it was given: decode each before the next is encoded"
            )
        observations, entities = encoded[0]
        if len(hidden) != len(observations):
            sizes = f"{len(hidden)} rows, but {len(observations)} observations were encoded"
            raise RuntimeError(f"decode_actions got {sizes}")
        values = self.values(hidden, observations)
        decided = Decided(self.decide(observations, hidden, entities), values, ())
        return self._face(decided, observations)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_encoded": []}  # deepcopy refuses tensors of a graph

    def _carry(self, observations: Tensor, state: Any) -> Decided:
        """As run, with what the memory carries read from the trainer's dict and replaced there."""
        if state is None:
            return self.run(observations)
        if not (hasattr(state, "get") and hasattr(state, "__setitem__")):
            raise TypeError(
                f"state must be a dict with lstm_h and lstm_c, or None, got {type(state).__name__}"
            )
        if self._discrete and "env_id" in state:
            raise RuntimeError(
                "PufferLib's trainer stores and clips tuples, and the action space is Discrete: "
                "set the environment's single_action_space to its action_spec.action_space, "
                f"MultiDiscrete({self.spec.nvec.tolist()}), and take actions[:, 0] in step"
            )
        carried = state.get("lstm_h"), state.get("lstm_c")
        if not self.recurrent:
            if self.training and carried[0] is not None:
                raise RuntimeError(
                    f"{type(self).__name__} has no memory, and the trainer carries one: set "
                    "use_rnn to False in its config, or take fp.RecurrentPolicy"
                )
            return self.run(observations)
        if self.training and state and "lstm_h" not in state:
            raise RuntimeError(
                f"{type(self).__name__} has a memory, and the trainer carries none: set use_rnn to "
                "True in its config, or take fp.Policy"
            )
        if carried[0] is not None:
            wanted = (len(observations), self.hidden_size)
            for name, part in zip(("lstm_h", "lstm_c"), carried, strict=True):
                if part is None:
                    raise ValueError("state has lstm_h and no lstm_c; carry both, or neither")
                if tuple(part.shape) != wanted:
                    raise ValueError(f"{name} must be {wanted}, got {tuple(part.shape)}")
        decided = self.run(observations, None if carried[0] is None else carried)
        state["lstm_h"], state["lstm_c"] = decided.carried
        return decided

    def _face(self, decided: Decided, observations: Tensor) -> tuple[LegalNormal, Tensor]:
        distribution, seen = decided.distribution, (self.layout, observations.flatten(0, -2))
        estimates = getattr(self.head, "path_entropy", False)
        entropy_of = getattr(distribution, "path_entropy", None) if estimates else None
        face = LegalNormal(
            distribution, self._action_dtype, entropy_of, self.exploration, self.training, seen
        )
        return face, _shaped(decided.value, observations)


class FlatPolicy(Policy):
    """The Policy with the flat head: one categorical over exactly the legal list."""

    def __init__(self, env: Any = None, **arguments: Any) -> None:
        if "head" in arguments:
            raise TypeError("FlatPolicy has the flat head; for another one take Policy(head=...)")
        super().__init__(env, head="flat", **arguments)


class RecurrentPolicy(Policy):
    """A Policy with an LSTM between encoder and decision, for PufferLib's ``use_rnn``.

    Rollout: one step at a time, carrying ``state["lstm_h"]`` and ``state["lstm_c"]`` (B, D).
    Update: whole segments (S, T, columns), from a zero state. The trainer's importance ratio starts
    at 1 only if batch_size = agents * horizon; otherwise its rollout carries the state from one
    segment into the next, and the update does not. The trainer does not clear the state where a
    game begins. With ``first_step`` the policy does, in rollout and update alike; without it the
    memory goes on from game to game, in this library's evaluation too.

    Args:
        env: as for Policy. Its ``first_step`` is taken if none is given.
        policy: a Policy whose encoder, head and value are to be taken; so PufferLib's
            ``rnn_name`` calls it. Another module raises a TypeError.
        first_step: name of a field of the observation that is not 0 in a game's first step.
        input_size: of the LSTM, as PufferLib gives it; other than the encoder's size, which the
            LSTM has, raises a ValueError.
        arguments: of Policy.
    """

    def __init__(
        self,
        env: Any = None,
        policy: nn.Module | None = None,
        *,
        first_step: str | None = None,
        input_size: int | None = None,
        **arguments: Any,
    ) -> None:
        asked = {"input_size": input_size}
        if policy is not None:
            if not isinstance(policy, Policy) or policy.recurrent:
                raise TypeError(
                    f"RecurrentPolicy(env, policy) takes the parts of a Policy or FlatPolicy, got "
                    f"a {type(policy).__name__}"
                )
            asked["hidden_size"] = arguments.pop("hidden_size", None)
            arguments = {
                "spec": policy.spec,
                "layout": policy.layout,
                "encoder": policy.encoder,
                "head": lambda *sizes: policy.head,
                "width": policy.width,
                "critic_only": policy.critic_only,
                "invalid": "drop" if policy.layout.dropped else "raise",
                **arguments,
            }
        first_step = first_step or env_attribute(env, "first_step")
        super().__init__(env, recurrent=True, first_step=first_step, **arguments)
        for name, size in asked.items():
            if size not in (None, self.hidden_size):
                raise ValueError(
                    f"{name} is {size}, but the encoder's hidden_size is {self.hidden_size}: the "
                    f"LSTM is as wide; set {name} to that, or leave it out"
                )
        if policy is not None:
            self.value = policy.value
            if env is None:
                self._action_dtype = policy._action_dtype
            self.explore(policy.temperature, policy.epsilon)

    def encode_observations(self, observations: Tensor, state: Any = None) -> Tensor:
        """Raises a TypeError: PufferLib's LSTMWrapper asks for it, and leaves this LSTM out."""
        raise TypeError(
            f"{type(self).__name__} has an LSTM of its own: give it to the trainer as it is, or "
            "wrap a Policy"
        )


def _shaped(values: Tensor, observations: Tensor) -> Tensor:
    """(B, 1) values, or (S, T) of segments."""
    return values if observations.ndim == 2 else values.view(observations.shape[:2])
