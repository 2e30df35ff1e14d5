"""Which teacher to listen to, row by row: a mixture of experts over whole models (Jacobs et al. 1991).

A row's shares are the softmax of a linear map of its prompt, the mean of the student's token embeddings over it. They
are learned from how well each teacher predicts the row's own text: the loss is the negative log-likelihood of the
tokens under the mixture −log Σ_n share_n·p_n(token). The distillation losses use the shares and do not train them: a
router that they trained would choose whatever teacher is easiest to imitate.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from headwise.distill.losses import masked_mean


class Router(nn.Module):
    """Shares [B,N] of N teachers; equal at the start."""

    def __init__(self, d_model: int, n_teachers: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d_model)
        self.shares = nn.Linear(d_model, n_teachers)
        nn.init.zeros_(self.shares.weight)
        nn.init.zeros_(self.shares.bias)

    def forward(self, embedded_BTC: Tensor, prompt_BT: Tensor) -> Tensor:
        """float [B,N], rows add up to 1. `prompt_BT`: bool, the tokens to judge by, at least one a row."""
        weight_BT1 = prompt_BT.unsqueeze(-1).to(embedded_BTC.dtype)
        mean_BC = (embedded_BTC.detach() * weight_BT1).sum(1) / weight_BT1.sum(1).clamp(min=1)
        return self.shares(self.norm(mean_BC)).softmax(-1)


def mixture_loss(shares_BN: Tensor, logits_NBTV: list[Tensor], targets_BT: Tensor, ignored: int = -100) -> Tensor:
    """Negative log-likelihood of the targets under the mixture, the mean over those that count, 0-d."""
    counted_BT = targets_BT != ignored
    index_BT1 = targets_BT.clamp(min=0).unsqueeze(-1)
    log_p_BTN = torch.cat([logits.detach().float().log_softmax(-1).gather(-1, index_BT1) for logits in logits_NBTV], -1)
    return -masked_mean((shares_BN.float().clamp(min=1e-9).log().unsqueeze(1) + log_p_BTN).logsumexp(-1), counted_BT)


def prompts(parts_BT: Tensor, prompt: int | None) -> Tensor:
    """bool [B,T]: the tokens of the part `prompt`, and in a row without one the first quarter of its tokens.

    `parts_BT`: int64, −1 at padding; `prompt`: the part's number, None where the data have no prompts.
    """
    lengths_B1 = (parts_BT >= 0).sum(1, keepdim=True)
    quarter_BT = torch.arange(parts_BT.shape[1], device=parts_BT.device) < (lengths_B1 + 3) // 4
    if prompt is None:
        return quarter_BT
    own_BT = parts_BT == prompt
    return torch.where(own_BT.any(1, keepdim=True), own_BT, quarter_BT)
