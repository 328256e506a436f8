"""The policies that PufferLib's trainer calls, in its shapes and by its names.

Shapes: B rows of observations, S segments of T steps (PufferLib's horizon), D hidden size.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any, ParamSpec, TypeVar

import gymnasium
import torch
from torch import Tensor, nn

from tcg_flatpolicy.actor_critic import ActorCritic, Decided
from tcg_flatpolicy.distribution import TupleDistribution
from tcg_flatpolicy.heads import HeadFactory
from tcg_flatpolicy.layout import LegalLayout
from tcg_flatpolicy.meaning import action_dtype, meaning
from tcg_flatpolicy.memory import Carried
from tcg_flatpolicy.puffer.face import LegalNormal
from tcg_flatpolicy.spec import ActionSpec
from tcg_flatpolicy.wrapping import env_attribute

_P = ParamSpec("_P")
_R = TypeVar("_R")


def _of_its_own(method: Callable[_P, _R]) -> Callable[_P, _R]:
    """The same function with code of its own: torch.compile keeps 8 graphs at most of each code."""
    assert isinstance(method, FunctionType)
    code, name = method.__code__.replace(co_name=method.__name__), method.__name__
    own = FunctionType(code, method.__globals__, name, method.__defaults__, method.__closure__)
    own.__kwdefaults__ = method.__kwdefaults__
    return functools.update_wrapper(own, method)


def _fresh_weights(method: Callable[_P, _R]) -> Callable[_P, _R]:
    """Under autocast, casts weights anew in each call.

    PufferLib's train() enters autocast and never leaves it, so autocast's own cache of cast weights
    is never cleared, and every layer would silently keep the weights of the first minibatch.
    """

    @functools.wraps(method)
    def call(*arguments: _P.args, **named: _P.kwargs) -> _R:
        if torch.compiler.is_compiling():
            return method(*arguments, **named)  # a compiled graph casts in each call
        kinds = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
        with contextlib.ExitStack() as stack:
            for kind in kinds:
                dtype = torch.get_autocast_dtype(kind)
                stack.enter_context(torch.autocast(kind, dtype=dtype, cache_enabled=False))
            return method(*arguments, **named)

    return _of_its_own(call)


class Policy(ActorCritic):
    """A feed-forward policy for PufferLib's trainer that plays only legal tuples.

    Pass it to ``PuffeRL(config, vecenv, policy)`` as it is; or call :meth:`distribution` and use
    what it returns in any trainer.

    Args:
        env: brings ``action_spec`` and ``legal_layout`` (itself or through ``.driver_env`` and
            ``.env``), and ``single_action_space`` for the dtype of actions. May be None when spec
            and layout are given.
        head: how a tuple is chosen: "flat" (one categorical over the list), "autoregressive" (slot
            after slot), or a factory of your own, see :mod:`tcg_flatpolicy.heads`.
        spec: what tuples mean; the environment's if left out.
        layout: where the legal list is; the environment's if left out.
        encoder: observations -> Encoding; a FieldEncoder if left out.
        hidden_size: of the FieldEncoder; an encoder of your own brings its own.
        width: of the head's hidden layer.
        invalid: what a listed tuple outside the spec does: "raise", or "drop", which leaves it out
            of the list, counts it in ``dropped`` and warns once of each kind. A list that becomes
            empty raises.

    Raises:
        ValueError: no spec or layout anywhere, two that disagree, a spec that does not fit the
            layout or the action space, an Entity that the encoder does not embed, or a head of
            unknown name.
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
        **memory: Any,
    ) -> None:
        spec, layout = meaning(env, spec=spec, layout=layout)
        dtype = action_dtype(env, spec)
        super().__init__(
            spec,
            layout,
            head=head,
            encoder=encoder,
            hidden_size=hidden_size,
            width=width,
            invalid=invalid,
            **memory,
        )
        self._action_dtype = dtype
        space = env_attribute(env, "single_action_space")
        self._discrete = isinstance(space, gymnasium.spaces.Discrete)
        self._encoded: list[tuple[Tensor, Mapping[str, Tensor]]] = []

    @_fresh_weights
    def distribution(
        self, observations: Tensor, state: Any = None
    ) -> tuple[TupleDistribution, Tensor]:
        """What the policy would play, without PufferLib and its rule for exploration.

        For loops of your own and for imitation: nothing checks at which settings tuples were drawn.

        Args:
            observations: (B, columns), as LegalLayout.read takes them, or (S, T, columns).
            state: of a RecurrentPolicy, as for forward_eval; without one a game begins.

        Returns:
            The head's distribution over each row's tuples (of a flat or an autoregressive head:
            over its legal tuples, a LegalCategorical or a LegalAutoregressive), S * T rows of
            segments; and values, (B, 1) or (S, T).

        Raises:
            ValueError: a legal list that is broken or not within the spec, naming the row.
        """
        decided = self._carry(observations, state)
        return decided.distribution, _shaped(decided.value, observations)

    @_fresh_weights
    def forward_eval(self, observations: Tensor, state: Any = None) -> tuple[LegalNormal, Tensor]:
        """The rollout's forward.

        Args:
            observations: (B, columns).
            state: the trainer's dict. A RecurrentPolicy reads ``lstm_h`` and ``lstm_c``, each
                (B, D), and replaces them.

        Returns:
            A LegalNormal of B rows, and values (B, 1).

        Raises:
            RuntimeError: the trainer's use_rnn does not fit the policy.
            ValueError: a broken legal list, or a state of another size.
        """
        return self._face(self._carry(observations, state), observations)

    @_fresh_weights
    def forward(self, observations: Tensor, state: Any = None) -> tuple[LegalNormal, Tensor]:
        """The update's forward: the same, of one step or of whole segments from a zero state.

        Asking what it returns for the log-prob of tuples raises a RuntimeError if the exploration
        was changed since the rollout drew them.

        Args:
            observations: (B, columns), or (S, T, columns) when the trainer's use_rnn is set.
            state: not used.

        Returns:
            A LegalNormal of B or S * T rows, and values (B, 1) or (S, T).
        """
        return self._face(self.run(observations), observations)

    @_fresh_weights
    def encode_observations(self, observations: Tensor, state: Any = None) -> Tensor:
        """Observations (B, columns) -> hidden (B, D).

        What else decode_actions needs (the observations, the entities) waits in the policy, since
        PufferLib's LSTMWrapper hands on nothing but hidden. The lists are read from the
        observations there, so they must not be written over in between.
        """
        if not torch.compiler.is_compiling():
            # For layers around the policy, such as the LSTM of that wrapper, which calls this
            # first: autocast would keep their weights, too.
            torch.clear_autocast_cache()
        hidden, entities = self.encode(observations)
        self._encoded = [*self._encoded[:1], (observations, entities)]
        return hidden

    @_fresh_weights
    def decode_actions(self, hidden: Tensor) -> tuple[LegalNormal, Tensor]:
        """Hidden (B, D), of the batch just encoded -> (LegalNormal, values (B, 1)).

        Raises:
            RuntimeError: no batch was encoded since the last call, two were, or one of another
                size.
        """
        encoded, self._encoded = self._encoded, []
        if len(encoded) != 1:
            raise RuntimeError(
                "decode_actions needs encode_observations to have been called before it"
                if not encoded
                else "two batches were encoded since the last decode_actions, and it cannot tell "
                "whose hidden it was given: decode each before the next is encoded"
            )
        observations, entities = encoded[0]
        if len(hidden) != len(observations):
            raise RuntimeError(
                f"decode_actions got {len(hidden)} rows, but {len(observations)} observations were "
                "encoded"
            )
        distribution = self.decide(observations, hidden, entities)
        return self._face(Decided(distribution, self.values(hidden), ()), observations)

    def _carry(self, observations: Tensor, state: Any) -> Decided:
        """As run, with what the memory carries read from the trainer's dict and replaced there."""
        if state is not None and not (hasattr(state, "get") and hasattr(state, "__setitem__")):
            raise TypeError(
                f"state must be a dict with lstm_h and lstm_c, or None, got {type(state).__name__}"
            )
        if self._discrete and state and "env_id" in state:
            raise RuntimeError(
                "PufferLib's trainer stores and clips tuples, and the action space is Discrete: "
                "set the environment's single_action_space to its action_spec.action_space, "
                f"MultiDiscrete({self.spec.nvec.tolist()}), and take actions[:, 0] in step"
            )
        if not self.recurrent:
            if self.training and state and state.get("lstm_h") is not None:
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
        decided = self.run(observations, self._carried(observations, state))
        if state is not None:
            state["lstm_h"], state["lstm_c"] = decided.carried
        return decided

    def _carried(self, observations: Tensor, state: Any) -> Carried | None:
        """The LSTM's state in the trainer's dict; None at the start."""
        if not state or state.get("lstm_h") is None:
            return None
        if state.get("lstm_c") is None:
            raise ValueError("state has lstm_h and no lstm_c; carry both, or neither")
        wanted = (len(observations), self.hidden_size)
        for name in ("lstm_h", "lstm_c"):
            if tuple(state[name].shape) != wanted:
                raise ValueError(f"{name} must be {wanted}, got {tuple(state[name].shape)}")
        return state["lstm_h"], state["lstm_c"]

    def _face(self, decided: Decided, observations: Tensor) -> tuple[LegalNormal, Tensor]:
        entropy_of = None
        if getattr(self.head, "path_entropy", False):
            entropy_of = getattr(decided.distribution, "path_entropy", None)
        rows = observations.flatten(0, 1) if observations.ndim == 3 else observations
        face = LegalNormal(
            decided.distribution,
            self._action_dtype,
            entropy_of,
            self.exploration,
            self.training,
            (self.layout, rows),
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
    segment into the next, and the update does not.

    The trainer does not clear the state where a game begins. With ``first_step`` the policy does,
    in rollout and update alike; without it the memory goes on from game to game, in training and in
    this library's evaluation.

    Args:
        env: as for Policy. Its ``first_step`` is taken if none is given.
        policy: a Policy whose encoder, head and value are to be taken; so PufferLib's
            ``rnn_name`` calls it.
        first_step: name of a field of the observation that is not 0 in a game's first step.
        input_size: of the LSTM, which is as wide as the encoder; so PufferLib calls it.
        arguments: of Policy.

    Raises:
        TypeError: a policy that is no Policy of this library.
        ValueError: a width that is not the encoder's; and as Policy.
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
        """Not offered: PufferLib's LSTMWrapper asks for it, and would leave this LSTM out.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            f"{type(self).__name__} has an LSTM of its own: give it to the trainer as it is, or "
            "wrap a Policy"
        )


def _shaped(values: Tensor, observations: Tensor) -> Tensor:
    """(B, 1) values, or (S, T) of segments."""
    return values if observations.ndim == 2 else values.view(observations.shape[:2])
