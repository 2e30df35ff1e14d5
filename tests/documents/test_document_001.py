"""Every usage example of document 001, the chapter from GPT-2 to Llama, against lines and modules of ours.

Where the document prints a number or a rule that is wrong, the right one is asserted and the docstring says so. Its
measured tables (perplexities, tokens a second, gigabytes on an A100) are claims about other machines and stand nowhere
here.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import headwise as hw
from headwise import kernels
from headwise.attention import Context
from headwise.cache import LayerCache
from headwise.dims import Dims
from headwise.errors import HeadwiseError
from headwise.kernels.attention import naive
from headwise.kernels.flash import online
from headwise.lab.timing import kept_bytes
from headwise.position.alibi import slopes
from headwise.position.rope import RoPEEncoding
from headwise.registry import ATTENTION
from headwise.spec import parse

# The chapter's configuration: GPTConfig(n_layer=6, n_head=6, n_embd=384, block_size=256), Shakespeare's characters.
NANO = "d_model=384, n_layers=6, n_heads=6, vocab_size=65, max_seq_len=256"
SMALL = "d_model=48, n_layers=2, n_heads=6, vocab_size=65, max_seq_len=32"

# From GPT-2 to Llama, one part a step: what is added, and the fields of the line from then on.
STEPS = [
    ("post-norm, as in 2017", {"order": "post"}),
    ("norm before each part", {"order": "pre"}),
    ("RMSNorm", {"norm": "rmsnorm"}),
    ("RoPE", {"position": "rope"}),
    ("grouped queries", {"attention": "gqa(kv_heads=2)"}),
    ("SwiGLU", {"ffn": "swiglu"}),
    ("no biases", {"bias": "false"}),
]


def line_at(step: int, widths: str) -> str:
    """The line after so many steps."""
    fields: dict[str, str] = {}
    for _, changes in STEPS[: step + 1]:
        fields |= changes
    return f"gpt2({widths}, init=normal, {', '.join(f'{name}={value}' for name, value in fields.items())})"


LINES = [line_at(step, NANO) for step in range(len(STEPS))]


def params(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def ids(length: int, vocab_size: int = 65) -> Tensor:
    return torch.randint(vocab_size, (2, length), generator=torch.Generator().manual_seed(1))


def rope(length: int, head_dim: int, **fields: Any) -> RoPEEncoding:
    position = hw.get_position("rope", d_model=head_dim, n_heads=1, **fields)
    return position.encode(torch.arange(length), length, head_dim)


# ---- part 7: GPT-2 becomes Llama, step by step ----


def test_each_step_is_a_line_that_differs_by_one_part() -> None:
    for before, after in pairwise(LINES):
        a, b = (parse(line).model_dump() for line in (before, after))
        assert len({name for name in a if a[name] != b[name]}) == 1


def test_each_step_changes_the_parameters_by_what_its_part_holds() -> None:
    """The chapter's table says Llama's style has 6 % more (10.2 M → 10.8 M). It has fewer: a gated feed-forward of
    width 8C/3 holds as many weights as one of 4C, and positions, LayerNorm's shifts and all biases go."""
    C, L, T = 384, 6, 256
    norms = 2 * L + 1
    expected = [
        +2 * C,  # the final norm, which only pre-norm needs
        -norms * C,  # no shift
        -T * C,  # no table of positions
        -L * 2 * (C - 2 * 64) * (C + 1),  # keys and values of 2 heads in place of 6, weights and biases
        +L * (2 * 1024 + C - 4 * C - C),  # three maps' biases in place of two's; the weights are as many
        -L * (C + 2 * 2 * 64 + C + 2 * 1024 + C),  # biases of q, k and v, of the output, of the feed-forward
    ]
    counts = [hw.count(line).params for line in LINES]
    assert [b - a for a, b in pairwise(counts)] == expected
    assert [params(hw.build(line)) for line in (LINES[0], LINES[-1])] == [counts[0], counts[-1]]
    assert counts[1] == 10_770_816
    assert counts[-1] == 9_467_136


