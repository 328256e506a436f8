"""Whether the fused decision does on this machine's GPU what it should, and how fast.

Needs torch, triton, numpy and gymnasium, and a GPU; PufferLib for the last part. Under 8 minutes,
most of which is compiling. Each line says what was checked, and what was found; the exit status is
1 if something failed.

    python benchmarks/gpu_check.py
    python benchmarks/gpu_check.py --compile-only   # registers and spills; needs no GPU
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # read when Triton is imported
os.environ.pop("TCG_KERNEL", None)

import gymnasium
import numpy as np
import torch
from torch import Tensor, nn

import tcg_flatpolicy as fp
from tcg_flatpolicy.heads.fused import FusedCategorical, bind
from tcg_flatpolicy.kernels import reference
from tcg_flatpolicy.kernels.reference import Addresses, Rows

DEVICE = "cuda"
HAND, UNITS, KINDS, ROOM = 10, 6, 40, 128
SPEC = fp.ActionSpec(
    [
        fp.Primary("end_turn"),
        fp.Primary("play", fp.Entity("hand", HAND), fp.Index("place", 6)),
        fp.Primary("attack", fp.Entity("unit", UNITS), fp.Entity("unit", UNITS)),
        fp.Primary(
            "ability",
            fp.Entity("unit", UNITS),
            fp.Index("which", 4),
            fp.OneOf(fp.Index("none", 1), fp.Entity("unit", UNITS)),
        ),
    ]
)
DTYPE = np.dtype(
    [
        ("hand", "u1", HAND),
        ("unit", "u1", UNITS),
        ("life", "i2", 2),
        ("n", "u2"),
        ("legal", "u1", (ROOM, 4)),
    ]
)
LAYOUT = fp.LegalLayout.from_dtype(DTYPE, "n", "legal", SPEC)
HIDDEN, ENTITY, WIDTH = 256, 32, 64
PLAIN = torch.tensor([1.0, 0.0])


class Encoder(nn.Module):
    """Cards and units by their kind."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden_size = HIDDEN
        self.entity_sizes = {"hand": (HAND, ENTITY), "unit": (UNITS, ENTITY)}
        self.kinds = nn.Embedding(KINDS, ENTITY)
        self.first = nn.Linear((HAND + UNITS) * ENTITY, HIDDEN)
        self.second = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, observations: Tensor) -> fp.Encoding:
        hand = self.kinds(LAYOUT.field(observations, "hand").long())
        unit = self.kinds(LAYOUT.field(observations, "unit").long())
        hidden = self.first(torch.cat([hand, unit], dim=1).flatten(1)).relu()
        return fp.Encoding(self.second(hidden).relu(), {"hand": hand, "unit": unit})


def deal(data: np.ndarray, rng: np.random.Generator) -> None:
    """Fills observations (B, bytes) of the game: half of the rows empty, else 12 tuples or so."""
    records, rows = data.view(DTYPE)[:, 0], len(data)
    records["hand"] = rng.integers(0, KINDS, (rows, HAND))
    records["unit"] = rng.integers(0, KINDS, (rows, UNITS))
    records["n"] = np.where(rng.random(rows) < 0.5, 0, 1 + rng.geometric(1 / 12, rows).clip(0, 100))
    primaries = rng.integers(0, len(SPEC.primaries), (rows, ROOM))
    records["legal"][..., 0] = primaries
    for slot in range(1, 4):
        limits = SPEC.limits[primaries, slot]
        records["legal"][..., slot] = rng.integers(0, limits)


def observations(rows: int, seed: int = 0) -> Tensor:
    data = np.zeros((rows, DTYPE.itemsize), np.uint8)
    deal(data, np.random.default_rng(seed))
    return torch.as_tensor(data).to(DEVICE)


def make_policy() -> fp.FlatPolicy:
    torch.manual_seed(0)
    policy = fp.FlatPolicy(spec=SPEC, layout=LAYOUT, encoder=Encoder(), width=WIDTH)
    with torch.no_grad():  # far from uniform, so that a wrong number is seen
        policy.head.scorer.readout.mul_(10)
        policy.head.scorer.readout_of_state.mul_(30)
    return policy.to(DEVICE)


