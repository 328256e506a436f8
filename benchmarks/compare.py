"""Ways to choose a legal tuple, compared: legality, exactness, speed and learning.

    python benchmarks/compare.py --quick            # under ten minutes on two cores
    python benchmarks/compare.py --jobs 2           # all of it: an hour or two; goes on if stopped

Writes a folder: results.json, report.md, pictures, and under runs/ each training run with its
curve. Heads and their names are in baselines.py, each part in a file of its own: exactness.py,
speed.py, learning.py (on Essence Wars, and on the task of coupled.py, where legality couples the
slots).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import baselines
import exactness
import game_ppo
import learning
import measure
import speed

from tcg_flatpolicy.app.run_folder import write_json
from tcg_flatpolicy.provenance import write_whole

SEED = 1


@dataclass(frozen=True)
class Scale:
    """How much is done; a folder holds one scale only."""

    quick: bool
    seeds: int
    """Training runs of each head on each task."""
    steps: int
    """Environment steps of a run on Essence Wars."""
    coupled_steps: int
    """Environment steps of a run on the task where legality couples the slots."""
    tuning_steps: int
    """Environment steps of a run of the tuning grid; 0 for none, with the library's settings."""
    eval_games: int
    """Games of each final evaluation."""
    illegal: str
    """What an illegal draw is replaced by: random, a legal action drawn uniformly, or noop."""


FULL = Scale(
    quick=False,
    seeds=3,
    steps=500_000,
    coupled_steps=200_000,
    tuning_steps=150_000,
    eval_games=1000,
    illegal="random",
)
QUICK = Scale(
    quick=True,
    seeds=1,
    steps=60_000,
    coupled_steps=60_000,
    tuning_steps=0,
    eval_games=100,
    illegal="random",
)


