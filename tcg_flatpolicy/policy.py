"""The policy: from observation bytes to a distribution over exactly the legal tuples.

Shapes: B rows of observations, D hidden size, E embedding size of an entity, N legal tuples.
"""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, ParamSpec, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from tcg_flatpolicy.distribution import LegalCategorical, TupleDistribution
from tcg_flatpolicy.heads import HeadFactory, make_head
from tcg_flatpolicy.sequential import LegalAutoregressive
from tcg_flatpolicy.layout import LegalLayout, env_attribute
from tcg_flatpolicy.legal import LegalActions
from tcg_flatpolicy.lstm import lstm
from tcg_flatpolicy.puffer import LegalNormal
from tcg_flatpolicy.spec import ActionSpec

_P = ParamSpec("_P")
_R = TypeVar("_R")


class Encoding(NamedTuple):
    """What an encoder makes of a batch of observations."""

    hidden: Tensor
    """(B, D) state."""
    entities: Mapping[str, Tensor] = {}
    """{name: (B, n, E)}: what an Entity slot can point at; absent things are rows like others."""


@runtime_checkable
class Encoder(Protocol):
    """Any nn.Module that maps observations (B, columns) to an Encoding and declares its sizes."""

    hidden_size: int
    """D."""
    entity_sizes: Mapping[str, tuple[int, int]]
    """{name: (n, E)}."""

    def __call__(self, observations: Tensor) -> Encoding:
        """Encodes a batch."""


class FieldEncoder(nn.Module):
    """The default encoder: every field of the observation except the legal list, normalised.

    Numbers are squashed by sign(x) log(1 + |x|), so that hit points and identifiers of very
    different sizes can share a layer; then linear, layer norm, relu, twice. Squashing has no
    running statistics on purpose: with them, the log-prob of a stored action would change between
    rollout and update. It embeds no entities; an encoder of your own that does will play better.

    Args:
        layout: where the fields are.
        hidden_size: D.

    Raises:
        ValueError: there is no field besides the legal list.
    """

    def __init__(self, layout: LegalLayout, hidden_size: int = 256) -> None:
        super().__init__()
        self.layout = layout
        self.hidden_size = hidden_size
        self.entity_sizes: dict[str, tuple[int, int]] = {}
        self.fields = [field for field in layout.fields() if not layout.is_legal_list(field)]
        numbers = sum(field.numbers for field in self.fields)
        if not numbers:
            raise ValueError(f"{layout} has no field besides the legal list: nothing to decide by")
        self.net = nn.Sequential(
            nn.Linear(numbers, hidden_size),
            nn.LayerNorm(hidden_size),
            nn.ReLU(),
            nn.Linear(hidden_size, hidden_size),
            nn.LayerNorm(hidden_size),
            nn.ReLU(),
        )

    def forward(self, observations: Tensor) -> Encoding:
        """Observations (B, columns) as LegalLayout.read takes them -> hidden (B, D)."""
        columns = []
        for field in self.fields:
            column = self.layout.field(observations, field.name)
            columns.append(column.reshape(len(column), field.numbers).float())
        x = torch.cat(columns, dim=1)
        return Encoding(self.net(x.sign() * x.abs().log1p()))


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

    return call


