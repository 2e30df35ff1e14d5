"""What a mechanism starts from when it takes another's place in a trained model.

`begin` asks the new module: one with a method `start_from(old, start)` fills itself and says how in a few words, or
says None where it cannot. Otherwise attention takes over the projections and pools the heads, and a feed-forward takes
over neurons and fits its output map.

Low rank is always meant with respect to what the layer is given: a matrix W that acts on vectors x of second moments
S = E[x xᵀ] is cut so that E‖Wx − W_r x‖² is least, which is the truncated SVD of W S^½ (Eckart and Young 1936).
All sums run in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RIDGE = 1e-8  # of the mean square: keeps directions that the inputs hardly have from blowing up


@dataclass(frozen=True)
class Start:
    """What is known of the place.

    Attributes:
        inputs_NC: vectors that the old module is given there, as many as there are (a few thousand will do).
        pairing: how the position code joins the dimensions of a head that it turns; None: it turns none.
        share: of a head's dimensions, how many it turns, the first ones.
    """

    inputs_NC: Tensor
    pairing: Literal["half", "interleaved"] | None = None
    share: float = 1.0

    def pairs(self, width: int) -> list[tuple[int, int]]:
        """The dimensions of a head that turn together, from the fastest pair to the slowest."""
        n = int(width * self.share) // 2
        if self.pairing is None:
            return []
        return [(i, i + n) if self.pairing == "half" else (2 * i, 2 * i + 1) for i in range(n)]

    def moments_CC(self) -> Tensor:
        """E[x xᵀ] of the inputs, float64."""
        x_NC = self.inputs_NC.double()
        return x_NC.T @ x_NC / len(x_NC)


@torch.no_grad()
def begin(new: nn.Module, old: nn.Module, start: Start) -> str:
    """Fill `new` from `old`, both modules of one family; how, in a few words."""
    how = new.start_from(old, start) if hasattr(new, "start_from") else None  # type: ignore[operator]
    if how is None:
        how = start_attention(new, old) if hasattr(old, "wo") else start_ffn(new, old, start)
    return how


# ---- attention -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Heads:
    """The maps of an attention head by head, in float64: q = wq x + bq, y = Σ_h wo_h (…)_h + bo, scores q·k/√D."""

    wq_HDC: Tensor
    wk_KDC: Tensor
    wv_KDC: Tensor
    wo_CHD: Tensor
    bq_HD: Tensor
    bk_KD: Tensor
    bv_KD: Tensor
    bo_C: Tensor

    def with_kv_heads(self, n: int) -> Heads:
        """The same with n key and value heads: averaged where there are fewer, repeated where there are more."""
        K = len(self.wk_KDC)

        def change(each: Tensor) -> Tensor:
            return each.unflatten(0, (n, -1)).mean(1) if n < K else each.repeat_interleave(n // K, dim=0)

        keys_and_values = {name: change(getattr(self, name)) for name in ("wk_KDC", "wv_KDC", "bk_KD", "bv_KD")}
        return self if n == K else replace(self, **keys_and_values)

    def moments(self, start: Start) -> tuple[Tensor, Tensor, Tensor]:
        """Second moments [K,D,D] of queries (those of a key head added up), keys and values; float64."""
        x_NC = start.inputs_NC.double()
        found = []
        for weight, bias in ((self.wq_HDC, self.bq_HD), (self.wk_KDC, self.bk_KD), (self.wv_KDC, self.bv_KD)):
            y_nND = x_NC @ weight.transpose(1, 2) + bias[:, None]
            moments = y_nND.transpose(1, 2) @ y_nND / len(x_NC)
            found.append(moments.unflatten(0, (len(self.wk_KDC), -1)).sum(1))
        return found[0], found[1], found[2]

    def resized(self, start: Start, keys: int, values: int) -> Heads:
        """The same heads with queries and keys `keys` wide and values `values` wide; products q·k keep their size.

        Where the position code turns pairs, pairs are kept or left out whole. Otherwise each head's cut is the best one
        of its rank, as it is for values. What is wider than before is filled up with zeros.
        """
        D, K = self.wq_HDC.shape[1], len(self.wk_KDC)
        queries_KDD, keys_KDD, values_KDD = self.moments(start)
        out_KDD = (self.wo_CHD.permute(1, 2, 0) @ self.wo_CHD.permute(1, 0, 2)).unflatten(0, (K, -1)).sum(1)
        if start.pairing is not None:
            chosen = turned_alike(D, keys, start).to(queries_KDD)
            cuts_qk = [(chosen, chosen)] * K
        else:
            cuts_qk = [bottleneck(queries_KDD[g], keys_KDD[g], keys) for g in range(K)]
        cuts_ov = [bottleneck(out_KDD[g], values_KDD[g], values) for g in range(K)]
        group = len(self.wq_HDC) // K
        q_HrD = torch.stack([a for a, _ in cuts_qk]).repeat_interleave(group, 0)
        o_HrD = torch.stack([a for a, _ in cuts_ov]).repeat_interleave(group, 0)
        k_KrD, v_KrD = (torch.stack([b for _, b in cuts]) for cuts in (cuts_qk, cuts_ov))

        def times(cut: Tensor, bias: Tensor) -> Tensor:
            return (cut @ bias[..., None])[..., 0]

        return Heads(
            q_HrD @ self.wq_HDC, k_KrD @ self.wk_KDC, v_KrD @ self.wv_KDC,
            torch.einsum("chd,hrd->chr", self.wo_CHD, o_HrD),
            times(q_HrD, self.bq_HD), times(k_KrD, self.bk_KD), times(v_KrD, self.bv_KD), self.bo_C,
        )  # fmt: skip


def heads_of(attention: nn.Module) -> Heads | None:
    """The heads of an attention with plain projections; None for another. A layer that folds is folded first.

    A norm over each head's queries and keys cannot be kept by a linear map: its gains can, and are. Another scale than
    1/√D goes into the queries.
    """
    layer: Any = attention
    if getattr(getattr(layer, "spec", None), "vein", None) == "head":
        layer = layer.fold()
    maps: list[Any] = [getattr(layer, name, None) for name in ("wq", "wk", "wv", "wo")]
    H, K, D = (getattr(layer, name, 0) for name in ("n_heads", "kv_heads", "head_dim"))
    if not all(isinstance(each, nn.Linear) for each in maps):
        return None
    wq, wk, wv, wo = maps
    if (wq.out_features, wk.out_features, wv.out_features, wo.in_features) != (H * D, K * D, K * D, H * D):
        return None
    if wq.in_features != wo.out_features:
        return None

    def split(each: nn.Linear, n: int) -> tuple[Tensor, Tensor]:
        weight = each.weight.double().unflatten(0, (n, -1))
        return weight, weight.new_zeros(n, D) if each.bias is None else each.bias.double().view(n, D)

    (q, bq), (k, bk), (v, bv) = split(wq, H), split(wk, K), split(wv, K)
    if hasattr(layer, "q_norm"):
        # The norm makes each head D long: its gain stands for the size, the map for the direction.
        gain_q, gain_k = (norm.gain().double().view(-1, D) for norm in (layer.q_norm, layer.k_norm))
        q, k, bq, bk = q * gain_q[..., None], k * gain_k[..., None], bq * gain_q, bk * gain_k
    size = layer.scale * D**0.5
    q, bq = q * size, bq * size
    out = wo.weight.double().unflatten(1, (H, D))
    return Heads(q, k, v, out, bq, bk, bv, out.new_zeros(len(out)) if wo.bias is None else wo.bias.double())


def start_attention(new: nn.Module, old: nn.Module) -> str:
    """Projections taken over where their shapes agree; key and value heads pooled by their mean, or repeated."""
    before, after = (getattr(old, "kv_heads", 0), getattr(new, "kv_heads", 0))
    source = dict(old.state_dict())
    how = "projections"
    if before != after and before and after and max(before, after) % min(before, after) == 0:
        full = ("k_norm.weight",) if new.spec.qk_norm == old.spec.qk_norm == "full" else ()  # type: ignore[union-attr]
        for name in ("wk.weight", "wk.bias", "wv.weight", "wv.bias", *full):
            if name in source:
                heads = source[name].unflatten(0, (before, -1))
                if after < before:
                    source[name] = heads.unflatten(0, (after, -1)).mean(1).flatten(0, 1)
                else:
                    source[name] = heads.repeat_interleave(after // before, dim=0).flatten(0, 1)
        how = f"projections, key and value heads {'averaged' if after < before else 'repeated'}"
    copied = copy_equal(new, source)
    if "wo.weight" not in copied:
        return "anew: its projections have other shapes"
    _keep_scores(new, old)
    missing = sorted({name.partition(".")[0] for name in new.state_dict()} - {n.partition(".")[0] for n in copied})
    return how + (f"; anew: {', '.join(missing)}" if missing else "")


def _keep_scores(new: Any, old: Any) -> None:
    """Where two layers multiply q·k by different scales, put the difference into the queries taken over."""
    if new.spec.takes_scale and old.spec.takes_scale and new.scale != old.scale:
        queries = next(getattr(new, name) for name in ("wq_b", "q_norm", "wq") if hasattr(new, name))
        stored_as = float(getattr(queries, "unit_offset", False))  # gains less 1
        for tensor in queries.parameters():
            tensor.add_(stored_as).mul_(old.scale / new.scale).sub_(stored_as)


def fit_output(new: nn.Module, run: Callable[[], Tensor], wanted_BTC: Tensor) -> bool:
    """Fit an attention's output projection to what it should give of whole sequences; whether that was kept.

    Three quarters of the sequences are fitted to, and the fit is kept if it comes nearer on the rest.

    Args:
        new: an attention; left as it was where it has no `wo` of its own to fit.
        run: its forward pass on the sequences, [B,T,C].
        wanted_BTC: what should come of them.
    """
    wo, seen = getattr(new, "wo", None), []
    if not isinstance(wo, nn.Linear) or wo.out_features != wanted_BTC.shape[-1] or len(wanted_BTC) < 4:
        return False
    hook = wo.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        found_BTC = run()
    finally:
        hook.remove()
    if not seen:
        return False
    cut = 3 * len(wanted_BTC) // 4
    hidden_BTF, rest_NF = seen[0], seen[0][cut:].flatten(0, 1).double()
    weight, bias = least_squares(hidden_BTF[:cut].flatten(0, 1), wanted_BTC[:cut].flatten(0, 1), wo.bias is not None)
    fitted_NC = rest_NF @ weight.T + (0 if bias is None else bias)
    wanted_NC = wanted_BTC[cut:].flatten(0, 1)
    if relative_error(fitted_NC, wanted_NC) > 0.99 * relative_error(found_BTC[cut:].flatten(0, 1), wanted_NC):
        return False
    fill(wo, weight, bias)
    return True


def bottleneck(left_DD: Tensor, right_DD: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best A and B, [rank,D], for (A a)·(B b) ≈ a·b, where a and b have the second moments given (float64).

    With rank D the product is exact; rows beyond that are 0. E(a·b − (Aa)·(Bb))², a and b independent, is least.
    """
    (root_l, back_l), (root_r, back_r) = _roots(left_DD), _roots(right_DD)
    u, s, vt = torch.linalg.svd(root_l @ root_r)
    size = s[:rank].sqrt()[:, None]
    fill_up = (0, 0, 0, max(0, rank - len(s)))
    return F.pad(size * (u.T[:rank] @ back_l), fill_up), F.pad(size * (vt[:rank] @ back_r), fill_up)


