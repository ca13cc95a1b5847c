"""One launch on a GPU: the loss and its gradients as a CUDA graph, recorded once and replayed.

A small step is a thousand kernels of a few microseconds, and launching them one by one from Python
takes longer than they do.
"""

import torch

from impl_torch import train


def record(model, tables, config, batch):
    """A graph of train.loss_and_grads, the memory of its batch, and that of its results."""
    batch = [a if a is None else a.clone() for a in batch]
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):  # what is chosen or compiled in the first calls is no part of the graph
            train.loss_and_grads(model, tables, config, *batch)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = train.loss_and_grads(model, tables, config, *batch)
    return graph, batch, results


def loss_and_grads(graphs, model, tables, config, x0, t, noise, labels=None, drop=None):
    """As train.loss_and_grads; `graphs` keeps one for each kind of batch that has come.

    The next call writes over what this one gives.
    """
    given = (x0, t, noise, labels, drop)
    kind = (x0.shape, labels is None, drop is None)
    if kind not in graphs:
        graphs[kind] = record(model, tables, config, given)
    graph, batch, results = graphs[kind]
    for own, value in zip(batch, given, strict=True):
        if own is not None:
            own.copy_(value)
    graph.replay()
    return results


def train_step(graphs, state, tables, config, x0, t, noise, labels=None, drop=None):
    """As train.train_step."""
    batch = (x0, t, noise, labels, drop)
    loss, grads = loss_and_grads(graphs, state.model, tables, config, *batch)
    train.apply_gradients(state, config, grads)
    return loss
