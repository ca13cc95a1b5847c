"""PyTorch's CUDA graphs: what is recorded, copied and replayed. Without a GPU, a graph is faked."""

import contextlib

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from conformance.bench.steps import batch_of  # noqa: E402
from impl_torch import backend, graph, train  # noqa: E402
from spec.config import load_config  # noqa: E402

CONFIG = load_config("tiny").replace(batch_size=3)
UNCONDITIONAL = load_config("tiny_uncond").replace(batch_size=3)


class FakeGraph:
    """Does what was recorded again on what lies in the batch now, into the same results."""

    def replay(self):
        loss, grads = self.again()
        self.results[0].copy_(loss)
        for name, value in grads.items():
            self.results[1][name].copy_(value)


class FakeStream:
    def wait_stream(self, other): ...


@pytest.fixture
def recorded(monkeypatch):
    """The graphs that are recorded, in order."""
    made, last, real = [], [], train.loss_and_grads

    def loss_and_grads(model, tables, config, *batch):
        results = real(model, tables, config, *batch)
        last[:] = [lambda: real(model, tables, config, *batch), results]
        return results

    @contextlib.contextmanager
    def capture(found):
        yield
        found.again, found.results = last
        made.append(found)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "current_stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(graph.train, "loss_and_grads", loss_and_grads)
    return made


def opened(config):
    """A model of this config, past the checks of its arguments."""
    return backend.open(config, device="cpu", dtype="float64", mode="eager").model


def batch(model, config, step):
    found = batch_of(config, step)
    return model._natives(*(found.get(n) for n in ("x0", "t", "noise", "labels", "drop")))


@pytest.mark.parametrize("config", [CONFIG, UNCONDITIONAL])
def test_every_batch_gives_what_it_gives_without_a_graph(config, recorded):
    model, graphs = opened(config), {}
    for step in range(3):
        given = batch(model, config, step)
        loss, grads = graph.loss_and_grads(graphs, model._model, model.tables, config, *given)
        expected, wanted = train.loss_and_grads(model._model, model.tables, config, *given)
        assert torch.equal(loss, expected)
        assert list(grads) == list(wanted)
        assert all(torch.equal(grads[name], wanted[name]) for name in wanted)
    assert len(recorded) == 1


def test_a_batch_of_another_kind_has_a_graph_of_its_own(recorded):
    model, graphs = opened(CONFIG), {}
    x0, t, noise, labels, drop = batch(model, CONFIG, 0)
    kinds = [
        (x0, t, noise, labels, drop),
        (x0[:2], t[:2], noise[:2], labels[:2], drop[:2]),
        (x0, t, noise, labels, None),
    ]
    for _ in range(2):
        for given in kinds:
            loss, _ = graph.loss_and_grads(graphs, model._model, model.tables, CONFIG, *given)
            assert torch.equal(
                loss, train.loss_and_grads(model._model, model.tables, CONFIG, *given)[0]
            )
    assert len(recorded) == len(kinds)


def test_what_is_given_is_left_as_it_is(recorded):
    model, graphs = opened(CONFIG), {}
    for step in range(2):
        given = batch(model, CONFIG, step)
        kept = [value.clone() for value in given]
        graph.loss_and_grads(graphs, model._model, model.tables, CONFIG, *given)
        assert all(torch.equal(one, other) for one, other in zip(given, kept, strict=True))


def test_steps_move_the_state_as_steps_without_a_graph(recorded):
    one, other, graphs = opened(CONFIG), opened(CONFIG), {}
    for step in range(3):
        given = batch(one, CONFIG, step)
        loss = graph.train_step(graphs, one._state, one.tables, CONFIG, *given)
        expected = train.train_step(other._state, other.tables, CONFIG, *given)
        assert torch.equal(loss, expected)
    mine, wanted = one.state(), other.state()
    assert mine["step"] == wanted["step"] == 3
    for part in ("params", "m", "v", "ema"):
        for name, value in wanted[part].items():
            assert np.array_equal(mine[part][name], value), (part, name)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_on_a_gpu_a_graph_gives_what_the_compiled_step_gives():
    steps = {}
    for mode in ("compiled", "graph"):
        model = backend.open(CONFIG, device="cuda", dtype="float32", mode=mode)
        batches = [batch_of(CONFIG, step) for step in range(3)]
        cast = [
            {n: v.astype(np.float32) if v.dtype.kind == "f" else v for n, v in b.items()}
            for b in batches
        ]
        steps[mode] = [model.train_step(**given) for given in cast]
    assert steps["graph"] == pytest.approx(steps["compiled"], rel=1e-5)