def test_the_last_step_is_llama() -> None:
    llama = f"llama({SMALL}, attention=gqa(kv_heads=2), tie_embeddings=true)"
    last = line_at(len(STEPS) - 1, SMALL)
    a, b = (parse(line).resolve().model_dump(exclude={"preset"}) for line in (last, llama))
    assert a == b
    torch.testing.assert_close(hw.build(last, seed=3)(ids(20)), hw.build(llama, seed=3)(ids(20)), rtol=0, atol=0)


@pytest.mark.parametrize("step", range(len(STEPS)), ids=[name for name, _ in STEPS])
def test_each_step_learns_and_is_causal(step: int) -> None:
    """At the start a model knows nothing: log 65 nats. A few updates on one batch bring every line far below."""
    model = hw.build(line_at(step, SMALL), seed=1)
    tokens = ids(25)
    logits = model(tokens[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(65), abs=0.35)
    changed = tokens[:, :-1].clone()
    changed[:, 12] = (changed[:, 12] + 1) % 65
    after = model(changed)
    torch.testing.assert_close(after[:, :12], logits[:, :12], rtol=0, atol=1e-6)
    assert not torch.allclose(after[:, 12:], logits[:, 12:])
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(30):
        optimiser.zero_grad()
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimiser.step()
    assert loss.item() < 2.5


def test_the_chapters_comparison_of_both_models() -> None:
    """Step 7: parameters with GPT-2's vocabulary, and twice the length trained. The chapter's own Llama refuses 512
    tokens as its GPT-2 does, since its cosine table ends at block_size; a rotation needs no table."""
    widths = "d_model=384, n_layers=6, n_heads=6, vocab_size=50257, max_seq_len=256"
    gpt2, llama = f"gpt2({widths})", f"llama({widths}, tie_embeddings=true)"
    a, b = hw.count(gpt2).params, hw.count(llama).params
    assert (a, b) == (30_044_544, 29_920_512)
    assert 100 * (b - a) / a == pytest.approx(-0.413, abs=1e-3)
    long = ids(64)
    with pytest.raises(HeadwiseError, match="max_seq_len"):
        hw.build(f"gpt2({SMALL})")(long)
    for position in ("rope", "alibi", "none", "sinusoidal"):
        assert hw.build(f"llama({SMALL}, position={position})")(long).isfinite().all()


def test_published_models_are_presets_of_these_parts() -> None:
    """The chapter's table of models. It files GPT-2 under post-norm, and names it pre-norm elsewhere: it is pre-norm
    (GPT-1 was post-norm). Llama 2 groups queries at 70b alone; Mistral's 7b has 8 key/value heads, not 4."""
    orders = {name: parse(name).order for name in ("gpt1", "gpt2", "llama", "bloom", "falcon", "mistral")}
    assert orders == {
        "gpt1": "post", "gpt2": "pre", "llama": "pre", "bloom": "pre", "falcon": "parallel", "mistral": "pre",
    }  # fmt: skip
    positions = {name: parse(name).position.kind for name in orders if name != "gpt1"}
    assert positions == {"gpt2": "learned", "llama": "rope", "bloom": "alibi", "falcon": "rope", "mistral": "rope"}
    norms = {name: parse(name).norm.kind for name in ("llama", "bloom", "falcon", "mistral")}
    assert norms == {"llama": "rmsnorm", "bloom": "layernorm", "falcon": "layernorm", "mistral": "rmsnorm"}
    sizes = {"7b": 32, "70b": 8}
    for size, kv_heads in sizes.items():
        spec = parse(f'llama(size="{size}")').resolve()
        assert spec.attention.heads(spec.dims)[1] == kv_heads  # type: ignore[attr-defined]
    mistral = parse('mistral(size="7b")').resolve()
    assert mistral.attention.heads(mistral.dims) == (32, 8, 128)  # type: ignore[attr-defined]
    assert mistral.attention.window == 4096  # type: ignore[attr-defined]


# ---- part 1: the four bottlenecks ----


def test_the_score_matrix_is_quadratic_and_the_fused_form_is_not() -> None:
    """2048² scores of 32 heads are 134,217,728 numbers, 537 MB in float32, as the document says, and the readable form
    keeps them; the fused form keeps what is linear in the length."""
    assert 2048**2 * 32 == 134_217_728
    assert pytest.approx(537, abs=0.5) == 2048**2 * 32 * 4 / 1e6
    layer = hw.get_attention("softmax", d_model=64, n_heads=4)
    kept: dict[str, list[int]] = {"fused": [], "readable": []}
    for length in (128, 256, 512):
        x = torch.randn(1, length, 64, requires_grad=True)

        def forward(x: Tensor = x) -> Tensor:
            return layer(x, context=Context(causal=True))[0]

        kept["fused"].append(kept_bytes(forward, layer))
        with kernels.naive():
            kept["readable"].append(kept_bytes(forward, layer))
    one, two = (b - a for a, b in pairwise(kept["fused"]))
    assert two == 2 * one
    assert kept["readable"][2] > 3 * kept["readable"][1]
    assert kept["readable"][2] > 4 * 512**2 * 4  # one matrix of weights a head, at least


def test_a_norm_count() -> None:
    """Twelve layers have two norms each and one at the end: 25, where the document counts 26; Llama's 32 have 65, not
    34."""
    for line, norms in (('gpt2(size="124m")', 25), ('llama(size="7b")', 65)):
        spec = parse(line).resolve()
        numbers = hw.count(line).params_by_part["norm"]
        each = spec.dims.d_model * (2 if spec.norm.kind == "layernorm" else 1)  # type: ignore[union-attr]
        assert numbers == norms * each


# ---- part 2: positions ----


def test_a_table_of_positions_ends() -> None:
    """`nn.Embedding(1024, 768)[1024]` is the document's IndexError; here the error says what to do."""
    position = hw.get_position("learned", d_model=768, n_heads=12, max_seq_len=1024)
    assert params(position) == 1024 * 768
    assert 1024 * 512 == 524_288  # its "+0.5 M" for d_model 512
    position.check_length(1024)
    with pytest.raises(HeadwiseError, match="1024"):
        position.check_length(1025)


def test_rope_frequencies() -> None:
    """θ_i = 10000^(−2i/64): θ_1 = 0.750, θ_2 = 0.562 and θ_31 = 1.33e-4; the document prints 0.891 and 0.794, which
    are those of d = 160, and 0.001."""
    angles = rope(2, 64).angles
    theta = angles[1] - angles[0]
    assert theta.shape == (32,)
    assert theta[0].item() == 1.0
    assert theta[1].item() == pytest.approx(0.74989, abs=1e-5)
    assert theta[2].item() == pytest.approx(0.56234, abs=1e-5)
    assert theta[31].item() == pytest.approx(1.33352e-4, rel=1e-5)


def test_rope_is_the_documents_rotation() -> None:
    """q·cos + rotate_half(q)·sin, with the halves paired."""
    B, H, T, D = 2, 3, 11, 8
    q = torch.randn(B, H, T, D, dtype=torch.float64)
    inv_freq = 1.0 / (10000 ** (torch.arange(0, D, 2, dtype=torch.float64) / D))
    freqs = torch.outer(torch.arange(T, dtype=torch.float64), inv_freq)
    cos, sin = torch.cat([freqs, freqs], -1).cos(), torch.cat([freqs, freqs], -1).sin()
    first, second = q.chunk(2, dim=-1)
    expected = q * cos + torch.cat([-second, first], -1) * sin
    torch.testing.assert_close(rope(T, D).rotate(q), expected)


def test_rope_scores_depend_on_the_distance_alone() -> None:
    """Positions 5 and 8 are as far apart as 2000 and 2003, also where no one has been trained."""
    q, k = torch.randn(2, 64, dtype=torch.float64)
    turned = rope(2100, 64)
    at_q, at_k = (turned.rotate(x.expand(1, 1, 2100, 64))[0, 0] for x in (q, k))
    assert (at_q[5] @ at_k[8]).item() == pytest.approx((at_q[2000] @ at_k[2003]).item(), abs=1e-9)
    assert (at_q[5] @ at_k[8]).item() != pytest.approx((at_q[5] @ at_k[9]).item(), abs=1e-3)
    clock = rope(4, 2)  # a two-dimensional head: angle mθ with θ = 1
    hand = clock.rotate(torch.tensor([[[[1.0, 0.0]] * 4]], dtype=torch.float64))[0, 0]
    angles = torch.arange(4, dtype=torch.float64)
    torch.testing.assert_close(hand, torch.stack([angles.cos(), angles.sin()], -1))


def test_alibi_slopes() -> None:
    """2^(−8/n), 2^(−16/n), … for n a power of two. For 12 heads the document takes the first four slopes of 16; the
    paper and BLOOM take every other one."""
    assert slopes(8) == [2.0 ** -(h + 1) for h in range(8)]
    assert slopes(12)[:8] == slopes(8)
    assert slopes(12)[8:] == [2.0**-e for e in (0.5, 1.5, 2.5, 3.5)]
    documents = [2.0**-e for e in (0.5, 1.0, 1.5, 2.0)]
    assert slopes(12)[8:] != documents


def test_alibi_is_a_penalty_on_the_distance() -> None:
    """bias_ij = −m·|i − j|. The document's picture for m = 0.5 has positive numbers under the diagonal, which would
    reward distance; its code has the right sign."""
    encoding = hw.get_position("alibi", d_model=8, n_heads=1).encode(torch.arange(5), 5, 8)
    encoding.slopes_H = torch.tensor([0.5])
    bias_HTS = encoding.bias(torch.zeros(1, 1, 5, 8), 0, 5)
    expected = -0.5 * (torch.arange(5)[:, None] - torch.arange(5)[None, :]).abs()
    torch.testing.assert_close(bias_HTS[0], expected)


@pytest.mark.parametrize("n_heads", [4, 6])
def test_alibi_attention_is_the_documents(n_heads: int) -> None:
    """Scores plus bias, the causal mask, softmax; ours runs on the fused kernel and holds no T×T tensor."""
    T, D = 19, 8
    layer = hw.get_attention("softmax", d_model=n_heads * D, n_heads=n_heads).double()
    x = torch.randn(2, T, n_heads * D, dtype=torch.float64)
    encoding = hw.get_position("alibi", d_model=n_heads * D, n_heads=n_heads).encode(torch.arange(T), T, D)
    ours, _ = layer(x, context=Context(causal=True, encoding=encoding))

    q, k, v = (w(x).view(2, T, n_heads, D).transpose(1, 2) for w in (layer.wq, layer.wk, layer.wv))
    att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(D))
    distance = (torch.arange(T)[None, :] - torch.arange(T)[:, None]).abs()
    att = att - torch.tensor(slopes(n_heads), dtype=torch.float64)[:, None, None] * distance
    att = att.masked_fill(torch.ones(T, T).tril() == 0, -math.inf).softmax(-1)
    torch.testing.assert_close(ours, layer.wo((att @ v).transpose(1, 2).flatten(2)), rtol=1e-6, atol=1e-7)