def step(policy: fp.FlatPolicy, data: Tensor) -> tuple[Tensor, Tensor]:
    """What a rollout asks of a policy: actions and their log-probs."""
    with torch.no_grad():
        face, _ = policy.forward_eval(data)
        assert isinstance(face.distribution, FusedCategorical), "the packed path has decided"
        actions = face.sample()
        return actions, face.log_prob(actions)


def update(policy: fp.FlatPolicy, data: Tensor, actions: Tensor) -> Tensor:
    """What an update asks of it: log-probs, and a gradient."""
    policy.zero_grad(set_to_none=True)
    face, value = policy(data)
    log_prob, entropy = face.log_prob(actions), face.entropy()
    (log_prob.mean() + 0.01 * entropy.mean() + value.square().mean()).backward()
    return log_prob.detach()


# ---- what is checked: each returns what it found, or raises


def correctness() -> str:
    """Random specs, layouts and lists, against the reference in float64 on the CPU."""
    from tcg_flatpolicy.kernels import cuda

    worst, of_grads, apart, rows_seen = 0.0, 0.0, 0, 0
    for seed in range(12):
        rng = np.random.default_rng(seed)
        spec, layout = random_spec(rng)
        rows = int(rng.integers(1, 200))
        data = np.zeros((rows, layout.dtype.itemsize), np.uint8)
        layout.write(data, [random_list(spec, layout.padding, rng) for _ in range(rows)])
        torch.manual_seed(seed)
        sizes = {"a": (9, 7), "b": (9, 16)}
        head = fp.FlatHead(spec, 20, sizes, int(rng.integers(1, 140)))
        hidden = torch.randn(rows, 20)
        entities = {name: torch.randn(rows, *size) for name, size in sizes.items()}
        of = head.fused
        with torch.no_grad():
            plain = [one.detach() for one in bind(head.scorer, hidden, entities)]
        exact = Rows(*(one.double().requires_grad_() for one in plain))
        mine = Rows(*(one.to(DEVICE).requires_grad_() for one in plain))
        held = Addresses(of.ranges, of.limits, of.noop, of.learned)
        there = Addresses(*(one.to(DEVICE) for one in held[:3]), of.learned)
        explore = torch.tensor([[1.0, 0.0], [0.4, 0.0], [1.6, 0.2]][seed % 3])
        here, on_gpu = torch.as_tensor(data), torch.as_tensor(data).to(DEVICE)
        given = (here, layout.list_view(), held, exact, explore)
        asked = (on_gpu, layout.list_view(), there, mine, explore.to(DEVICE))
        drawn = reference.decide(*given, torch.tensor(seed))
        found = cuda.decide(*asked, torch.tensor(seed, device=DEVICE))
        assert not found.error.any(), f"error codes {found.error.unique().tolist()}"
        assert layout.read(here).contains(found.actions.cpu()).all(), "an illegal tuple was drawn"
        apart += int((found.actions.cpu() != drawn.actions).any(1).sum())
        rows_seen += rows
        best = cuda.decide(*asked, None).log_prob.cpu().double()
        wanted = reference.decide(*given, None).log_prob
        assert (best - wanted).abs().max() < 1e-5, "the mode is another tuple"
        actions = drawn.actions.clone()
        actions[::4] = 0  # often not listed
        a, b = reference.evaluate(*given, actions), cuda.evaluate(*asked, actions.to(DEVICE))
        weights = torch.randn(2, rows, dtype=torch.float64)
        grads = []
        for one, rows_of in ((a, exact), (b, mine)):
            w = weights.to(one.log_prob)
            some = one.log_prob.isfinite()
            total = (one.log_prob * w[0])[some].sum() + (one.entropy * w[1]).sum()
            grads.append(torch.autograd.grad(total, list(rows_of)))
        for x, y in ((a.log_prob, b.log_prob), (a.entropy, b.entropy)):
            y = y.detach().cpu().double()
            assert torch.equal(x.isinf(), y.isinf())
            some = x.isfinite()
            off = (x - y).abs() / x.abs().clamp(min=1)
            worst = max(worst, float(off[some].max()))
        largest = max(float(grad.abs().max()) for grad in grads[0])
        off = max(float((x - y.cpu()).abs().max()) for x, y in zip(*grads, strict=True))
        of_grads = max(of_grads, off / max(largest, 1e-2))
    assert worst <= 2e-6, f"log-prob or entropy off by {worst:.1e}"
    assert of_grads <= 1e-5, f"gradient off by {of_grads:.1e}"
    assert apart <= 1 + rows_seen // 1000, f"{apart} of {rows_seen} draws are not the reference's"
    return f"numbers off by {worst:.1e}, gradients by {of_grads:.1e}, draws other: {apart}"


