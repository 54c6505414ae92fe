"""The graph by which autograd computed tensors."""

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor
from torch.autograd.graph import Node


class Graph(NamedTuple):
    """The graph by which tensors were computed."""

    nodes: set[Node]
    leaves: set[Tensor]

    @classmethod
    def of(cls, tensors: Iterable[Tensor]) -> "Graph":
        tensors = list(tensors)
        graph, left = cls(set(), {x for x in tensors if x.is_leaf}), [x.grad_fn for x in tensors]
        while left:
            node = left.pop()
            if hasattr(node, "variable"):  # the node that sums a leaf's gradient
                graph.leaves.add(node.variable)
            elif node is not None and node not in graph.nodes:
                graph.nodes.add(node)
                left += [before for before, _ in node.next_functions]
        return graph