def _roots(moments: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetric root and its inverse; directions that do not occur count as very small."""
    values, vectors = torch.linalg.eigh(moments)
    values = values.clamp_min(RIDGE * values.mean().clamp_min(torch.finfo(values.dtype).tiny))
    return (vectors * values.sqrt()) @ vectors.T, (vectors * values.rsqrt()) @ vectors.T


def turned_alike(old_width: int, new_width: int, start: Start) -> Tensor:
    """[new,old], ones and zeros: which dimension of an old head becomes which of a new one, so that each turned pair
    keeps (nearly) the frequency it had. Dimensions that do not turn are taken in order.
    """
    chosen = torch.zeros(new_width, old_width, dtype=torch.float64)
    old, new = start.pairs(old_width), start.pairs(new_width - new_width % 2)
    n, few = max(len(old), len(new)), min(len(old), len(new))
    for i in range(few):
        nearest = round(i * n / few)
        a, b = (new[i], old[nearest]) if few == len(new) else (new[nearest], old[i])
        chosen[a[0], b[0]] = chosen[a[1], b[1]] = 1
    still_old = [i for i in range(old_width) if i not in {n for pair in old for n in pair}]
    still_new = [i for i in range(new_width) if i not in {n for pair in new for n in pair}]
    for i, j in zip(still_new, still_old):
        chosen[i, j] = 1
    return chosen


def latent(weight_MC: Tensor, rank: int, start: Start) -> tuple[Tensor, Tensor]:
    """W ≈ back·into for a latent of `rank` numbers that is normed to mean square 1; into [rank,C], back [M,rank].

    The subspace is the best one (truncated SVD). Within it the latent may have any coordinates. Those are taken in
    which its size varies least from token to token, for that is what the norm takes away.
    """
    moments_CC = start.moments_CC()
    root, back_root = _roots(moments_CC)
    rows = (torch.linalg.svd(weight_MC.double() @ root, full_matrices=False)[2] @ back_root)[:rank]

    def size_N(into: Tensor) -> Tensor:
        return (start.inputs_NC.double() @ into.T).square().sum(-1).div(rank).sqrt()

    into = min((rows, torch.linalg.qr(rows.T)[0].T), key=lambda each: (size_N(each).std() / size_N(each).mean()).item())
    into = into / size_N(into).mean()
    fill_up = rank - len(into)
    return F.pad(into, (0, 0, 0, fill_up)), F.pad(lift(weight_MC, into, start), (0, fill_up))


# ---- feed-forwards ---------------------------------------------------------------------------------------------------


def start_ffn(new: nn.Module, old: nn.Module, start: Start) -> str:
    """Neurons taken over, the most active first where there are fewer, and the output map fitted to the old outputs."""
    x_NC = start.inputs_NC
    wanted_NC = outputs(old, x_NC)
    to, source = neurons(new), neurons(old)
    if not source or not to or to[0].in_features != source[0].in_features:
        copy_equal(new, old.state_dict())
        return fit_out(new, x_NC, wanted_NC)
    order = by_activity(old, x_NC)
    for own, theirs in zip(to, source):
        take_rows(own, theirs, order)
    if len(to) > len(source) and to[-1].bias is not None:  # a gate of what is always 1 is that gate alone
        fill(to[-1], torch.zeros_like(to[-1].weight), torch.ones_like(to[-1].bias))
    w_out, old_w_out = (cast(Any, each).w_out for each in (new, old))
    take_columns(w_out, old_w_out, order)
    error = relative_error(outputs(new, x_NC), wanted_NC)
    if error < 1e-5:
        return "its weights"
    kept = {name: tensor.clone() for name, tensor in new.state_dict().items()}
    fit_out(new, x_NC, wanted_NC)
    if relative_error(outputs(new, x_NC), wanted_NC) > error:
        new.load_state_dict(kept)
        return "its neurons"
    return "its neurons, output map fitted"


def neurons(ffn: nn.Module) -> list[nn.Linear]:
    """The maps whose rows are a feed-forward's hidden neurons: W_in, or the gate and what it gates; none if unknown."""
    found = [getattr(ffn, name, None) for name in ("w_gate", "w_up", "w_in")]
    maps = [each for each in found if isinstance(each, nn.Linear)]
    return maps if isinstance(getattr(ffn, "w_out", None), nn.Linear) else []


def by_activity(ffn: nn.Module, x_NC: Tensor) -> Tensor:
    """The hidden neurons of a feed-forward, those that put most into its output first."""
    h_NF = hidden(ffn, x_NC).double()
    return (h_NF.square().mean(0) * ffn.w_out.weight.double().square().sum(0)).argsort(descending=True)  # type: ignore


def take_rows(new: nn.Linear, old: nn.Linear, order: Tensor) -> None:
    """Neurons in this order, as many as both have; all of them stay in their places."""
    chosen = order[: new.out_features].sort().values
    new.weight[: len(chosen)] = old.weight[chosen].to(new.weight)
    if new.bias is not None:
        new.bias[: len(chosen)] = 0 if old.bias is None else old.bias[chosen].to(new.bias)


def take_columns(new: nn.Linear, old: nn.Linear, order: Tensor) -> None:
    """What those neurons write; neurons beyond them write nothing."""
    chosen = order[: new.in_features].sort().values
    new.weight.zero_()
    new.weight[:, : len(chosen)] = old.weight[:, chosen].to(new.weight)
    if new.bias is not None:
        new.bias.copy_(torch.zeros_like(new.bias) if old.bias is None else old.bias)


def fit_out(new: nn.Module, x_NC: Tensor, wanted_NC: Tensor) -> str:
    """Fit a feed-forward's output map to what it should give, by least squares."""
    w_out = getattr(new, "w_out", None)
    if not isinstance(w_out, nn.Linear) or w_out.out_features != wanted_NC.shape[-1]:
        return "anew: nothing of it fits"
    fill(w_out, *least_squares(hidden(new, x_NC), wanted_NC, w_out.bias is not None))
    return "output map fitted"


def hidden(ffn: nn.Module, x_NC: Tensor) -> Tensor:
    """What enters a feed-forward's output map, [N,F]."""
    seen: list[Tensor] = []
    hook = ffn.w_out.register_forward_pre_hook(lambda module, args: seen.append(args[0]))  # type: ignore
    try:
        outputs(ffn, x_NC)
    finally:
        hook.remove()
    return seen[0].flatten(0, -2)


@torch.no_grad()
def outputs(ffn: nn.Module, x_NC: Tensor) -> Tensor:
    """What a feed-forward makes of vectors in eval mode, [N,C]."""
    training = ffn.training
    ffn.eval()
    try:
        return ffn(x_NC[None])[0]
    finally:
        ffn.train(training)


# ---- veins -----------------------------------------------------------------------------------------------------------


def vein_basis(ffn: nn.Module, start: Start, rank: int, probes: int = 8) -> Tensor:
    """V [rank,C] of orthonormal rows, float64: the subspace of the inputs that matters most to a feed-forward.

    How much a change of the input matters is read off the Jacobian J at the inputs: E[JᵀJ], estimated with a few random
    directions of the output (the active subspace of Constantine et al. 2014, for inputs of any second moments).
    """
    x_NC = start.inputs_NC.detach().clone().requires_grad_()
    generator = torch.Generator().manual_seed(0)
    slopes_CC = torch.zeros_like(start.moments_CC())
    with torch.enable_grad():
        y_NC = ffn(x_NC[None])[0]
        for _ in range(probes):
            direction = torch.randn(y_NC.shape, generator=generator).to(y_NC)
            (slope_NC,) = torch.autograd.grad(y_NC, x_NC, direction, retain_graph=True)
            slopes_CC += slope_NC.double().T @ slope_NC.double()
    _, into = bottleneck(slopes_CC, start.moments_CC(), rank)
    return torch.linalg.qr(into.T)[0].T


def lift(weight_FC: Tensor, v_rC: Tensor, start: Start) -> Tensor:
    """[F,rank], float64: what, of vectors in the vein, comes nearest to a map of the vectors themselves."""
    moments_CC = start.moments_CC()
    inside_rr = v_rC @ moments_CC @ v_rC.T
    ridge = RIDGE * inside_rr.diagonal().mean() * torch.eye(len(inside_rr)).to(inside_rr)
    return torch.linalg.solve(inside_rr + ridge, v_rC @ moments_CC @ weight_FC.double().T).T


# ---- tensors ---------------------------------------------------------------------------------------------------------


def copy_equal(new: nn.Module, source: dict[str, Tensor]) -> set[str]:
    """Copy the tensors whose name and shape both have; their names."""
    own = new.state_dict()
    equal = {name for name, tensor in own.items() if name in source and source[name].shape == tensor.shape}
    for name in equal:
        own[name].copy_(source[name])
    return equal


def fill(linear: nn.Linear, weight: Tensor, bias: Tensor | None = None) -> None:
    """Set a linear map; a bias it has and is not given is 0."""
    linear.weight.copy_(weight)
    if linear.bias is not None:
        linear.bias.copy_(torch.zeros_like(linear.bias) if bias is None else bias)


def least_squares(x_NF: Tensor, y_NC: Tensor, bias: bool) -> tuple[Tensor, Tensor | None]:
    """W [C,F] and b [C] (None without) of the least Σ‖y − Wx − b‖², with a very small ridge; float64."""
    x_NF, y_NC = x_NF.double(), y_NC.double()
    mean_F = x_NF.mean(0) if bias else x_NF.new_zeros(x_NF.shape[1])
    mean_C = y_NC.mean(0) if bias else y_NC.new_zeros(y_NC.shape[1])
    x_NF, y_NC = x_NF - mean_F, y_NC - mean_C
    gram_FF = x_NF.T @ x_NF
    ridge = RIDGE * gram_FF.diagonal().mean().clamp_min(torch.finfo(gram_FF.dtype).tiny)
    weight = torch.linalg.solve(gram_FF + ridge * torch.eye(len(gram_FF)).to(gram_FF), x_NF.T @ y_NC).T
    return weight, mean_C - weight @ mean_F if bias else None


def reduced_rank(x_NF: Tensor, y_NC: Tensor, rank: int, bias: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """U [C,rank] of orthonormal columns, W [rank,F], b [rank] of the least Σ‖y − U(Wx + b)‖² (Izenman 1975)."""
    weight, _ = least_squares(x_NF, y_NC, bias)
    x, y = x_NF.double(), y_NC.double()
    if bias:
        x = torch.cat([x, x.new_ones(len(x), 1)], 1)
        weight, _ = least_squares(x, y, False)
    fitted = x @ weight.T
    u = torch.linalg.eigh(fitted.T @ fitted)[1].flip(-1)[:, :rank]
    inner = u.T @ weight
    return (u, inner[:, :-1], inner[:, -1]) if bias else (u, inner, None)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """‖found − wanted‖/‖wanted‖."""
    return ((found - wanted).double().norm() / wanted.double().norm().clamp_min(1e-300)).item()