class Policy(nn.Module):
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

    Raises:
        ValueError: no spec or layout anywhere, a spec that does not fit the layout or the action
            space, an Entity that the encoder does not embed, or a head of unknown name.
    """

    is_continuous = False
    temperature: Tensor
    epsilon: Tensor

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
    ) -> None:
        super().__init__()
        self.spec: ActionSpec = spec or _from_env(env, "action_spec", "spec")
        given: LegalLayout = layout or _from_env(env, "legal_layout", "layout")
        self.layout = given.with_spec(self.spec)
        self._action_dtype = _action_dtype(env, self.spec)
        self.encoder = encoder or FieldEncoder(self.layout, hidden_size)
        if not isinstance(self.encoder, Encoder):
            raise TypeError(
                f"{type(self.encoder).__name__} must declare hidden_size and entity_sizes "
                "({name: (n, E)}; {} if it embeds none)"
            )
        self.hidden_size = int(self.encoder.hidden_size)
        self.head = make_head(head, self.spec, self.hidden_size, self.encoder.entity_sizes, width)
        self.value = nn.Linear(self.hidden_size, 1)
        self.register_buffer("temperature", torch.tensor(1.0))
        self.register_buffer("epsilon", torch.tensor(0.0))
        self._drawn_with: Tensor | None = None
        """(2,) the temperature and epsilon of the last rollout."""
        self._exploration = (1.0, 0.0)
        self._explores = False, False
        self._encoded: tuple[LegalActions, Mapping[str, Tensor]] | None = None
        self.register_load_state_dict_post_hook(_restore_exploration)  # type: ignore[no-untyped-call]

    def explore(self, temperature: float = 1.0, epsilon: float = 0.0) -> None:
        """Makes exploration part of the policy: p^(1/temperature), then uniform with epsilon.

        It holds in rollout and update alike, so log-probs stay exact. Set it before a rollout: the
        log-prob in an update (with gradients) of tuples drawn under other settings raises. It
        is saved in the state_dict. With an autoregressive head it scores the whole list, and the
        trainer's entropy is then exact. To evaluate between rollout and update, use a copy.

        Args:
            temperature: positive; above 1 flattens the distribution.
            epsilon: 0 to 1, the share of draws that are uniform over the legal tuples.

        Raises:
            ValueError: a value out of range.
        """
        for name, value in (("temperature", temperature), ("epsilon", epsilon)):
            if isinstance(value, str) or not hasattr(value, "__float__"):
                raise TypeError(f"{name} must be a number, got {value!r}")
        rounded = float(torch.tensor(float(temperature), dtype=torch.float32))  # as the buffer's
        if not 0 < rounded < float("inf"):
            raise ValueError(
                f"temperature must be positive and finite in float32, got {temperature}"
            )
        if not 0 <= epsilon <= 1:
            raise ValueError(f"epsilon must lie in 0..1, got {epsilon}")
        self.temperature.fill_(temperature)
        self.epsilon.fill_(epsilon)
        self._read_exploration()

    def _read_exploration(self) -> None:
        self._exploration = (float(self.temperature), float(self.epsilon))
        # For a compiled graph: it depends on whether there is any, and not on how much.
        self._explores = self._exploration[0] != 1.0, self._exploration[1] != 0.0

    @_fresh_weights
    def distribution(self, observations: Tensor) -> tuple[TupleDistribution, Tensor]:
        """What the policy would play, without PufferLib.

        Args:
            observations: (B, columns), as LegalLayout.read takes them.

        Returns:
            The head's distribution over each row's tuples (of a flat or an autoregressive head:
            over its legal tuples, a LegalCategorical or a LegalAutoregressive), and values (B, 1).

        Raises:
            ValueError: a legal list that is broken or not within the spec, naming the row.
        """
        return self._decide(self._encode(observations))

    @_fresh_weights
    def forward_eval(self, observations: Tensor, state: Any = None) -> tuple[LegalNormal, Tensor]:
        """The rollout's forward: observations (B, columns) -> (LegalNormal, values (B, 1))."""
        return self._face(self._encode(observations))

    @_fresh_weights
    def forward(self, observations: Tensor, state: Any = None) -> tuple[LegalNormal, Tensor]:
        """The update's forward, the same as the rollout's.

        Asking what it returns for the log-prob of tuples raises a RuntimeError if the exploration
        was changed since the rollout drew them.
        """
        return self._face(self._encode(observations))

    @_fresh_weights
    def encode_observations(self, observations: Tensor, state: Any = None) -> Tensor:
        """Observations (B, columns) -> hidden (B, D).

        What else decode_actions needs (the legal lists, the entities) waits in the policy, since
        PufferLib's LSTMWrapper hands on nothing but hidden.
        """
        if not torch.compiler.is_compiling():
            # For layers around the policy, such as the LSTM of that wrapper, which calls this
            # first: autocast would keep their weights, too.
            torch.clear_autocast_cache()
        hidden, legal, entities = self._encode(observations)
        self._encoded = legal, entities
        return hidden

    @_fresh_weights
    def decode_actions(self, hidden: Tensor) -> tuple[LegalNormal, Tensor]:
        """Hidden (B, D), of the batch just encoded -> (LegalNormal, values (B, 1)).

        Raises:
            RuntimeError: no batch was encoded, or one of another size.
        """
        if self._encoded is None:
            raise RuntimeError(
                "decode_actions needs encode_observations to have been called before it"
            )
        (legal, entities), self._encoded = self._encoded, None
        if len(hidden) != len(legal):
            raise RuntimeError(
                f"decode_actions got {len(hidden)} rows, but {len(legal)} observations were encoded"
            )
        return self._face((hidden, legal, entities))

    def _encode(self, observations: Tensor) -> tuple[Tensor, LegalActions, Mapping[str, Tensor]]:
        legal = self.layout.read_distinct(observations)
        encoding = self.encoder(observations)
        if not isinstance(encoding, tuple) or len(encoding) != 2:
            raise TypeError(
                f"{type(self.encoder).__name__} gave a {type(encoding).__name__}; an encoder "
                "returns tcg_flatpolicy.Encoding(hidden, entities), entities {} if it embeds none"
            )
        hidden, entities = encoding
        return hidden, legal, entities

    def _decide(
        self, encoded: tuple[Tensor, LegalActions, Mapping[str, Tensor]]
    ) -> tuple[TupleDistribution, Tensor]:
        hidden, legal, entities = encoded
        distribution: TupleDistribution = self.head(hidden, entities, legal)
        shapes = [tuple(getattr(distribution, f"{kind}_shape", ())) for kind in ("batch", "event")]
        if shapes != [(len(legal),), (1 + legal.slots,)]:
            raise TypeError(
                f"{type(self.head).__name__} must return a distribution of batch_shape "
                f"({len(legal)},) and event_shape ({1 + legal.slots},), got a "
                f"{type(distribution).__name__} of {shapes[0]} and {shapes[1]}"
            )
        tempers, smooths = self._explores
        settings: tuple[Any, Any] = self._exploration
        if torch.compiler.is_compiling():
            settings = self.temperature, self.epsilon
        if tempers:
            distribution = distribution.tempered(settings[0])
        if smooths:
            distribution = distribution.smoothed(settings[1])
        return distribution, self.value(hidden).float()

    def _face(
        self, encoded: tuple[Tensor, LegalActions, Mapping[str, Tensor]]
    ) -> tuple[LegalNormal, Tensor]:
        # By the gradient, since PufferLib's LSTMWrapper calls neither forward nor forward_eval: the
        # trainer draws its rollouts without one, and updates with one.
        exploration = torch.stack([self.temperature, self.epsilon])
        drawn_with, drew = None, None
        if torch.is_grad_enabled():
            drawn_with = self._drawn_with
        elif not torch.compiler.is_compiling():
            drew = self._remember_draw
        distribution, value = self._decide(encoded)
        entropy_of = None
        wanted = getattr(self.head, "path_entropy", False)
        if wanted and isinstance(distribution, LegalAutoregressive):
            entropy_of = distribution.path_entropy
        face = LegalNormal(
            distribution, self._action_dtype, entropy_of, exploration, drawn_with, drew
        )
        return face, value

    def _remember_draw(self, exploration: Tensor) -> None:
        self._drawn_with = exploration


