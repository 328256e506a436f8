"""A policy in one file: its weights, what they were learned for, and how to make it again.

Reading a file imports nothing and runs no code of it: recipes are of this library's own classes.

A module whose parameters have rows for named things says so by ``named_axes()``: {what a parameter
is: (its name, axis, axis, ...)}. An axis is None, or {name: rows} in the order in which they lie.
By these a larger policy finds the rows of a smaller one.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tcg_flatpolicy.encoders import ENCODERS
from tcg_flatpolicy.heads import HEADS
from tcg_flatpolicy.layout import LegalLayout
from tcg_flatpolicy.provenance import provenance, write_whole
from tcg_flatpolicy.spec import ActionSpec
from tcg_flatpolicy.table import part_names

FORMAT = 1
KEYS = ("format", "kind", "arguments", "head", "encoder", "spec", "layout", "axes", "weights")


def write_tensors(path: str | Path, content: Mapping[str, Any]) -> None:
    """Writes tensors and plain values, whole, for :func:`read_tensors`."""
    buffer = io.BytesIO()
    torch.save(dict(content), buffer)
    write_whole(Path(path), buffer.getvalue())


def read_tensors(path: str | Path, keys: Sequence[str] = ()) -> dict[str, Any]:
    """Reads what :func:`write_tensors` wrote, and no code.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or lacks one of the keys; the message says what is wrong.
    """
    try:
        with zipfile.ZipFile(path) as file:  # torch.load itself does not look at the checksums
            broken = file.testzip()
        if broken:
            raise ValueError(f"the checksum of {broken} is wrong")
        content = torch.load(path, weights_only=True, map_location="cpu")
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")
    except OSError:
        raise
    except Exception as error:
        words = " ".join(str(error).split())
        raise ValueError(
            f"{path} is damaged, or is no file of this library: {words}; take a complete copy"
        ) from error
    for key in keys:
        if key not in content:
            raise ValueError(f"{path} is damaged, or is no file of this kind: it has no {key!r}")
    return content


def save(policy: Any, path: str | Path) -> None:
    """Writes a policy to one file, whole; ``fp.load`` reads it.

    An encoder, a head or a policy of a class of your own is saved by its weights and the name of
    its class, and given again to ``fp.load``.

    Args:
        policy: an ActorCritic.
        path: of the file; an earlier one is replaced.
    """
    encoder, head = policy.encoder, policy.head
    known = type(encoder) in ENCODERS.values()
    content = {
        "format": FORMAT,
        "versions": provenance()["versions"],
        "kind": class_name(policy),
        "arguments": {
            "width": policy.width,
            "invalid": "drop" if policy.layout.dropped else "raise",
            "recurrent": policy.recurrent,
            "first_step": policy.first_step,
            "critic_only": list(policy.critic_only),
        },
        "head": {"class": class_name(head), "path_entropy": getattr(head, "path_entropy", None)},
        "encoder": {"class": class_name(encoder), "recipe": encoder.recipe() if known else None},
        "spec": spec_facts(policy.spec),
        "layout": layout_facts(policy.layout),
        "axes": {what: list(axes) for what, axes in axes_of(policy).items()},
        "weights": {name: one.cpu().clone() for name, one in policy.state_dict().items()},
    }
    write_tensors(path, content)


def read(path: str | Path) -> dict[str, Any]:
    """Reads what :func:`save` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, no file of save, or of a later version.
    """
    content = read_tensors(path, KEYS)
    if content["format"] != FORMAT:
        raise ValueError(
            f"{path} has format {content['format']}, and this version of tcg_flatpolicy reads "
            f"{FORMAT}; it was written with {content.get('versions')}"
        )
    return content


def head_of(path: str | Path, saved: Mapping[str, Any]) -> str:
    """The name in HEADS of a saved head; a ValueError for one of the user's own."""
    for name, kind in HEADS.items():
        if class_name(kind) == saved["class"]:
            return name
    raise ValueError(
        f"{path} has a head of your own, {saved['class']}, which a file does not import: pass the "
        "class as load(path, env, head=...)"
    )


def encoder_of(path: str | Path, saved: Mapping[str, Any], layout: LegalLayout) -> nn.Module:
    """A saved encoder, with new weights; a ValueError for one of the user's own."""
    for kind in ENCODERS.values():
        if class_name(kind) == saved["class"]:
            return kind.of_recipe(layout, saved["recipe"])
    raise ValueError(
        f"{path} has an encoder of your own, {saved['class']}, which a file does not import: make "
        "one as it was made for that policy, and pass it as load(path, env, encoder=...)"
    )


def class_name(one: Any) -> str:
    """Of this library's classes the name alone, of others with the module before it."""
    kind = one if isinstance(one, type) else type(one)
    ours = kind.__module__.partition(".")[0] == __name__.partition(".")[0]
    return kind.__name__ if ours else f"{kind.__module__}.{kind.__name__}"


# ---- what a policy was made for


def spec_facts(spec: ActionSpec) -> dict[str, Any]:
    """What makes a spec, each by its name."""
    parts = part_names(spec).items()
    return {
        **{f"primary {primary.name!r}": number for number, primary in spec.primaries.items()},
        **{name: [part.start, part.role.size] for part, name in parts},
        "slots": spec.slots,
        "noop": spec.noop.tolist(),
    }