def claim(scale: Scale, folder: Path) -> None:
    """Takes a folder for a comparison of this scale, a new one or one that was stopped.

    Raises:
        ValueError: it holds one of another scale, or something else.
    """
    path = folder / "config.json"
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; name a folder with --folder")
    if path.exists():
        try:
            held = dict(json.loads(path.read_text()))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{path} is no configuration of a comparison ({error}); name another folder with "
                "--folder, or remove it"
            ) from error
        for field in fields(Scale):
            ours = getattr(scale, field.name)
            if held.get(field.name) != ours:
                raise ValueError(
                    f"{folder} holds a comparison with {field.name}={held.get(field.name)!r}, not "
                    f"{ours!r}; name another folder with --folder, or remove it"
                )
        return
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(
            f"{folder} is not empty and holds no comparison; name another one with --folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, asdict(scale))


def once(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was made before and is kept at path, or what make makes now."""
    if path.exists():
        kept: dict[str, Any] = json.loads(path.read_text())
        return kept
    made = {**make(), "provenance": measure.provenance()}
    write_json(path, made)
    return made


def learn(
    scale: Scale, folder: Path, jobs: int, say: Callable[[str], None]
) -> tuple[dict[str, Any], list[str]]:
    """All training runs: {task: {label: Summary}}, and the commits at which they were made."""
    illegal: Any = scale.illegal
    heads = list(baselines.HEADS)
    tuned: dict[tuple[str, str], learning.Run] = {}
    if scale.tuning_steps:
        grid = [
            run
            for task in (learning.FIXED, learning.COUPLED)
            for run in learning.tuning_runs(task, heads, scale.tuning_steps, illegal)
        ]
        say(f"tuning: {len(grid)} runs, the same grid for each head")
        tuned = learning.pick(learning.run_all(grid, folder / "tuning", jobs, say))
    runs = []
    for task in learning.TASKS:
        steps = scale.coupled_steps if task == learning.COUPLED else scale.steps
        for seed in range(1, scale.seeds + 1):
            for head in heads:
                run = learning.Run(
                    task, head, seed, steps, illegal=illegal, eval_games=scale.eval_games
                )
                # Random decks take what was best with fixed ones.
                found = tuned.get((task if task == learning.COUPLED else learning.FIXED, run.label))
                if found is not None:
                    run = replace(run, learning_rate=found.learning_rate, ent_coef=found.ent_coef)
                runs.append(run)
            if task != learning.COUPLED:
                runs.append(learning.game_ppo_run(task, seed, steps, scale.eval_games))
    say(f"learning: {len(runs)} runs")
    results = learning.run_all(runs, folder / "runs", jobs, say)
    commits = sorted({result.told["provenance"]["commit"] for result in results})
    if len(commits) > 1:
        say(f"the runs were made at several commits: {', '.join(commits)}")
    return learning.summaries(results), commits


def costs(
    told: Mapping[str, Mapping[str, learning.Summary]],
    exact: Mapping[str, Any],
    timed: Mapping[str, Any],
) -> str:
    """The table of legality, exactness and speed: a row a head."""
    header = [
        "head",
        "untrained: draws that are not listed",
        "illegal, unused slots ignored",
        "the same, trained",
        "entropy reported, less that of what is played (nats)",
        "variance of the policy gradient",
        "time of a draw",
        "time of an update",
    ]
    rows = []
    for label, of_game in told[learning.FIXED].items():
        if of_game.head == game_ppo.NAME:
            continue
        shares = of_game.not_listed_initial, of_game.illegal_initial
        cells = [label, *(percent(one) for one in (*shares, of_game.illegal_final["sampling"]))]
        policies = exact["heads"][of_game.head][exactness.KINDS[0]]
        bias, variance = (
            sum(one[key] for one in policies) / len(policies)
            for key in ("entropy bias", "policy gradient variance")
        )
        cells.append("0" if abs(bias) < 5e-3 else f"{bias:+.2f}".replace("-", "−"))
        cells.append(measure.number(variance))
        ratios = timed["game"]["ratios"]
        cells += [measure.number(ratios[phase][of_game.head]["median"]) for phase in speed.PHASES]
        rows.append(cells)
    return measure.table(header, rows)


def learned(told: Mapping[str, Mapping[str, learning.Summary]]) -> str:
    """The table of what was learned: a row a head."""
    header = ["head"]
    for task in (learning.FIXED, learning.RANDOM):
        header += [f"{task}: sampling", "mode", "after equal time"]
    header += ["coupled legality: sampling", "mode"]
    labels = dict.fromkeys(label for summaries in told.values() for label in summaries)
    rows = []
    for label in labels:
        cells = [label]
        for task in learning.TASKS:
            summary = told[task].get(label)
            if summary is None:
                cells += ["", ""]
                continue
            cells += [rate(summary.final[how]) for how in ("sampling", "mode")]
            if task != learning.COUPLED:
                cells.append(rate(summary.at_equal_seconds))
        rows.append(cells)
    return measure.table(header, rows)


def percent(share: float) -> str:
    """A share; 0 only where there was none at all."""
    return f"{share:.1%}" if share else "0"


def rate(spread: learning.Spread) -> str:
    """A rate, with its interval over seeds where there is more than one."""
    if len(spread.values) == 1:
        return f"{spread.mean:.1%}"
    low, high = max(spread.low, 0.0), min(spread.high, 1.0)
    return f"{spread.mean:.1%} [{100 * low:.1f}, {100 * high:.1f}]"


def report(
    scale: Scale,
    told: Mapping[str, Mapping[str, learning.Summary]],
    exact: dict[str, Any],
    timed: dict[str, Any],
) -> str:
    """The whole report, Markdown."""
    body = "# Ways to choose a tuple, compared\n\n"
    if scale.quick:
        body += (
            "**A quick run**: one seed, short training and few games. It shows that everything "
            "works, and what is illegal; its win rates say little. Leave out --quick for the rest."
            "\n\n"
        )
    replaced = "a uniformly drawn legal one" if scale.illegal == "random" else "the end of turn"
    fixed = next(iter(told[learning.FIXED].values()))
    coupled = next(iter(told[learning.COUPLED].values()))
    seeds = f"mean of {scale.seeds} seeds, in brackets the 95% interval of Student's t over them"
    body += (
        "## What it costs\n\nOn Essence Wars. What stands in a slot that the primary does not use "
        "is ignored, as engines do; a tuple that is illegal even so is replaced by "
        f"{replaced}, and counted. Entropy and variance are those of untrained policies; the "
        "variance is over one draw a state, relative to the true gradient's norm. Times are of "
        "the whole policy, encoder included, over the flat head's.\n\n"
        + costs(told, exact, timed)
        + "\n## What it learns\n\nEssence Wars: games won against the batch engine's greedy "
        f"opponent after {fixed.steps:,.0f} environment steps, {scale.eval_games:,} games each; "
        f"coupled legality: share of the optimum after {coupled.steps:,.0f}. "
        + (seeds[0].upper() + seeds[1:] if scale.seeds > 1 else "One seed")
        + ". After equal time: wins while training, of the games of the last "
        f"{learning.WINDOW_STEPS:,} steps before the moment when the fastest head had done all of "
        "its steps, in seconds of the processor.\n\n"
        + learned(told)
        + "\n![win rates](win_rate.png)\n"
        "\n![coupled legality](coupled.png)\n\n![illegal actions](illegal.png)\n"
    )
    body += "\n## Settings\n\n" + measure.table(
        ["task", "head", "parameters", "learning rate", "entropy weight", "steps a second"],
        [
            [
                task,
                label,
                f"{one.parameters:,}",
                f"{one.learning_rate:g}",
                f"{one.ent_coef:g}",
                f"{one.steps_per_process_second.mean:,.0f}",
            ]
            for task, summaries in told.items()
            for label, one in summaries.items()
        ],
    )
    if scale.tuning_steps:
        body += (
            f"\nTuned: learning rate and entropy weight, each head with the same grid "
            f"({len(learning.TUNING_RATES) * len(learning.TUNING_ENTROPIES)} runs of "
            f"{scale.tuning_steps:,} steps, a seed not used otherwise); random decks take what was "
            "best with fixed ones.\n"
        )
    body += "\n## Exactness\n\n" + exactness.report(exact) + "\n![exactness](exactness.png)\n"
    body += "\n## Speed\n\n" + speed.report(timed) + "\n![speed](speed.png)\n"
    told_by = measure.provenance()
    return body + "\n" + "".join(f"- {key}: {value}\n" for key, value in told_by.items())


def compare(scale: Scale, folder: Path, jobs: int, say: Callable[[str], None]) -> None:
    """Does what is not done yet, and writes the report."""
    claim(scale, folder)
    say(f"{'quick ' if scale.quick else ''}comparison in {folder}")
    say("speed: contenders take turns, with nothing beside them")
    timed = once(folder / "speed.json", lambda: speed.measure(scale.quick, SEED))
    say("exactness")
    exact = once(folder / "exactness.json", lambda: exactness.measure(scale.quick, SEED))
    told, commits = learn(scale, folder, jobs, say)
    learning.draw(told, folder)
    exactness.draw(exact, folder / "exactness.png")
    speed.draw(timed, folder / "speed.png")
    write_json(
        folder / "results.json",
        {
            **measure.provenance(),
            "scale": asdict(scale),
            "commits of the training runs": commits,
            "learning": {t: {k: asdict(s) for k, s in of.items()} for t, of in told.items()},
            "exactness": exact,
            "speed": timed,
        },
    )
    text = report(scale, told, exact, timed)
    text += f"- commits of the training runs: {', '.join(commits)}\n"
    write_whole(folder / "report.md", text.encode())
    say(text)
    say(f"written to {folder}")


def main() -> int:
    """Runs the comparison; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="under ten minutes on two cores")
    parser.add_argument("--folder", type=Path, help="where to write, and to go on")
    parser.add_argument("--jobs", type=int, default=2, help="training runs side by side")
    parser.add_argument("--seeds", type=int, help="training runs of each head on each task")
    parser.add_argument(
        "--illegal", choices=("random", "noop"), default="random", help="what replaces it"
    )
    options = parser.parse_args()
    scale = QUICK if options.quick else FULL
    changes: dict[str, Any] = {"illegal": options.illegal}
    if options.seeds is not None:
        if options.seeds < 1:
            parser.error(f"--seeds must be at least 1, got {options.seeds}")
        changes["seeds"] = options.seeds
    scale = Scale(**{**asdict(scale), **changes})
    folder = options.folder or measure.RESULTS / ("compare-quick" if scale.quick else "compare")
    if options.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {options.jobs}")
    # It takes SIGINT for itself when it is imported, and would end the program at once.
    import pufferlib.pufferl  # noqa: F401

    try:
        with learning.sigint_raises():
            compare(scale, folder, options.jobs, lambda line: print(line, flush=True))
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