class FlatPolicy(Policy):
    """The Policy with the flat head: one categorical over exactly the legal list."""

    def __init__(self, env: Any = None, **arguments: Any) -> None:
        if "head" in arguments:
            raise TypeError("FlatPolicy has the flat head; for another one take Policy(head=...)")
        super().__init__(env, head="flat", **arguments)


class RecurrentPolicy(Policy):
    """A Policy with an LSTM between encoder and decision, for PufferLib's ``use_rnn``.

    Rollout: one step at a time, carrying ``state["lstm_h"]`` and ``state["lstm_c"]`` (B, D).
    Update: whole segments (segments, horizon, columns), from a zero state. The trainer's importance
    ratio starts at 1 only if batch_size = agents * horizon; otherwise its rollout carries the state
    from one segment into the next, and the update does not.

    The arguments are Policy's; the LSTM is as wide as the encoder.
    """

    def __init__(self, env: Any = None, **arguments: Any) -> None:
        super().__init__(env, **arguments)
        self.lstm = nn.LSTM(self.hidden_size, self.hidden_size)
        for name, parameter in self.lstm.named_parameters():
            if "weight" in name:
                nn.init.orthogonal_(parameter, 1.0)
            else:
                nn.init.zeros_(parameter)
        self._remember_weights()
        self.register_load_state_dict_post_hook(_remember_weights)  # type: ignore[no-untyped-call]

    def encode_observations(self, observations: Tensor, state: Any = None) -> Tensor:
        """Not offered: PufferLib's LSTMWrapper asks for it, and would leave this LSTM out.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            f"{type(self).__name__} has an LSTM of its own: give it to the trainer as it is, or "
            "wrap a Policy"
        )

    def _remember_weights(self) -> None:
        # For a compiled graph: Dynamo refuses whatever it reaches through an nn.LSTM.
        self._lstm_weights = list(self.lstm.parameters())

    @_fresh_weights
    def distribution(
        self, observations: Tensor, state: Any = None
    ) -> tuple[TupleDistribution, Tensor]:
        """As Policy.distribution, one step on; the state dict is read and replaced.

        Without a state it is the first step of an episode.
        """
        return self._decide(self._step(observations, state))

    @_fresh_weights
    def forward_eval(self, observations: Tensor, state: Any = None) -> tuple[LegalNormal, Tensor]:
        """One step: observations (B, columns); the state dict is read and replaced."""
        return self._face(self._step(observations, state))

    def _step(
        self, observations: Tensor, state: Any
    ) -> tuple[Tensor, LegalActions, Mapping[str, Tensor]]:
        hidden, legal, entities = self._encode(observations)
        carried = None
        if state is not None and not (hasattr(state, "get") and hasattr(state, "__setitem__")):
            raise TypeError(
                f"state must be a dict with lstm_h and lstm_c, or None, got {type(state).__name__}"
            )
        if state is not None and state.get("lstm_h") is not None:
            if state.get("lstm_c") is None:
                raise ValueError("state has lstm_h and no lstm_c; carry both, or neither")
            carried = (state["lstm_h"].unsqueeze(0), state["lstm_c"].unsqueeze(0))
            if carried[0].shape[1:] != hidden.shape:
                raise ValueError(
                    f"lstm_h must be {tuple(hidden.shape)}, got {tuple(state['lstm_h'].shape)}"
                )
        output, (h, c) = self.lstm(hidden.unsqueeze(0), carried)
        if state is not None:
            state["lstm_h"], state["lstm_c"] = h.squeeze(0), c.squeeze(0)
        return output.squeeze(0), legal, entities

    @_fresh_weights
    def forward(self, observations: Tensor, state: Any = None) -> tuple[LegalNormal, Tensor]:
        """Whole segments: (segments, horizon, columns) -> LegalNormal of segments * horizon rows.

        Values are (segments, horizon). A batch of two dimensions is taken as horizon 1.
        """
        if observations.ndim == 2:
            observations = observations.unsqueeze(1)
        if observations.ndim != 3:
            raise ValueError(
                "observations must be (segments, horizon, columns), got "
                f"{tuple(observations.shape)}"
            )
        segments, horizon, columns = observations.shape
        flat = observations.reshape(segments * horizon, columns)
        hidden, legal, entities = self._encode(flat)
        in_time = hidden.view(segments, horizon, -1).transpose(0, 1)
        if torch.compiler.is_compiling():
            weights: list[Tensor] = list(self._lstm_weights)
            if torch.is_autocast_enabled(in_time.device.type):
                dtype = torch.get_autocast_dtype(in_time.device.type)
                in_time, weights = in_time.to(dtype), [one.to(dtype) for one in weights]
            output = lstm(in_time, weights)
        else:
            output, _ = self.lstm(in_time)
        output = output.transpose(0, 1).reshape(segments * horizon, -1)
        face, value = self._face((output, legal, entities))
        return face, value.view(segments, horizon)


class _Sharpened(nn.Module):
    """A policy that plays from a sharper distribution than it trains with; for evaluation."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.policy = policy
        self.hidden_size = policy.hidden_size

    def forward_eval(self, observations: Tensor, state: Any = None) -> tuple[LegalNormal, Tensor]:
        """As the policy's, with the sharper distribution."""
        return self._sharpen(self.policy.forward_eval(observations, state))

    def forward(self, observations: Tensor, state: Any = None) -> tuple[LegalNormal, Tensor]:
        """As the policy's, with the sharper distribution."""
        return self._sharpen(self.policy(observations, state))

    def _sharpen(self, decided: tuple[LegalNormal, Tensor]) -> tuple[LegalNormal, Tensor]:
        face, value = decided
        return LegalNormal(self.sharpened(face.distribution), face.action_dtype), value

    def sharpened(self, distribution: TupleDistribution) -> TupleDistribution:
        """What is played in the place of the policy's distribution."""
        raise NotImplementedError


