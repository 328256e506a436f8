"""Makes a saved policy again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from tcg_flatpolicy import saving
from tcg_flatpolicy.actor_critic import ActorCritic
from tcg_flatpolicy.heads import HeadFactory
from tcg_flatpolicy.layout import LegalLayout
from tcg_flatpolicy.meaning import meaning
from tcg_flatpolicy.puffer.policy import FlatPolicy, Policy, RecurrentPolicy
from tcg_flatpolicy.spec import ActionSpec

KINDS = {kind.__name__: kind for kind in (ActorCritic, Policy, FlatPolicy, RecurrentPolicy)}


def load(
    path: str | Path,
    env: Any = None,
    *,
    encoder: nn.Module | None = None,
    head: HeadFactory | None = None,
    kind: type[ActorCritic] | None = None,
    spec: ActionSpec | None = None,
    layout: LegalLayout | None = None,
    grow: bool = False,
) -> Any:
    """The policy that ``policy.save(path)`` wrote, on the CPU and in train mode.

    Args:
        path: of the file.
        env: as for Policy; its spec and layout must be those that the policy was saved with. A
            layout that has none of the fields of ``critic_only`` will do to play: the value is then
            an untrained one without them.
        encoder: in the place of the saved one; needed if that is of a class of your own.
        head: likewise, a factory as for Policy.
        kind: the policy's class; needed if it is of your own. It is called as Policy is.
        spec: as for Policy.
        layout: as for Policy.
        grow: whether spec, layout and encoder may have more than the saved ones: primaries, values
            of an Index or Entity, fields, cards and categories. What has the name of something
            saved keeps its weights, so old tuples have the same scores as before.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, has something of your own that was not given, or was saved with
            another spec, layout or encoder; the message names the first difference.
    """
    saved = saving.read(path)
    if kind is None and saved["kind"] not in KINDS:
        raise ValueError(
            f"{path} is of a class of your own, {saved['kind']}, which a file does not import: "
            "pass it as load(path, env, kind=...)"
        )
    kind = kind or KINDS[saved["kind"]]
    spec, layout = meaning(env, spec=spec, layout=layout)
    own, hidden = saving.layout_facts(layout), saved["arguments"]["critic_only"]
    for_play = bool(hidden) and not any(f"field {name!r}" in own for name in hidden)
    if for_play:  # the policy never saw them, and the value is not asked
        saved["arguments"]["critic_only"] = ()
        for what, prefixes in (
            ("layout", tuple(f"field {name!r}" for name in hidden)),
            ("axes", "value."),
            ("weights", "value."),
        ):
            saved[what] = {n: v for n, v in saved[what].items() if not n.startswith(prefixes)}
    saving.check_facts(path, "spec", saved["spec"], saving.spec_facts(spec), grow)
    saving.check_facts(path, "layout", saved["layout"], own, grow)
    arguments = dict(saved["arguments"])
    arguments["encoder"] = encoder or saving.encoder_of(path, saved["encoder"], layout)
    arguments["head"] = head or saving.head_of(path, saved["head"])
    if issubclass(kind, Policy):
        if not arguments.pop("recurrent"):
            del arguments["first_step"]
        if issubclass(kind, FlatPolicy):
            del arguments["head"]
        policy: ActorCritic = kind(env, spec=spec, layout=layout, **arguments)
    else:
        policy = kind(spec, layout, **arguments)
    if saved["head"]["path_entropy"] is not None:
        policy.head.path_entropy = saved["head"]["path_entropy"]
    weights = saving.grown(path, saved, policy) if grow else saved["weights"]
    if for_play:
        weights |= policy.value.state_dict(prefix="value.")
    try:
        policy.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(
            f"{path} does not fit the policy: {' '.join(str(error).split())}"
        ) from error
    return policy