# ---- part 3: attention ----


def test_parameters_of_mha_gqa_and_mqa() -> None:
    """At 768 and 12 heads the maps of queries, keys and values hold 1.77 M, 0.98 M and 0.69 M: −44 % and −61 %. The
    document prints 1.18 M (−33 %) and 0.88 M (−50 %) for the last two."""
    counts = {}
    for call, kv_heads in (("mha", None), ("gqa", 4), ("mqa", None)):
        fields = {} if kv_heads is None else {"kv_heads": kv_heads}
        layer = hw.get_attention(call, d_model=768, n_heads=12, **fields)
        counts[call] = sum(params(w) for w in (layer.wq, layer.wk, layer.wv))
        x = torch.randn(1, 5, 768)
        assert layer(x)[0].shape == x.shape
    assert counts == {"mha": 1_769_472, "gqa": 983_040, "mqa": 688_128}
    assert [round(n / 1e6, 2) for n in counts.values()] == [1.77, 0.98, 0.69]
    assert [round(100 * (n / counts["mha"] - 1)) for n in counts.values()] == [0, -44, -61]


def test_cache_sizes_of_mha_gqa_and_mqa() -> None:
    """2048 tokens, 8 sequences, 12 heads of 64 in float32: 101 MB a layer and 1.2 GB in all; a third and a twelfth."""
    numbers = {
        call: ATTENTION.spec(fields).kv_numbers_per_token(Dims(768, 12))  # type: ignore[attr-defined]
        for call, fields in (("mha", "mha"), ("gqa", {"kind": "gqa", "kv_heads": 4}), ("mqa", "mqa"))
    }
    assert numbers == {"mha": 2 * 768, "gqa": 2 * 256, "mqa": 2 * 64}
    layer_bytes = numbers["mha"] * 2048 * 8 * 4
    assert layer_bytes / 1e6 == pytest.approx(100, rel=0.01)
    assert 12 * layer_bytes / 1e9 == pytest.approx(1.2, rel=0.01)
    assert 1 - numbers["gqa"] / numbers["mha"] == pytest.approx(0.67, abs=0.01)
    assert 1 - numbers["mqa"] / numbers["mha"] == pytest.approx(0.92, abs=0.01)
    cache, layer = LayerCache(), hw.get_attention("gqa", d_model=768, n_heads=12, kv_heads=4)
    with torch.no_grad():
        layer(torch.randn(1, 16, 768), context=Context(causal=True, cache=cache))
    assert cache.n_bytes == 16 * numbers["gqa"] * 4


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_grouped_queries_are_the_documents_with_its_missing_mask(kv_heads: int) -> None:
    """repeat_interleave: query heads 0, 1, 2 read key/value head 0. The document's class has no causal mask, so as a
    language model it would see the tokens that it predicts."""
    B, T, H, D = 2, 9, 6, 8
    layer = hw.get_attention("gqa", d_model=H * D, n_heads=H, kv_heads=kv_heads)
    x = torch.randn(B, T, H * D)
    q = layer.wq(x).view(B, T, H, -1).transpose(1, 2)
    k, v = (w(x).view(B, T, kv_heads, -1).transpose(1, 2) for w in (layer.wk, layer.wv))
    k, v = (t.repeat_interleave(H // kv_heads, dim=1) for t in (k, v))
    att = (q @ k.transpose(-2, -1)) / math.sqrt(D)
    for causal in (False, True):
        if causal:
            att = att.masked_fill(torch.ones(T, T).tril() == 0, -math.inf)
        y = (att.softmax(-1) @ v).transpose(1, 2).reshape(B, T, H * D)
        ours, weights = layer(x, context=Context(causal=causal), return_attention_weights=True)
        torch.testing.assert_close(ours, layer.wo(y))
        torch.testing.assert_close(weights, att.softmax(-1))


def documents_flash(q: Tensor, k: Tensor, v: Tensor, block: int) -> Tensor:
    """The document's class: the blocks' softmaxes are added up, and each block's mask begins at its own corner."""
    T, D = q.shape[-2:]
    out = torch.zeros_like(q)
    for i in range(0, T, block):
        for j in range(0, T, block):
            s = q[..., i : i + block, :] @ k[..., j : j + block, :].transpose(-2, -1) / math.sqrt(D)
            if i < j + block:
                s = s.masked_fill(torch.ones(s.shape[-2:]).tril() == 0, -math.inf)
            out[..., i : i + block, :] += s.softmax(-1) @ v[..., j : j + block, :]
    return out


def corrected_flash(q: Tensor, k: Tensor, v: Tensor, block: int) -> Tensor:
    """The same loop with a running maximum and sum; a block that no query of the tile may see is left out."""
    T, D = q.shape[-2:]
    out = torch.empty_like(q)
    for i in range(0, T, block):
        rows = torch.arange(i, min(i + block, T))
        m, l = torch.full((*q.shape[:-2], len(rows), 1), -math.inf), torch.zeros(*q.shape[:-2], len(rows), 1)
        y = torch.zeros_like(q[..., rows, :])
        for j in range(0, i + block, block):
            columns = torch.arange(j, min(j + block, T))
            s = q[..., rows, :] @ k[..., columns, :].transpose(-2, -1) / math.sqrt(D)
            s = s.masked_fill(columns[None, :] > rows[:, None], -math.inf)
            new = torch.maximum(m, s.amax(-1, keepdim=True))
            old, p = (m - new).exp(), (s - new).exp()
            m, l, y = new, l * old + p.sum(-1, keepdim=True), y * old + p @ v[..., columns, :]
        out[..., rows, :] = y / l
    return out


def test_the_documents_flash_loop_corrected() -> None:
    """One block is attention. With more, the document's rows weigh as much as there are blocks, and those after the
    diagonal let the future in; the corrected loop equals softmax, as our tiled form does."""
    q, k, v = torch.randn(3, 1, 2, 50, 8).unbind()
    true = naive.attention(q, k, v, scale=8**-0.5)[0]
    torch.testing.assert_close(documents_flash(q, k, v, 64), true)
    wrong = documents_flash(q, k, v, 16)
    assert (wrong - true).abs().max() > 1
    ones = torch.ones_like(v)
    torch.testing.assert_close(
        documents_flash(q, k, ones, 16)[0, 0, -1, 0].item(), 4.0
    )  # four blocks, four times too much
    later = v.clone()
    later[..., 40:, :] += 1
    assert (documents_flash(q, k, later, 16) - wrong)[..., :10, :].abs().max() > 0.1  # the future is seen
    for block in (16, 7, 50):
        torch.testing.assert_close(corrected_flash(q, k, v, block), true)
        torch.testing.assert_close(online.attention(q, k, v, scale=8**-0.5, rows=block, columns=block)[0], true)
    fused = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(fused, true)


# ---- part 4: norms ----


def test_where_the_norm_stands() -> None:
    """post: x = norm(x + f(x)); pre: x = x + f(norm(x)), and a final norm."""
    x = torch.randn(2, 7, 48)
    context = Context(causal=True)
    for order in ("post", "pre"):
        stack = hw.build(f"gpt2({SMALL}, order={order})", seed=2).stack
        block = stack.blocks[0]
        attend, feed, norm_1, norm_2 = block.attention, block.ffn, block.attention_norm, block.ffn_norm
        if order == "post":
            h = norm_1(x + attend(x, context=context)[0])
            expected = norm_2(h + feed(h))
        else:
            h = x + attend(norm_1(x), context=context)[0]
            expected = h + feed(norm_2(h))
        torch.testing.assert_close(block(x, context), expected)
        assert isinstance(stack.final_norm, nn.Identity) == (order == "post")


def test_pre_norm_has_a_path_that_no_norm_rescales() -> None:
    """With all that is added to the stream at nothing, a pre-norm block is the identity, its gradient too; a post-norm
    block still normalises, and its gradient with it."""
    x = 3 * torch.randn(1, 4, 48, requires_grad=True)
    for order, passes in (("pre", True), ("post", False)):
        block = hw.build(f"gpt2({SMALL}, order={order})").stack.blocks[0]
        for writes in (block.attention.wo, block.ffn.w_out):
            nn.init.zeros_(writes.weight)
        y = block(x, Context(causal=True))
        (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
        assert torch.equal(y, x) == passes
        assert torch.equal(gradient, torch.ones_like(x)) == passes


def test_rmsnorm_and_layernorm_of_the_documents_numbers() -> None:
    """x = [1, 3, 5, 7]: rms √21 = 4.58, so [0.22, 0.65, 1.09, 1.53] (the document rounds the second to 0.66); mean 4
    and variance 5, so ±1.34 and ±0.45. The variance divides by n; `x.var()` as the document's code has it divides by
    n − 1 and gives 6.67."""
    x = torch.tensor([1.0, 3.0, 5.0, 7.0])
    rms_norm, layer_norm = (hw.get_norm(kind, d_model=4) for kind in ("rmsnorm", "layernorm"))
    torch.testing.assert_close(rms_norm(x), torch.tensor([0.2182, 0.6547, 1.0911, 1.5275]), rtol=0, atol=1e-4)
    torch.testing.assert_close(layer_norm(x), torch.tensor([-1.3416, -0.4472, 0.4472, 1.3416]), rtol=0, atol=1e-4)
    assert x.var().item() == pytest.approx(20 / 3)
    assert x.var(correction=0).item() == 5
    assert [params(hw.get_norm(kind, d_model=4096)) for kind in ("layernorm", "rmsnorm")] == [8192, 4096]


def test_rmsnorm_is_the_documents_formula() -> None:
    x = torch.randn(2, 5, 48, dtype=torch.float64)
    norm = hw.get_norm("rmsnorm", d_model=48, eps=1e-6).double()
    nn.init.normal_(norm.weight)
    expected = x / torch.sqrt(torch.mean(x**2, dim=-1, keepdim=True) + 1e-6) * norm.weight
    torch.testing.assert_close(norm(x), expected)


# ---- part 5: feed-forwards ----


def test_activations() -> None:
    """GELU is x·Φ(x); the formula with tanh is near it; Swish is x·sigmoid(x)."""
    x = torch.linspace(-6, 6, 2001, dtype=torch.float64)
    exact = x * torch.distributions.Normal(0.0, 1.0).cdf(x)
    tanh = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    torch.testing.assert_close(F.gelu(x), exact)
    torch.testing.assert_close(F.gelu(x, approximate="tanh"), tanh)
    assert (exact - tanh).abs().max() < 5e-4
    torch.testing.assert_close(F.silu(x), x * torch.sigmoid(x))
    for activation, f in (("gelu", F.gelu), ("silu", F.silu), ("relu", F.relu)):
        mlp = hw.get_ffn("mlp", d_model=8, activation=activation)
        h = torch.randn(3, 8)
        torch.testing.assert_close(mlp(h), mlp.w_out(f(mlp.w_in(h))))


@pytest.mark.parametrize(
    ("kind", "gate"),
    [("glu", torch.sigmoid), ("reglu", F.relu), ("geglu", F.gelu), ("swiglu", F.silu), ("bilinear", lambda x: x)],
)
def test_gated_variants(kind: str, gate: Any) -> None:
    """(W1 x) ⊙ g(W2 x), then out: one variant a gate."""
    ffn, x = hw.get_ffn(kind, d_model=16), torch.randn(2, 3, 16)
    torch.testing.assert_close(ffn(x), ffn.w_out(gate(ffn.w_gate(x)) * ffn.w_up(x)))


def test_a_gated_feed_forward_has_as_many_parameters_at_two_thirds() -> None:
    """2·d·4d = 3·d·h where h = 8d/3, rounded up to a multiple of 8: 2048 at 768, 4.7 M either way."""
    mlp, swiglu = (hw.get_ffn(kind, d_model=768) for kind in ("mlp", "swiglu"))
    assert swiglu.w_gate.out_features == 2048
    assert params(mlp) == params(swiglu) == 8 * 768**2 == 4_718_592
    for d_model, width in ((384, 1024), (512, 1368), (100, 272), (4096, 10928)):
        hidden = int(2 * d_model * 4 / 3)
        assert int(8 * ((hidden + 7) // 8)) == width
        assert hw.get_ffn("swiglu", d_model=d_model).w_gate.out_features == width


# ---- parts 9 and 10, and the questions at the end ----


@pytest.mark.parametrize(
    "line",
    [
        "llama(W, attention=gqa(kv_heads=2))",
        "falcon(W)",
        "llama(W, attention=gqa(kv_heads=2), ffn=mlp(gelu))",
        "gpt2(W, position=alibi)",
        "llama(W, position=alibi)",
        "mistral(W, attention=window(8, kv_heads=2))",
        "llama(W, attention=window(8))",
    ],
)
def test_every_recommended_combination_is_a_line(line: str) -> None:
    """The guide's choices. (It gives Falcon ALiBi in one place and RoPE in another: the published 7b has RoPE.)"""
    model = hw.build(line.replace("W", SMALL))
    assert model(ids(16)).shape == (2, 16, 65)


def test_a_sliding_window_costs_its_width() -> None:
    """O(n·w) in place of O(n²): a window's keys a query do not grow with the context."""
    window = ATTENTION.spec({"kind": "window", "window": 64})
    seen = [window.keys_seen(context, causal=True) for context in (1024, 4096, 65536)]  # type: ignore[attr-defined]
    assert all(62 <= keys <= 64 for keys in seen)
    assert window.tokens_cached(65536) == 64  # type: ignore[attr-defined]