def layout_facts(layout: LegalLayout) -> dict[str, Any]:
    """What makes a layout, each by its name; not where a field lies, which weights do not see."""
    actions = layout.action_names
    return {
        **{
            f"field {field.name!r}": [str(field.dtype), list(field.shape)]
            for field in layout.fields()
        },
        "count": layout.count_name,
        "actions": actions if isinstance(actions, str) else list(actions),
    }


def check_facts(
    path: str | Path, what: str, saved: Mapping[str, Any], own: Mapping[str, Any], grow: bool
) -> None:
    """Whether a spec or layout is the saved one; with ``grow``, whether it has at least as much.

    Raises:
        ValueError: naming the first difference.
    """
    for name in [*saved, *own]:
        then, now = saved.get(name, "not there"), own.get(name, "not there")
        if then == now or (grow and _contains(name, then, now)):
            continue
        way = "grow=True keeps what there was and adds to it"
        if grow:
            way = "grow=True adds, and takes nothing away"
        raise ValueError(
            f"{path} was saved with another {what}: {name} was {then} and is {now} here; {way}"
        )


def _contains(name: str, then: Any, now: Any) -> bool:
    """Whether a fact may have become another one where a policy grows."""
    if "not there" in (then, now):
        return bool(then == "not there")
    if name.startswith("field"):
        (_, before), (_, after) = then, now
        return len(before) == len(after) and all(a <= b for a, b in zip(before, after, strict=True))
    if isinstance(then, list) and len(then) == 2 and name != "noop":
        return bool(then[1] <= now[1])
    # Ids and the no-op follow their names, and a list may lie elsewhere.
    return name != "slots" or then <= now


# ---- larger policies


def axes_of(policy: nn.Module) -> dict[str, tuple[Any, ...]]:
    """{what a parameter or buffer is: (its name, axis, ...)} of all that have named rows."""
    found = {}
    for prefix, module in policy.named_modules():
        at = f"{prefix}." if prefix else ""
        for what, (name, *axes) in getattr(module, "named_axes", dict)().items():
            found[at + what] = (at + name, *axes)
    return found


def grown(path: str | Path, saved: Mapping[str, Any], policy: nn.Module) -> dict[str, Tensor]:
    """A state_dict for a policy that has at least what the saved one had.

    What was there keeps its numbers. New rows keep those that the policy was made with, but for
    new inputs of a Linear, which are 0: so old states and tuples have the same scores as before.

    Raises:
        ValueError: something is gone, is smaller, or has grown with no names of its rows.
    """
    state: dict[str, Tensor] = {n: one.clone() for n, one in policy.state_dict().items()}
    own = dict(_named(state, axes_of(policy)))
    for what, (name, *before) in _named(saved["weights"], saved["axes"]):
        if what not in own:
            raise ValueError(f"{path} has weights {what!r}, and the policy to grow into has none")
        target, *after = own[what]
        old, new = saved["weights"][name], state[target]
        if not old.ndim:
            new.copy_(old)
            continue
        before, after = ([*axes, *[None] * old.ndim][: old.ndim] for axes in (before, after))
        if old.ndim != new.ndim or any(
            size != larger and (a is None or b is None)
            for size, larger, a, b in zip(old.shape, new.shape, before, after, strict=True)
        ):
            raise ValueError(
                f"{path} has weights {what!r} of shape {tuple(old.shape)}, here {tuple(new.shape)};"
                " they grow only where their module names their rows, see named_axes"
            )
        places = [
            torch.arange(size) if a is None or b is None else _places(path, what, a, b)
            for size, a, b in zip(old.shape, before, after, strict=True)
        ]
        owner = policy.get_submodule(target.rpartition(".")[0])
        if isinstance(owner, nn.Linear) and old.ndim == 2:
            fresh = torch.ones(new.shape[1], dtype=torch.bool)
            fresh[places[1]] = False
            new[:, fresh] = 0
        new[torch.meshgrid(*places, indexing="ij")] = old.to(new.dtype)
    return state


def _named(
    weights: Mapping[str, Tensor], axes: Mapping[str, Sequence[Any]]
) -> Iterator[tuple[str, Sequence[Any]]]:
    """(what, (name, axis, ...)) of all weights; those without named rows go by their names."""
    yield from axes.items()
    told = {name for name, *_ in axes.values()}
    yield from ((name, (name,)) for name in weights if name not in told)


def _places(
    path: str | Path, what: str, before: Mapping[str, int], after: Mapping[str, int]
) -> Tensor:
    """Where each old row lies among the new ones, (n,) int64."""
    begins, at = {}, 0
    for name, rows in after.items():
        begins[name], at = at, at + rows
    for name, rows in before.items():
        if after.get(name, 0) < rows:
            raise ValueError(
                f"{path} has {rows} rows of {name} in {what!r}, here there are "
                f"{after.get(name, 0)}; growing takes nothing away"
            )
    return torch.cat([begins[name] + torch.arange(rows) for name, rows in before.items()])