class Greedy(_Sharpened):
    """Plays the most probable tuple of a policy; for evaluation.

    Its distribution has all mass on the mode, so log-probs are 0 for it and -inf otherwise.
    """

    def sharpened(self, distribution: TupleDistribution) -> TupleDistribution:
        """All mass on the mode."""
        mode = distribution.mode
        alone = LegalActions.trusted(
            mode, torch.ones_like(mode[:, 0]), mode.new_zeros(mode.shape[1])
        )
        return LegalCategorical(alone, torch.zeros(len(mode), device=mode.device))


class TopK(_Sharpened):
    """Plays one of the k most probable tuples of a policy, renormalised; for evaluation.

    Args:
        policy: with one of this library's heads.
        k: at least 1; 1 is Greedy.

    Raises:
        TypeError: k is not a whole number.
        ValueError: k below 1.
    """

    def __init__(self, policy: Policy, k: int) -> None:
        super().__init__(policy)
        k = operator.index(k)
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        self.k = k

    def sharpened(self, distribution: TupleDistribution) -> TupleDistribution:
        """The k most probable tuples, renormalised.

        Raises:
            TypeError: a distribution that cannot tell them.
        """
        top = getattr(distribution, "top", None)
        if top is None:
            raise TypeError(
                f"{type(distribution).__name__} has no top(k): TopK needs the flat or the "
                "autoregressive head, or a head whose distribution offers it"
            )
        sharper: TupleDistribution = top(self.k)
        return sharper


def _from_env(env: Any, attribute: str, argument: str) -> Any:
    found = env_attribute(env, attribute)
    if found is None:
        raise ValueError(
            f"a policy needs {argument}=...: {type(env).__name__} has no {attribute}, nor does "
            "what it wraps"
        )
    return found


def _action_dtype(env: Any, spec: ActionSpec) -> torch.dtype:
    """The dtype of the environment's action space, whose sizes must be the spec's."""
    space = env_attribute(env, "single_action_space")
    if space is None:
        return torch.int64
    nvec = getattr(space, "nvec", None)
    start = getattr(space, "start", 0)
    if nvec is None or np.any(start) or np.asarray(nvec).tolist() != spec.nvec.tolist():
        raise ValueError(
            f"the environment's action space is {space}, the spec's tuples need "
            f"MultiDiscrete({spec.nvec.tolist()})"
        )
    dtype: torch.dtype = getattr(torch, space.dtype.name)
    return dtype


def _restore_exploration(module: nn.Module, incompatible_keys: Any) -> None:
    if isinstance(module, Policy):
        module._read_exploration()


def _remember_weights(module: nn.Module, incompatible_keys: Any) -> None:
    if isinstance(module, RecurrentPolicy):
        module._remember_weights()
