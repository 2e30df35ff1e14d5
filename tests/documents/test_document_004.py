"""Document 004 (KV-cache distillation): its integration code, with both of its arms, on transformers' own models.

Teacher and student are Hugging Face models with grouped queries, unlike in layers, heads and widths. The document takes
the query heads for the cache's and expects tuples in `past_key_values`; here the models themselves are asked.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from headwise.dims import Dims
from headwise.distill import (
    HeadwiseMapProjector,
    KVDimensionProjector,
    MapProjectionAligner,
    StructuralKVLoss,
    TimeWarper,
    create_structural_loss,
    flatten_kv_heads,
    kv_loss,
    stack_past_kv,
    unflatten_kv_heads,
)
from headwise.distill.layer_map import layer_map
from headwise.position import Encoding
from headwise.registry import POSITION

LAMBDA_KV = 0.5
T = 12


def model_of(layers: int, heads: int, kv_heads: int, head_dim: int) -> Any:
    torch.manual_seed(layers)
    config = LlamaConfig(
        vocab_size=61, hidden_size=heads * head_dim, intermediate_size=32, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0 * layers},
    )  # fmt: skip
    return LlamaForCausalLM(config)


def batch() -> dict[str, Tensor]:
    ids = torch.randint(0, 61, (3, T), generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([T, 9, T])
    segments = torch.tensor([[0] * 4 + [1] * 6 + [2] * 2, [0] * 3 + [1] * 4 + [2] * 2 + [-1] * 3, [0] * T])
    mask = torch.arange(T)[None] < lengths[:, None]
    return {"input_ids": ids, "labels": ids.masked_fill(~mask, -100), "segment_ids": segments, "mask": mask}


def encoding(config: Any) -> Encoding:
    """The model's own turning of keys, to be taken out of the teacher's and worked in by the student's."""
    base = config.rope_parameters["rope_theta"]
    position = POSITION.build(POSITION.spec({"kind": "rope", "base": base}), Dims(d_model=8, n_heads=1))
    made: Encoding = position.encode(torch.arange(T), T, config.head_dim)
    return made


def aligner_of(kv_mode: str, teacher: Any, student: Any) -> torch.nn.Module:
    if kv_mode == "structured":
        return MapProjectionAligner(
            teacher_config=teacher.config,
            student_config=student.config,
            mode="structured",
            share_dim_proj=True,
            init_uniform=True,
        )
    return KVDimensionProjector(
        teacher_heads=teacher.config.num_key_value_heads,
        student_heads=student.config.num_key_value_heads,
        teacher_head_dim=teacher.config.head_dim,
        student_head_dim=student.config.head_dim,
        mlp_ratio=4,
        use_elastic=False,
    )


def step(mode: str, aligner: Any, teacher: Any, student: Any, structural: StructuralKVLoss | None) -> dict[str, Tensor]:
    """The losses of one step, as the document has them, and the aligned keys."""
    b = batch()
    with torch.no_grad():
        t_k_raw, t_v_raw = stack_past_kv(teacher(b["input_ids"], use_cache=True).past_key_values)
        t_k_raw = encoding(teacher.config).unrotate(t_k_raw)
    s_out = student(b["input_ids"], use_cache=True)
    s_k, s_v = stack_past_kv(s_out.past_key_values)
    loss_task = F.cross_entropy(s_out.logits.flatten(0, 1), b["labels"].flatten(), ignore_index=-100)
    if mode == "structured":
        t_k, t_v, _ = aligner(t_k_raw, t_v_raw, None, b["segment_ids"])
    else:
        rows = layer_map("ratio", t_k_raw.shape[1], s_k.shape[1])
        t_k, t_v = (
            unflatten_kv_heads(aligner(flatten_kv_heads(torch.einsum("sl,bl...->bs...", rows, x))), s_k.shape[2])
            for x in (t_k_raw, t_v_raw)
        )
    t_k = encoding(student.config).rotate(t_k)
    loss_fn = kv_loss("mse")
    losses = {"task": loss_task, "k": loss_fn(s_k, t_k, b["mask"]), "v": loss_fn(s_v, t_v, b["mask"])}
    losses["total"] = loss_task + LAMBDA_KV * (losses["k"] + losses["v"])
    if structural is not None:
        s_q = s_k.repeat_interleave(2, 2)  # of the right shape; a cache holds no queries
        struct, metrics = structural(s_k, s_v, s_q, t_k, t_v, t_k.repeat_interleave(2, 2), b["mask"])
        losses["total"] = losses["total"] + 0.1 * struct
        losses |= metrics
    return losses | {"t_k": t_k, "s_k": s_k}


@pytest.mark.parametrize("kv_mode", ["structured", "flat"])
def test_ten_steps_of_either_arm_run_and_the_losses_fall(kv_mode: str) -> None:
    teacher, student = model_of(4, 4, 2, 8), model_of(2, 2, 1, 8)
    torch.manual_seed(0)
    aligner = aligner_of(kv_mode, teacher, student)
    structural = create_structural_loss(alpha_k=1.0, alpha_v=1.0, alpha_attn=0.5, temperature=1.0)
    optimizer = torch.optim.AdamW([*student.parameters(), *aligner.parameters()], lr=5e-3)
    seen = []
    for _ in range(10):
        losses = step(kv_mode, aligner, teacher, student, structural)
        assert losses["t_k"].shape == losses["s_k"].shape == (3, 2, 1, T, 8)
        assert all(math.isfinite(float(losses[name].detach())) for name in ("task", "k", "v", "total", "kl_attn"))
        optimizer.zero_grad()
        losses["total"].backward()
        assert all(p.grad is None for p in teacher.parameters())
        for layer in student.model.layers:
            assert layer.self_attn.k_proj.weight.grad.abs().sum() > 0
            assert layer.self_attn.v_proj.weight.grad.abs().sum() > 0
        optimizer.step()
        seen.append({name: float(losses[name].detach()) for name in ("task", "k", "v", "total")})
    assert seen[-1]["total"] < seen[0]["total"]
    assert seen[-1]["k"] + seen[-1]["v"] < seen[0]["k"] + seen[0]["v"]


def test_the_loss_of_keys_alone_reaches_the_students_keys() -> None:
    """The document's own `stack_past_kv` is of a form that tuples had; through cache objects gradients still flow."""
    teacher, student = model_of(4, 4, 2, 8), model_of(2, 2, 1, 8)
    losses = step("structured", aligner_of("structured", teacher, student), teacher, student, None)
    losses["k"].backward()
    assert student.model.layers[1].self_attn.k_proj.weight.grad.abs().sum() > 0
    assert student.lm_head.weight.grad is None


def test_the_documents_names_are_there() -> None:
    projector = HeadwiseMapProjector(32, 16, 64, 64, share_dim_proj=True, init_uniform=True)
    assert projector(torch.zeros(1, 24, 32, 3, 64)).shape == (1, 24, 16, 3, 64)
    warped = TimeWarper(torch.tensor([[0, 0, 1, 1]]), torch.tensor([[0, 0, 0, 1]]))(torch.zeros(1, 1, 1, 4, 2))
    assert warped.shape == (1, 1, 1, 4, 2)
    assert isinstance(create_structural_loss(), StructuralKVLoss)
