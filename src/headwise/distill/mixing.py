"""Losses between one layer of a student and one of a teacher that read the same: no error comes in from below.

A student that is a teacher with other attention (after `swap`: as many layers, as wide) is brought near it layer by
layer, before it is trained as a whole:

* LoLCATs (arXiv:2410.10254), attention transfer: what each layer's attention makes of the teacher's states should be
  what the teacher's makes of them;
* MOHAWK (arXiv:2408.10189), stage 1, matrix mixing: the matrices M by which tokens are mixed, y_i = Σ_j M_ij v_j,
  should agree, ‖M_student − M_teacher‖² a row;
* MOHAWK, stage 2, hidden states: whole blocks should agree, ‖block_student(x) − block_teacher(x)‖² as a share of the
  latter's size. (Its stage 3 is `logit_kd`.)

The matrix of a recurrent kind is found by letting it read the unit vectors as values: each is linear in its values.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from headwise.attention import Context
from headwise.attention.base import Attention
from headwise.attention.recurrence import Recurrence
from headwise.cache import place
from headwise.distill.losses import hidden_loss, masked_mean
from headwise.errors import HeadwiseError
from headwise.model.base import LanguageModel
from headwise.model.block import Block
from headwise.spec import ModelSpec


def check_layerwise(student: ModelSpec, teacher: ModelSpec) -> None:
    """Refuse a student whose layers cannot read the teacher's states one for one.

    Raises:
        HeadwiseError: other widths or numbers of layers.
    """
    unlike = [
        f"{name}={getattr(student, name)} (teacher: {getattr(teacher, name)})"
        for name in ("d_model", "n_layers")
        if getattr(student, name) != getattr(teacher, name)
    ]
    if unlike:
        raise HeadwiseError(
            f"layer by layer, student and teacher must have one width and one number of layers, but the student has "
            f"{' and '.join(unlike)}; make it of the teacher with `headwise swap`, or match keys and values instead"
        )


def attention_transfer(
    student: LanguageModel,
    inputs_BLTC: Tensor,
    outputs: Tensor,
    mask_BT: Tensor | None = None,
    segments_BT: Tensor | None = None,
    layers: Sequence[int] | None = None,
) -> Tensor:
    """LoLCATs' loss, 0-d: the squared distance of the attention outputs before `wo` as a share of the teacher's.

    Args:
        student: its attention reads the teacher's states; no other part of it gets a gradient.
        inputs_BLTC: float, what each of the teacher's blocks reads (`Signals.inputs`).
        outputs: float [B,L,H,T,D], what the teacher's attention makes of it (`Signals.outputs`).
        mask_BT: bool, True where a token counts.
        segments_BT: int64, as the model takes them.
        layers: which to compare; None: all.

    Raises:
        HeadwiseError: heads that differ in number or width.
    """
    made, wanted = [], []
    for layer, block, context in _chosen(student, inputs_BLTC, segments_BT, layers):
        y_BHTD = _outputs(block, inputs_BLTC[:, layer], context)
        if y_BHTD.shape != outputs[:, layer].shape:
            raise HeadwiseError(
                f"layer {layer}: the student's heads make {list(y_BHTD.shape)} and the teacher's "
                f"{list(outputs[:, layer].shape)}; only like heads can be compared; match hidden states"
            )
        made.append(y_BHTD.transpose(1, 2).flatten(2))
        wanted.append(outputs[:, layer].transpose(1, 2).flatten(2))
    return hidden_loss(torch.stack(made, 1), torch.stack(wanted, 1), mask_BT)


def matrix_mixing(
    student: LanguageModel,
    teacher: LanguageModel,
    inputs_BLTC: Tensor,
    mask_BT: Tensor | None = None,
    segments_BT: Tensor | None = None,
    layers: Sequence[int] | None = None,
) -> Tensor:
    """MOHAWK's first loss, 0-d: Σ_j (M_student − M_teacher)²_ij, the mean over rows i, heads, layers and batch.

    Args:
        teacher: gets no gradient; the others as `attention_transfer` takes them.

    Raises:
        HeadwiseError: heads that differ in number.
    """
    losses = []
    own = _chosen(student, inputs_BLTC, segments_BT, layers)
    for (layer, block, context), (_, old, before) in zip(own, _chosen(teacher, inputs_BLTC, segments_BT, layers)):
        x_BTC = inputs_BLTC[:, layer]
        with torch.no_grad():
            wanted_BHTT = mixing_matrix(old, x_BTC, before)
        matrix_BHTT = mixing_matrix(block, x_BTC, context)
        if matrix_BHTT.shape != wanted_BHTT.shape:
            raise HeadwiseError(
                f"layer {layer}: the student mixes with {matrix_BHTT.shape[1]} heads and the teacher with "
                f"{wanted_BHTT.shape[1]}; give the student as many"
            )
        losses.append(masked_mean((matrix_BHTT - wanted_BHTT).square().sum(-1), mask_BT))
    return torch.stack(losses).mean()


def block_alignment(
    student: LanguageModel,
    inputs_BLTC: Tensor,
    hidden_BLTC: Tensor,
    mask_BT: Tensor | None = None,
    segments_BT: Tensor | None = None,
    layers: Sequence[int] | None = None,
) -> Tensor:
    """MOHAWK's second loss, 0-d: the squared distance of whole blocks' results as a share of the teacher's.

    Args:
        hidden_BLTC: float, what each of the teacher's blocks leaves (`Signals.hidden`); the others as
            `attention_transfer` takes them.
    """
    chosen = list(_chosen(student, inputs_BLTC, segments_BT, layers))
    made = [block(inputs_BLTC[:, layer], context) for layer, block, context in chosen]
    wanted = [hidden_BLTC[:, layer] for layer, _, _ in chosen]
    return hidden_loss(torch.stack(made, 1), torch.stack(wanted, 1), mask_BT)


def mixing_matrix(block: Block, x_BTC: Tensor, context: Context) -> Tensor:
    """The matrix [B,H,T,T] by which the block's attention mixes the values of the tokens it reads; gradients flow.

    Raises:
        HeadwiseError: a mechanism that does not show its weights.
    """
    attention, h_BTC = block.attention, _read(block, x_BTC)
    if isinstance(attention, Recurrence):
        return attention.matrix(h_BTC, context)
    weights_BHTT = attention(h_BTC, context=context, return_attention_weights=True)[1]
    if weights_BHTT is None:
        raise HeadwiseError(f"{attention.spec.kind} does not show its attention weights; match hidden states instead")
    return weights_BHTT


def _chosen(
    model: LanguageModel, inputs_BLTC: Tensor, segments_BT: Tensor | None, layers: Sequence[int] | None
) -> Iterator[tuple[int, Block, Context]]:
    stack = model.decoding_stack()
    contexts = stack.contexts(place(inputs_BLTC[:, 0, :, 0], segments_BT, None))
    for layer in range(len(contexts)) if layers is None else layers:
        yield layer, stack.blocks[layer], contexts[layer]  # type: ignore[misc]


def _read(block: Block, x_BTC: Tensor) -> Tensor:
    """What the block's attention reads of what the block reads."""
    return x_BTC if block.order in ("post", "reordered") else block.attention_norm(x_BTC)


def _outputs(block: Block, x_BTC: Tensor, context: Context) -> Tensor:
    """What the block's attention makes of it before `wo`, [B,H,T,D]."""
    attention, seen = block.attention, dict[str, Tensor]()
    assert isinstance(attention, Attention)
    before, attention.observer = attention.observer, seen.__setitem__
    try:
        attention(_read(block, x_BTC), context=context)
    finally:
        attention.observer = before
    return seen["outputs"]
