"""The LSTM: torch's own, but that it forgets where a game begins and may stand in a graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tcg_flatpolicy.memory import LSTM


def step_by_step(
    cell: nn.LSTMCell, hidden: Tensor, state: tuple[Tensor, Tensor], first: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The oracle: torch's cell, with a state of zeros wherever a game begins."""
    outputs = []
    for step in range(hidden.shape[1]):
        keep = (~first[:, step]).to(hidden.dtype).unsqueeze(1)
        state = cell(hidden[:, step], (state[0] * keep, state[1] * keep))
        outputs.append(state[0])
    return torch.stack(outputs, 1), state


def made(size: int) -> tuple[LSTM, nn.LSTMCell]:
    torch.manual_seed(size)
    lstm = LSTM(size).double()
    with torch.no_grad():
        for parameter in lstm.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    cell = nn.LSTMCell(size, size)
    for name, _ in list(cell.named_parameters()):
        setattr(cell, name, getattr(lstm, f"{name}_l0"))
    return lstm, cell


@pytest.mark.parametrize("forgets", ["never", "at random", "always"])
@pytest.mark.parametrize(("segments", "steps", "size"), [(1, 1, 1), (3, 7, 5), (4, 1, 3)])
def test_outputs_states_and_gradients_are_the_cell_s(
    segments: int, steps: int, size: int, forgets: str
) -> None:
    lstm, cell = made(size)
    hidden = torch.randn(segments, steps, size, dtype=torch.float64, requires_grad=True)
    carried = tuple(
        torch.randn(segments, size, dtype=torch.float64, requires_grad=True) for _ in range(2)
    )
    first = torch.zeros(segments, steps, dtype=torch.bool)
    if forgets != "never":
        first = torch.rand(segments, steps) < (1 if forgets == "always" else 0.4)
    upstream = torch.randn(segments, steps, size, dtype=torch.float64)

    def graded(output: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        loss = (output * upstream).sum() + (state[0] * 2 - state[1] ** 2).sum()
        wanted = [hidden, *carried, *lstm.parameters()]
        return torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)

    output, state = lstm(hidden, carried, None if forgets == "never" else first)
    expected, last = step_by_step(cell, hidden, carried, first)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(state, last)
    mine, theirs = graded(output, state), graded(expected, last)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_it_starts_from_zeros() -> None:
    lstm, cell = made(3)
    hidden = torch.randn(2, 4, 3, dtype=torch.float64)
    zeros = torch.zeros(2, 3, dtype=torch.float64)
    none = torch.zeros(2, 4, dtype=torch.bool)
    expected, _ = step_by_step(cell, hidden, (zeros, zeros), none)
    torch.testing.assert_close(lstm(hidden)[0], expected)
    torch.testing.assert_close(lstm(hidden, None, none)[0], expected)


def test_in_a_graph_it_is_one_operator_that_gives_the_same() -> None:
    lstm, _ = made(3)
    hidden = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    compiled = torch.compile(lstm, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(hidden)[0], lstm(hidden)[0])
    (mine,) = torch.autograd.grad(compiled(hidden)[0].square().sum(), hidden)
    (theirs,) = torch.autograd.grad(lstm(hidden)[0].square().sum(), hidden)
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("change", ["module", "parameter", "assign", "in place"])
def test_a_graph_reads_weights_that_were_replaced(change: str) -> None:
    holder = nn.Module()
    holder.lstm = made(3)[0].float()
    hidden = torch.randn(2, 4, 3)

    class Holds(nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            return holder.lstm(hidden)[0]  # type: ignore[no-any-return]

    compiled = torch.compile(Holds(), fullgraph=True, backend="aot_eager")
    before = compiled(hidden)
    other = LSTM(3)
    if change == "module":
        holder.lstm = LSTM.of(nn.LSTM(3, 3))
    elif change == "parameter":
        holder.lstm.weight_hh_l0 = nn.Parameter(torch.randn(12, 3))
    elif change == "assign":
        holder.lstm.load_state_dict(other.state_dict(), assign=True)
    else:
        with torch.no_grad():
            holder.lstm.weight_hh_l0.mul_(3)
    after = compiled(hidden)
    assert (after - before).abs().max() > 1e-4
    torch.testing.assert_close(after, holder.lstm(hidden)[0])


def test_an_nn_lstm_is_taken_with_its_parameters() -> None:
    theirs = nn.LSTM(3, 3)
    ours = LSTM.of(theirs)
    hidden = torch.randn(2, 4, 3)
    torch.testing.assert_close(ours(hidden)[0], theirs(hidden.transpose(0, 1))[0].transpose(0, 1))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(a is b for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize(
    "lstm",
    [
        nn.LSTM(3, 3, num_layers=2),
        nn.LSTM(3, 4),
        nn.LSTM(3, 3, bias=False),
        nn.LSTM(4, 4, proj_size=2),
    ],
)
def test_another_kind_of_nn_lstm_is_refused(lstm: nn.LSTM) -> None:
    with pytest.raises(ValueError, match=r"must be one layer .* nn\.LSTM\(\d, \d\)$"):
        LSTM.of(lstm)
