"""How far a student's cache, attention and words are from a teacher's (document 004); one size whatever the shapes.

Every loss is a mean over batch, layers, heads and tokens, so that one weight λ serves small models and large ones, and
short texts and long ones. Padding takes no part. Losses are formed in float32 at least.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headwise.errors import HeadwiseError, SettingsError, one_of

KVLoss = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _cosine(s: Tensor, t: Tensor) -> Tensor:
    return 1 - F.cosine_similarity(s, t, dim=-1)


# Each of [B,L,H,T,D] pairs, a number a token and head: [B,L,H,T].
_KINDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": lambda s, t: (s - t).square().mean(-1),
    "cosine": _cosine,
    "smooth_l1": lambda s, t: F.smooth_l1_loss(s, t, reduction="none").mean(-1),
}


def kv_loss(kind: str) -> KVLoss:
    """A loss of a student's keys or values against their targets: mse, cosine (1 − cos of each head's vector) or
    smooth_l1, called with (student, target, mask), float [B,L,H,T,D] twice and bool [B,T] or None; gives a 0-d tensor.

    Raises:
        SettingsError: an unknown kind.
    """
    if kind not in _KINDS:
        raise SettingsError(one_of(kind, _KINDS, "kv loss"))
    distance = _KINDS[kind]

    def loss(student: Tensor, target: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        check_alike(student, target)
        return masked_mean(distance(_wide(student), _wide(target)), mask_BT)

    return loss


def check_alike(student: Tensor, target: Tensor) -> None:
    """Refuse what would broadcast to something else than was meant.

    Raises:
        HeadwiseError: naming both shapes.
    """
    if student.shape != target.shape:
        raise HeadwiseError(
            f"the student's tensor is {list(student.shape)} and its target {list(target.shape)}; align the two first"
        )


def masked_mean(x: Tensor, mask_BT: Tensor | None) -> Tensor:
    """The mean of [B,…,T] over everything, of the tokens that the mask counts; 0 where it counts none."""
    if mask_BT is None:
        return x.mean()
    counted = mask_BT.bool().reshape(x.shape[0], *[1] * (x.dim() - 2), x.shape[-1]).expand_as(x)
    return torch.where(counted, x, 0).sum() / counted.sum().clamp(min=1)


class StructuralKVLoss(nn.Module):
    """α_k (1 − cos K) + α_v (1 − cos V) + α_attn·τ²·KL(teacher ‖ student) of the attention maps softmax(QKᵀ/(√D·τ)).

    The maps are causal and see no padding; query head h meets key head ⌊h·K/H⌋. Queries and keys are taken as they
    come: with their positions worked in the maps are those of attention. τ² keeps the size of the gradient where τ
    flattens the maps (Hinton et al. 2015, arXiv:1503.02531).

    Args:
        alpha_k, alpha_v, alpha_attn: the weights of the three terms; one of 0 leaves its term out.
        temperature: τ.

    Raises:
        SettingsError: a negative weight, or a temperature that is not positive.
    """

    def __init__(
        self, alpha_k: float = 1.0, alpha_v: float = 1.0, alpha_attn: float = 0.5, temperature: float = 1.0
    ) -> None:
        super().__init__()
        if min(alpha_k, alpha_v, alpha_attn) < 0 or temperature <= 0:
            raise SettingsError(
                f"alpha_k={alpha_k}, alpha_v={alpha_v}, alpha_attn={alpha_attn}, temperature={temperature} given; "
                "weights of at least 0 and a temperature above 0 are wanted"
            )
        self.alpha_k, self.alpha_v, self.alpha_attn, self.temperature = alpha_k, alpha_v, alpha_attn, temperature

    def forward(
        self,
        s_k: Tensor,
        s_v: Tensor,
        s_q: Tensor | None,
        t_k: Tensor,
        t_v: Tensor,
        t_q: Tensor | None,
        mask_BT: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, 0-d, and its terms without weights (`cos_k`, `cos_v`, `kl_attn`), 0-d without gradient.

        Args:
            s_k, s_v: the student's keys and values, float [B,L,K,T,·].
            s_q: its queries, [B,L,H,T,·]; None only where alpha_attn is 0.
            t_k, t_v, t_q: the teacher's, aligned.
            mask_BT: bool, True where a token counts.

        Raises:
            HeadwiseError: shapes that differ, or queries missing.
        """
        for student, target in ((s_k, t_k), (s_v, t_v)):
            check_alike(student, target)
        cosine = kv_loss("cosine")
        loss_k, loss_v = cosine(s_k, t_k, mask_BT), cosine(s_v, t_v, mask_BT)
        loss = self.alpha_k * loss_k + self.alpha_v * loss_v
        metrics = {"cos_k": 1 - loss_k, "cos_v": 1 - loss_v}
        if self.alpha_attn:
            if s_q is None or t_q is None:
                raise HeadwiseError("alpha_attn compares attention maps and needs queries of both; give them, or set 0")
            check_alike(s_q, t_q)
            kl = attention_kl(s_q, s_k, t_q, t_k, mask_BT, self.temperature)
            loss = loss + self.alpha_attn * self.temperature**2 * kl
            metrics["kl_attn"] = kl
        return loss, {name: value.detach() for name, value in metrics.items()}