def random_spec(rng: np.random.Generator) -> tuple[fp.ActionSpec, fp.LegalLayout]:
    def role() -> Any:
        roles = [
            fp.Index("x", int(rng.integers(1, 9))),
            fp.Entity("a", int(rng.integers(1, 9))),
            fp.Entity("b", int(rng.integers(1, 9))),
        ]
        return roles[rng.integers(3)] if rng.random() < 0.7 else fp.OneOf(*roles[:2])

    ids = rng.choice(12, rng.integers(1, 6), replace=False).tolist()
    spec = fp.ActionSpec(
        [fp.Primary(f"p{i}", *(role() for _ in range(rng.integers(0, 4))), id=i) for i in ids]
    )
    kinds = ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8"]
    room = int(rng.choice([3, 20, 150]))
    names = tuple(f"s{slot}" for slot in range(1 + spec.slots))
    listed = [(name, str(rng.choice(kinds)), (room,)) for name in names]
    dtype = np.dtype([("pad", "u1", int(rng.integers(1, 4))), ("n", "u2"), *listed])
    return spec, fp.LegalLayout.from_dtype(dtype, "n", names, spec)


def random_list(spec: fp.ActionSpec, room: int, rng: np.random.Generator) -> list[Any]:
    """Often empty, often with repeats."""
    count = int(rng.integers(0, room + 1)) if rng.random() < 0.7 else 0
    primaries = rng.choice(list(spec.primaries), count)
    return [(p, *(rng.integers(0, n) for n in spec.limits[p, 1:])) for p in primaries.tolist()]


def broken_lists() -> str:
    """An error raises in the next decision, and names the row."""
    policy, data = make_policy(), observations(64)
    bad = data.clone()
    bad[5, LAYOUT.find("n").offset] = 255
    step(policy, bad)
    try:
        step(policy, data)
    except ValueError as error:
        said = str(error)
    else:
        said = "nothing was raised"
    assert said.startswith("row 5: "), said
    return f"said in the next decision: {said[:40]}..."


def waits() -> str:
    """With torch told to refuse every wait for the device."""
    policy, data = make_policy(), observations(512)
    for _ in range(2):
        actions, log_prob = step(policy, data)
        again = update(policy, data, actions)
    torch.cuda.synchronize()
    assert (again - log_prob).abs().max() < 1e-6, "stored and replayed log-probs differ"
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(policy, data)
        update(policy, data, actions)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "0 in a rollout step and in an update"


def launches() -> str:
    """Of the GPU's kernels and copies, those of the encoder and the value left out."""
    policy, data = make_policy(), observations(512)
    actions, _ = step(policy, data)

    def encode() -> None:
        with torch.no_grad():
            policy.values(policy.encode(data).hidden)

    def encode_and_learn() -> None:
        policy.zero_grad(set_to_none=True)
        hidden, entities = policy.encode(data)
        total = policy.values(hidden).square().mean() + hidden.mean()
        (total + sum(one.mean() for one in entities.values())).backward()

    of_step = launched(lambda: step(policy, data)) - launched(encode)
    of_update = launched(lambda: update(policy, data, actions)) - launched(encode_and_learn)
    assert of_step <= 12, f"{of_step} in a rollout step, 12 at most were wanted"
    return f"{of_step} in a rollout step, {of_update} more in an update than encoder and value take"


