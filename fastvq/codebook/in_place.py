"""Gradient steps of a codebook within the forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from fastvq import distributed


class InPlaceStep:
    """Optimizer step on the codebook's own loss, before the layer's output is computed.

        codes <- optimizer(codes, d loss / d codes),   loss = mean (sg[x] - e_index)^2

    The output then uses codes that have adapted to the batch.

    Args:
        build: a function from parameters to the optimizer.
        parameters: those of the codebook.

    Source: Huh et al., Straightening Out the Straight-Through Estimator, 2023, section 4.2 (alternated optimization).
    """

    def __init__(
        self, build: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer], parameters: Iterable[nn.Parameter]
    ) -> None:
        self.parameters = list(parameters)
        self.optimizer = build(self.parameters)

    def follow(self, parameters: Iterable[nn.Parameter]) -> None:
        """Optimize these parameters from now on, if loading with `assign=True` has replaced the previous ones.

        The optimizer's state is then dropped.
        """
        new = list(parameters)
        if all(one is other for one, other in zip(self.parameters, new, strict=True)):
            return
        place = dict(zip(map(id, self.parameters), new, strict=True))
        for group in self.optimizer.param_groups:
            group["params"] = [place.get(id(parameter), parameter) for parameter in group["params"]]
        self.optimizer.state.clear()
        self.parameters = new

    def backward(self, loss: Callable[[], Tensor]) -> Tensor:
        """Add the gradient of `loss()` to those of the parameters, and return the loss, detached."""
        # Own hooks, so that those of activation checkpointing don't record this graph as the layer's.
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            value = loss()
            for parameter, grad in zip(
                self.parameters, torch.autograd.grad(value, self.parameters, allow_unused=True), strict=True
            ):
                if grad is not None:
                    parameter.grad = grad if parameter.grad is None else parameter.grad + grad
        return value.detach()

    @torch.no_grad()
    def step(self, together: bool) -> None:
        """Step with the gradients, averaged over the ranks if they learn `together`, and clear them."""
        grads = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        if together and grads:
            distributed.sum_(*grads)
            for grad in grads:
                grad.div_(distributed.world_size())
        self.optimizer.step()
        self.optimizer.zero_grad()
