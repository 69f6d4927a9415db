"""Nothing reads memory that nobody wrote: poisoned from Python (conftest.py), and from inside PyTorch's own C++."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

import sparse_bwd as sb
from sparse_bwd.ops import bits
from tests.cases import AXES, CONV_CASES, LINEAR_CASES, SELECTIONS, Case, channel_count
from tests.drive import check_case
from tests.networks import batch, converted_net, drawn_selection


@pytest.fixture
def filled_memory() -> Iterator[None]:
    """PyTorch itself fills new memory with NaN or the largest integer, in C++ as well."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    yield
    torch.use_deterministic_algorithms(False)


def test_the_poison_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor that the package allocates and does not write is NaN, and only that."""
    source = "import torch\ndef allocate():\n    return torch.empty(3), torch.empty(3, dtype=torch.int64)\n"
    namespace: dict[str, object] = {}
    exec(compile(source, bits.__file__, "exec"), namespace)
    floats, integers = namespace["allocate"]()  # type: ignore[operator]
    assert bool(floats.isnan().all()) and bool((integers == torch.iinfo(torch.int64).max).all())
    assert not torch.empty_like(torch.zeros(3)).fill_(0).isnan().any()


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize(
    "case",
    [
        case
        for case in [*CONV_CASES, *LINEAR_CASES]
        if case.id
        in ("plain", "fp64", "channels_last", "groups", "depthwise", "reflect", "empty-batch", "tokens")
    ],
    ids=lambda case: f"{case.layer.__name__}-{case.id}",
)
def test_layers_on_filled_memory(case: Case, axis: str, selection: str, filled_memory: None) -> None:
    check_case(case, axis, SELECTIONS[selection](channel_count(case.stock(), axis)))


@pytest.mark.parametrize("batch_norm", ["frozen", "bias", "train"])
@pytest.mark.parametrize("seed", range(4))
def test_a_network_on_filled_memory(seed: int, batch_norm: str, filled_memory: None) -> None:
    model = converted_net(batch_norm=batch_norm)
    sb.apply(model, drawn_selection(seed))
    optimizer = torch.optim.AdamW(sb.trainable_parameters(model), lr=1e-2)
    for step in range(3):
        x, y = batch(step)
        F.cross_entropy(model(x), y).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in sb.trainable_parameters(model))
        optimizer.step()
        optimizer.zero_grad()
        sb.apply(model, drawn_selection(seed + step + 1), optimizer)
    assert all(value.isfinite().all() for value in model.state_dict().values())