def launched(run: Callable[[], Any]) -> int:
    run()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def graph() -> str:
    """A rollout step in a CUDA graph: each replay draws anew, from what the buffer then holds."""
    policy, data = make_policy(), observations(256)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(policy, data)
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        actions, log_prob = step(policy, data)
    seen = []
    for seed in (1, 1, 2):
        data.copy_(observations(256, seed))
        captured.replay()
        legal = LAYOUT.read_distinct(data)
        assert legal.contains(actions.long()).all(), "a replay drew an illegal tuple"
        face, _ = policy.forward_eval(data)
        off = (face.log_prob(actions) - log_prob).abs().max()
        assert off < 1e-5, f"a replay's log-probs are off by {float(off):.1e}"
        seen.append(actions.clone())
    differ = int((seen[0] != seen[1]).any(1).sum())
    assert differ, "two replays drew the same"
    return f"3 replays legal; two of the same states differ in {differ} of 256 rows"


def bfloat16() -> str:
    policy, data = make_policy(), observations(512)
    with torch.autocast(DEVICE, torch.bfloat16):
        actions, log_prob = step(policy, data)
        again = update(policy, data, actions)
    assert log_prob.dtype == torch.float32
    off = float((again - log_prob).abs().max())
    assert off < 1e-5, f"stored and replayed log-probs differ by {off:.1e}"
    assert all(p.grad is None or p.grad.isfinite().all() for p in policy.parameters())
    return f"stored and replayed log-probs differ by {off:.1e}, gradients are finite"


def compiled() -> str:
    policy, data = make_policy(), observations(512)
    actions, log_prob = step(policy, data)
    forward = torch.compile(policy.forward, fullgraph=True)
    grads = []
    for run in (policy, forward):
        policy.zero_grad(set_to_none=True)
        face, value = run(data)
        found = face.log_prob(actions)
        (found.mean() + 0.01 * face.entropy().mean() + value.square().mean()).backward()
        grads.append([p.grad.clone() for p in policy.parameters() if p.grad is not None])
    off = float((found - log_prob).abs().max())
    assert off < 1e-4, f"log-probs are off by {off:.1e}"
    of_grads = max(float((x - y).abs().max()) for x, y in zip(*grads, strict=True))
    assert of_grads < 1e-3, f"gradients are off by {of_grads:.1e}"
    return f"one graph; log-probs off by {off:.1e}, gradients by {of_grads:.1e}"


