"""Low-rank changes of weight matrices, for fine-tuning that moves a pretrained model little."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Block:
    """A part of a weight that is a matrix, or a batch of matrices.

    Attributes:
        start: Its first element in the flat weight.
        shape: (..., n_rows, n_columns).
    """

    start: int
    shape: tuple[int, ...]

    def of(self, weight: Tensor) -> Tensor:
        """Return the view of the block in a contiguous weight."""
        return weight.view(-1)[self.start : self.start + prod(self.shape)].view(self.shape)


class LowRankOptimizer(torch.optim.Optimizer):
    r"""Optimizes the weight matrices of a model within changes of a low rank.

    A matrix is :math:`W = W_0 + B A`, where :math:`A` of shape (rank, n_columns) is random at first, and :math:`B` of shape
    (n_rows, rank) is zero. Another optimizer moves the two by the gradients :math:`B^T G` and :math:`G A^T`, with the gradient
    :math:`G` of :math:`W`. The model itself stays as it is: it is simulated, compiled and saved as any other.

    Source: E. J. Hu et al., LoRA, ICLR 2022, arXiv:2106.09685. The blocks of an equivariant layer of e3nn, one for each pair of
    irreducible representations, are matrices of their own, so that the change is equivariant, as in MACE's own implementation.

    Args:
        weights: Weights and their blocks, as :func:`matrices` returns them.
        rank: Rank of the change of each block, at most that of the block itself.
        make: Maps the factors to the optimizer that moves them.
        seed: Seed of the factors.

    Raises:
        ValueError: If there are no weights.
    """

    def __init__(
        self,
        weights: Sequence[tuple[nn.Parameter, Sequence[Block]]],
        rank: int,
        make: Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer],
        seed: int = 0,
    ) -> None:
        self._weights = [(weight, block) for weight, blocks in weights for block in blocks]
        if not self._weights:
            raise ValueError("there are no weight matrices to train: check the names in trainable=.")
        generator = torch.Generator().manual_seed(seed)
        self._start = [block.of(weight.detach()).clone() for weight, block in self._weights]
        self._factors = [_factors(start, rank, generator) for start in self._start]
        self.inner = make([factor for pair in self._factors for factor in pair])
        hyperparameters = {name: value for name, value in self.inner.param_groups[0].items() if name != "params"}
        super().__init__([weight for weight, _ in weights], hyperparameters)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move the factors by the gradients of the weights, and the weights by their product.

        Args:
            closure: Evaluates the loss and its gradients.

        Returns:
            What the closure returned; None without one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for (weight, block), (a, b) in zip(self._weights, self._factors, strict=True):
            if weight.grad is None:
                a.grad = b.grad = None
            else:
                gradient = block.of(weight.grad.contiguous())
                a.grad, b.grad = b.mT @ gradient, gradient @ a.mT
        for group in self.inner.param_groups:
            group.update({name: value for name, value in self.param_groups[0].items() if name != "params"})
        self.inner.step()
        for (weight, block), start, (a, b) in zip(self._weights, self._start, self._factors, strict=True):
            block.of(weight).copy_(start + b @ a)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return the factors, the weights before, and the state of the optimizer that moves them."""
        return {
            **super().state_dict(),
            "inner": self.inner.state_dict(),
            "factors": [[factor.detach().clone() for factor in pair] for pair in self._factors],
            "start": [start.clone() for start in self._start],
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        own = dict(state_dict)
        self.inner.load_state_dict(own.pop("inner"))
        for mine, saved in zip(self._factors, own.pop("factors"), strict=True):
            for factor, value in zip(mine, saved, strict=True):
                factor.copy_(value)
        for start, value in zip(self._start, own.pop("start"), strict=True):
            start.copy_(value)
        super().load_state_dict(own)


def matrices(module: nn.Module) -> Iterator[tuple[str, nn.Parameter, list[Block]]]:
    """Yield names of the weights of a module that consist of matrices, the weights, and their blocks.

    These are weights of two dimensions or more, the last two of which are the matrix, and the flat weights of e3nn's layers.

    Args:
        module: The model.
    """
    for name, parameter in module.named_parameters():
        blocks = _e3nn_blocks(module.get_submodule(name.rpartition(".")[0]), parameter)
        if not blocks and parameter.ndim >= 2:
            blocks = [Block(0, tuple(parameter.shape))]
        if blocks:
            yield name, parameter, blocks


def _e3nn_blocks(layer: nn.Module, parameter: nn.Parameter) -> list[Block]:
    """Return the blocks of a flat weight, one for each path of the layer; none if it is no layer of e3nn."""
    paths: Iterable[Any] = getattr(layer, "instructions", ())
    if parameter.ndim != 1:
        return []
    blocks, start = [], 0
    for path in paths:
        shape = tuple(path.path_shape)
        if len(shape) >= 2 and getattr(path, "has_weight", True):
            blocks.append(Block(start, (prod(shape[:-1]), shape[-1])))
            start += prod(shape)
    return blocks if start == parameter.numel() else []


def _factors(start: Tensor, rank: int, generator: torch.Generator) -> tuple[nn.Parameter, nn.Parameter]:
    *batch, n_rows, n_columns = start.shape
    rank = min(rank, n_rows, n_columns)
    random = torch.randn(*batch, rank, n_columns, generator=generator, dtype=torch.float64) / n_columns**0.5
    return nn.Parameter(random.to(start)), nn.Parameter(start.new_zeros(*batch, n_rows, rank))
