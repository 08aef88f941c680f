"""Which experts the next layer will probably want.

The residual stream changes little from one layer to the next: a layer's own input, put through the
next layer's router, predicts its choice (86.6 % of experts right on Mixtral on average, less in the
first layers; mixtral-offloading, arXiv:2312.17238, and MoE-Infinity, arXiv:2401.14361, build on the
same). Knows routers, not where experts are. `model` asks it, `cache` acts on it.

Shape legend: T tokens, H hidden size, E experts.
"""

from collections.abc import Sequence

import torch

_MOST_TOKENS = 64
"""Tokens of a batch that are looked at: more of them want every expert anyway."""


class LookAhead:
    """The routers of all layers, each fed with its predecessor's input.

    Args:
        gates_EH: Router weights of each layer.
        norms_H: Weights of the norm before each layer's router. The input of layer l carries those
            of layer l; they are exchanged for those of layer l + 1.
        top_k: Experts a token goes to.
    """

    def __init__(
        self, gates_EH: Sequence[torch.Tensor], norms_H: Sequence[torch.Tensor], top_k: int
    ) -> None:
        self._top_k = top_k
        self._routers = []
        for gate_EH, own_H, its_H in zip(gates_EH[1:], norms_H[:-1], norms_H[1:], strict=True):
            own = own_H.float()
            exchange = torch.where(own.abs() > 1e-6, its_H.float() / own, 0.0)
            self._routers.append(gate_EH.float() * exchange)

    def predict(self, layer: int, x_TH: torch.Tensor) -> list[int]:
        """The experts that layer + 1 will probably want, those that most tokens want first.

        Args:
            layer: The layer that is being computed.
            x_TH: Its experts' input, (T, H), after the norm.
        """
        if layer >= len(self._routers):
            return []
        logits_TE = x_TH[:_MOST_TOKENS].float() @ self._routers[layer].T
        chosen = logits_TE.topk(self._top_k, dim=-1).indices.flatten()
        counts = torch.bincount(chosen, minlength=logits_TE.shape[1])
        order = counts.argsort(descending=True, stable=True)
        return [expert for expert in order.tolist() if counts[expert]]