def floor() -> str:
    """Time of the kernels over that of copying the bytes that they cannot do without."""
    from tcg_flatpolicy.kernels import cuda

    policy, lines = make_policy(), []
    for rows in (512, 2048, 8192, 16384):
        data = observations(rows)
        legal = LAYOUT.read_distinct(data)
        hidden, entities = policy.encode(data)
        of, plain = policy.head.fused, PLAIN.to(DEVICE)
        held = Addresses(of.ranges, of.limits, of.noop, of.learned)
        bound = bind(policy.head.scorer, hidden, entities)
        mine = Rows(*(one.detach().requires_grad_() for one in bound))
        given = data, LAYOUT.list_view(), held, mine, plain
        seed = torch.tensor(1, device=DEVICE)
        actions = cuda.decide(*given, seed).actions
        tuples = len(legal.actions)
        forward = tuples * (4 + 4 * 4 * WIDTH) + rows * (2 * 4 * WIDTH + 50)
        backward = 2 * tuples * 4 * 4 * WIDTH + rows * 4 * 4 * WIDTH

        def both(given: Any = given, actions: Tensor = actions, mine: Rows = mine) -> None:
            found = cuda.evaluate(*given, actions)
            torch.autograd.grad(found.log_prob.sum() + found.entropy.sum(), list(mine))

        def draw(given: Any = given, seed: Tensor = seed) -> None:
            with torch.no_grad():
                cuda.decide(*given, seed)

        ratios = []
        for run, moved in ((draw, forward), (both, 2 * forward + backward)):
            buffer = torch.empty(max(1, moved // 2), dtype=torch.uint8, device=DEVICE)
            other = torch.empty_like(buffer)
            times = [
                milliseconds(run),
                milliseconds(lambda a=buffer, b=other: a.copy_(b)),  # type: ignore[misc]
            ]
            ratios.append(f"{times[0]:.3f} ms, {times[0] / times[1]:.1f} times")
        lines.append(f"    {rows} rows: draw {ratios[0]}; evaluate and backward {ratios[1]}")
    return "the floor\n" + "\n".join(lines)


def milliseconds(run: Callable[[], Any], rounds: int = 20) -> float:
    """The median of some runs, by the device's clock."""
    for _ in range(3):
        run()
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return float(np.median(times))


def trainer() -> str:
    """PuffeRL end to end against PufferLib's own unmasked head, an epoch of each in turn."""
    try:
        import pufferlib
        import pufferlib.vector
        from pufferlib.pufferl import PuffeRL
    except ImportError as error:
        return f"skipped: {error}"

    class Game(pufferlib.PufferEnv):  # type: ignore[misc]
        """Deals states, pays for attacks, and plays the first listed tuple for an illegal one."""

        def __init__(self, num_agents: int = 1024, buf: Any = None, seed: int = 0) -> None:
            self.action_spec, self.legal_layout = SPEC, LAYOUT
            self.single_observation_space = gymnasium.spaces.Box(
                0, 255, (DTYPE.itemsize,), np.uint8
            )
            self.single_action_space = SPEC.action_space
            self.num_agents, self.rng = num_agents, np.random.default_rng(seed)
            super().__init__(buf)

        def reset(self, seed: int | None = None) -> tuple[Any, list[Any]]:
            deal(self.observations, self.rng)
            return self.observations, []

        def step(self, actions: np.ndarray) -> tuple[Any, ...]:
            self.rewards[:] = actions[:, 0] == 2
            self.terminals[:] = True
            deal(self.observations, self.rng)
            return self.observations, self.rewards, self.terminals, self.truncations, []

        def close(self) -> None:
            pass

    class Unmasked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.sizes = Encoder(), SPEC.nvec.tolist()
            self.decoder, self.value = nn.Linear(HIDDEN, sum(self.sizes)), nn.Linear(HIDDEN, 1)

        def forward_eval(self, given: Tensor, state: Any = None) -> tuple[Any, Tensor]:
            hidden = self.encoder(given).hidden
            return self.decoder(hidden).split(self.sizes, dim=-1), self.value(hidden)

        forward = forward_eval

    from tcg_flatpolicy.app.settings import Settings

    settings = Settings(
        num_games=1024, bptt_horizon=32, minibatch_size=8192, update_epochs=2, total_steps=10**9
    )
    trainers, times = {}, {}
    for name in ("flat", "unmasked"):
        vecenv = pufferlib.vector.make(
            Game, num_envs=1, backend=pufferlib.vector.Serial, seed=settings.seed
        )
        policy = make_policy() if name == "flat" else Unmasked().to(DEVICE)
        folder = Path(tempfile.mkdtemp())
        with quiet():
            trainers[name] = PuffeRL(settings.trainer_config("cuda", folder), vecenv, policy)
        times[name] = []
    for _ in range(8):
        for name, one in trainers.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            with quiet():
                one.evaluate()
                one.train()
            torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    for one in trainers.values():
        one.utilization.stop()
    ratios = np.array(times["unmasked"][2:]) / np.array(times["flat"][2:])
    low, middle, high = np.quantile(ratios, [0.1, 0.5, 0.9])
    return f"steps a second over those of the unmasked head: {middle:.2f} ({low:.2f} to {high:.2f})"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# ---- compiling without a GPU

POINTERS = {"data": "*u8", "error": "*i32"} | dict.fromkeys(
    ("ranges", "limits", "noop", "given", "place", "actions"), "*i64"
)
NUMBERS = ("B", "LEARNED", "SPARE")


def compile_only() -> None:
    """Prints registers, spills and shared memory of the kernels for some kinds of GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from tcg_flatpolicy.kernels import cuda

    row_bytes, count, columns, room = LAYOUT.list_view()
    flat = [int(number) for column in (count, *columns) for number in column]
    head = fp.FlatHead(SPEC, HIDDEN, Encoder().entity_sizes, WIDTH)
    print(f"triton {triton.__version__}, list room {room}, {len(columns)} values a tuple")
    targets = {
        "sm_80": GPUTarget("cuda", 80, 32),
        "sm_90": GPUTarget("cuda", 90, 32),
        "gfx942": GPUTarget("hip", "gfx942", 64),
    }
    for name, target in targets.items():
        for width in (64, 128):
            sizes = [0, 0, 0, row_bytes, room, *flat]
            plan = cuda.plan(sizes, head.fused.ranges, width)
            options = {one: plan.pop(one) for one in ("num_warps", "enable_fp_fusion")}
            drawing = {"IDS": len(head.fused.limits), "MODE": cuda.DRAW, "DROP": False}
            for kernel, more in ((cuda._forward, drawing), (cuda._backward, {})):
                constants = plan | more
                signature = {
                    argument: "constexpr"
                    if argument in constants
                    else POINTERS.get(argument, "i32" if argument in NUMBERS else "*fp32")
                    for argument in kernel.arg_names
                }
                values = {
                    (kernel.arg_names.index(argument),): value
                    for argument, value in constants.items()
                }
                source = ASTSource(fn=kernel, signature=signature, constexprs=values)
                try:
                    found = triton.compile(source, target=target, options=options)
                except Exception as error:  # whatever a compiler raises
                    print(f"{name} {kernel.__name__} W={width}: FAILED: {error!r}"[:500])
                    continue
                what = f"{kernel.__name__[1:]}, W {width}, BLOCK {plan['BLOCK']}"
                warps = f"{options['num_warps']} warps"
                shared = f"{found.metadata.shared} B shared"
                print(f"{name}: {what}, {warps}: {usage(found.asm)}, {shared}")


def usage(assembled: dict[str, Any]) -> str:
    """Registers and spills, from what was compiled."""
    if "amdgcn" in assembled:
        names = ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count")
        lines = [line.strip().lstrip(".") for line in assembled["amdgcn"].splitlines()]
        found = [line for line in lines if line.startswith(tuple(f"{one}:" for one in names))]
        return ", ".join(" ".join(line.split()) for line in found)
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(assembled["cubin"])
        file.flush()
        told = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True)
    words = dict(word.split(":")[:2] for word in told.stdout.split() if word.count(":") == 1)
    return f"{words.get('REG', '?')} registers, {words.get('STACK', '?')} B spilled"


CHECKS = {
    "correctness": correctness,
    "a broken list": broken_lists,
    "waits for the device": waits,
    "launches": launches,
    "CUDA graph": graph,
    "bfloat16": bfloat16,
    "compile": compiled,
    "times over": floor,
    "PuffeRL": trainer,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Plain)
    parser.add_argument(
        "--compile-only", action="store_true", help="compile for sm_80, sm_90 and gfx942, and stop"
    )
    options = parser.parse_args()
    try:
        import triton
    except ImportError:
        print("gpu_check: Triton is not installed: pip install triton", file=sys.stderr)
        return 1
    if options.compile_only:
        compile_only()
        return 0
    if not torch.cuda.is_available():
        print(
            "gpu_check: torch finds no GPU here (torch.cuda.is_available() is False), so nothing "
            "was checked; --compile-only needs none",
            file=sys.stderr,
        )
        return 1
    card = torch.cuda.get_device_name()
    print(f"{card}, torch {torch.__version__}, triton {triton.__version__}")
    failed, begin = 0, time.perf_counter()
    for name, check in CHECKS.items():
        start = time.perf_counter()
        try:
            said = check()
        except Exception as error:  # the next check may say more
            failed += 1
            said = f"FAILED: {error}"
            traceback.print_exc()
        print(f"{name}: {said}  [{time.perf_counter() - start:.0f} s]", flush=True)
    took = time.perf_counter() - begin
    print(f"{len(CHECKS) - failed} of {len(CHECKS)} checks passed in {took:.0f} s")
    return int(failed > 0)


_Plain = argparse.RawDescriptionHelpFormatter

if __name__ == "__main__":
    sys.exit(main())