def create_structural_loss(
    alpha_k: float = 1.0, alpha_v: float = 1.0, alpha_attn: float = 0.5, temperature: float = 1.0
) -> StructuralKVLoss:
    """`StructuralKVLoss` under document 004's name. Raises as it does."""
    return StructuralKVLoss(alpha_k, alpha_v, alpha_attn, temperature)


def attention_kl(
    s_q: Tensor, s_k: Tensor, t_q: Tensor, t_k: Tensor, mask_BT: Tensor | None = None, temperature: float = 1.0
) -> Tensor:
    """KL(teacher ‖ student) of the causal attention maps, 0-d: the mean over batch, layers, heads and rows.

    Args:
        s_q, t_q: queries [B,L,H,T,D]; s_k, t_k: keys [B,L,K,T,D], K dividing H.
        mask_BT: bool, True where a token counts, as a row and as a column.
    """
    T = s_q.shape[-2]
    hidden = torch.ones(T, T, dtype=torch.bool, device=s_q.device).triu(1)
    if mask_BT is not None:
        hidden = hidden | ~mask_BT.bool()[:, None, None, :]

    def log_map(q_BHTD: Tensor, k_BKTD: Tensor) -> Tensor:
        k_BHTD = k_BKTD.repeat_interleave(q_BHTD.shape[1] // k_BKTD.shape[1], 1)
        scores_BHTT = _wide(q_BHTD) @ _wide(k_BHTD).transpose(-1, -2) / (math.sqrt(q_BHTD.shape[-1]) * temperature)
        return scores_BHTT.masked_fill(hidden, torch.finfo(scores_BHTT.dtype).min).log_softmax(-1)

    total = s_q.new_zeros(())
    for layer in range(s_q.shape[1]):  # one layer's maps at a time
        s, t = log_map(s_q[:, layer], s_k[:, layer]), log_map(t_q[:, layer], t_k[:, layer])
        rows_BHT = (t.exp() * (t - s)).masked_fill(hidden, 0).sum(-1)
        total = total + masked_mean(rows_BHT, mask_BT)
    return total / s_q.shape[1]


def logit_kd(student_BTV: Tensor, teacher_BTV: Tensor, mask_BT: Tensor | None = None, tau: float = 1.0) -> Tensor:
    """τ²·KL(teacher ‖ student) of the next-token distributions softmax(logits/τ), the mean over tokens (Hinton et al.
    2015, arXiv:1503.02531).

    Args:
        student_BTV, teacher_BTV: logits float [B,T,V] over one vocabulary; the teacher's get no gradient.
        mask_BT: bool, True where a token counts.
        tau: the temperature τ.

    Raises:
        HeadwiseError: vocabularies or lengths that differ.
    """
    check_alike(student_BTV, teacher_BTV)
    s, t = ((_wide(x) / tau).log_softmax(-1) for x in (student_BTV, teacher_BTV.detach()))
    return tau**2 * masked_mean((t.exp() * (t - s)).sum(-1), mask_BT)


def hidden_loss(student_BLTC: Tensor, target_BLTC: Tensor, mask_BT: Tensor | None = None) -> Tensor:
    """The squared distance of hidden states as a share of the target's own size, ‖s − t‖²/‖t‖² over all tokens, the
    mean over layers: 0 where equal, 1 where the student's are all 0.

    Args:
        student_BLTC, target_BLTC: float [B,L,T,C]; the target gets no gradient.
        mask_BT: bool, True where a token counts.

    Raises:
        HeadwiseError: shapes that differ.
    """
    check_alike(student_BLTC, target_BLTC)
    s, t = _wide(student_BLTC), _wide(target_BLTC.detach())
    if mask_BT is not None:
        counted = mask_BT.bool()[:, None, :, None]
        s, t = torch.where(counted, s, 0), torch.where(counted, t, 0)
    over = (0, 2, 3)
    return ((s - t).square().sum(over) / t.square().sum(over).clamp(min=1e-12)).mean()
