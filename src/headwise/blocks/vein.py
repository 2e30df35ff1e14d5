"""Document 000's building blocks under the document's names, each the registry's own module with its parameters spelled
out.

They stand alone, in any PyTorch model, and are initialised from torch's global generator. Where a whole architecture is
wanted, a line is shorter: `llama(attention=tva(rank=8), ffn=vft(rank=16, s_normals=1))`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn

from headwise.attention.tva import TVA, TVASpec
from headwise.dims import Dims
from headwise.errors import RegistryError, SpecError
from headwise.ffn.vft import VFT, NormalCompensator, VFTSpec, eps_metrics
from headwise.registry import ATTENTION, FFN, ComponentSpec, Registry, validated
from headwise.registry import get_attention as registry_attention
from headwise.registry import get_ffn as registry_ffn
from headwise.vein import VeinProjector, VeinSubspaceShared, recommend_rank

__all__ = [
    "NormalCompensator",
    "TVAAttention",
    "VFTBlock",
    "VFTFeedForward",
    "VeinProjector",
    "VeinSubspaceShared",
    "create_vft_block",
    "get_attention",
    "get_ffn",
    "list_attention",
    "list_ffn",
    "recommend_rank",
    "register_attn",
    "register_ffn",
]

T = TypeVar("T", bound=type)


class TVAAttention(TVA):
    """Tri-vein attention: x [B,T,C] → (out [B,T,C], weights [B,H,T,T] or None). See `headwise.attention.tva`.

    `attn(x, attn_mask=None, return_attention_weights=False)`; the mask is added to the scores, or True = keep where it
    is boolean, broadcast to [B,H,T,T].

    Args:
        d_model, n_heads: C and H.
        rank: r, below the width that the vein projects.
        attn_dropout: dropout of the attention weights.
        vein_projector: a projector to share. One of width d_model makes the vein model-wide, with all maps inside it;
            one of width d_model / n_heads is that of a head, as the layer makes for itself where None is given.

    Raises:
        SpecError: widths that do not fit one another.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        rank: int,
        attn_dropout: float = 0.0,
        vein_projector: VeinProjector | None = None,
    ) -> None:
        model_wide = vein_projector is not None and vein_projector.d_model == d_model
        fields = {"rank": rank, "vein": "model" if model_wide else "head", "dropout": attn_dropout}
        dims = Dims(d_model=d_model, n_heads=n_heads)
        super().__init__(_checked(TVASpec, fields, dims), dims, vein_projector)


class VFTFeedForward(VFT):
    """The vein-flow feed-forward: x [B,T,C] → [B,T,C]. See `headwise.ffn.vft`.

    Args:
        d_model, rank: C and r < C.
        r_hidden: hidden width in the vein; None: 4·rank.
        activation: silu, gelu, gelu_tanh, relu or relu2.
        dropout: of the output.
        use_stabilizer: the direct path, LayerNorm → Linear(C → C), which holds nearly all of the numbers.

    Raises:
        SpecError: a rank that is not below d_model, or an unknown activation.
    """

    def __init__(
        self,
        d_model: int,
        rank: int,
        r_hidden: int | None = None,
        activation: str = "silu",
        dropout: float = 0.0,
        use_stabilizer: bool = True,
    ) -> None:
        fields = {"rank": rank, "r_hidden": r_hidden, "activation": activation}
        fields["stabilizer"] = "full" if use_stabilizer else "none"
        dims = Dims(d_model=d_model, n_heads=1, dropout=dropout)
        super().__init__(_checked(VFTSpec, fields, dims), dims)


class VFTBlock(nn.Module):
    """x += attn(LN x); h = LN x; x += ffn(h); x compensated where ε(h) > τ. `block(x)` → (out, metrics).

    Args:
        d_model, n_heads, rank: C, H and r < C/H.
        r_hidden: hidden width of the feed-forward in its vein; None: 4·rank.
        s_normals, tau: directions and threshold of the normal compensation.
        attn_dropout, ffn_dropout: of the attention weights, and of the feed-forward's output.
        activation: the feed-forward's.

    Raises:
        SpecError: widths that do not fit one another.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        rank: int,
        r_hidden: int | None = None,
        s_normals: int = 1,
        tau: float = 0.18,
        attn_dropout: float = 0.0,
        ffn_dropout: float = 0.0,
        activation: str = "silu",
    ) -> None:
        super().__init__()
        fields = {"rank": rank, "r_hidden": r_hidden, "activation": activation, "s_normals": s_normals, "tau": tau}
        dims = Dims(d_model=d_model, n_heads=n_heads, dropout=ffn_dropout)
        self.attention_norm, self.ffn_norm = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.attention = TVAAttention(d_model, n_heads, rank, attn_dropout)
        self.ffn = VFT(_checked(VFTSpec, fields, dims), dims)

    def forward(
        self, x_BTC: Tensor, attn_mask: Tensor | None = None, return_metrics: bool = False
    ) -> tuple[Tensor, dict[str, float]]:
        """x float [B,T,C] → the same shape, and what is known of ε.

        Args:
            x_BTC: the residual stream.
            attn_mask: as `TVAAttention` takes it; without one the block is bidirectional.
            return_metrics: measure `eps_mean`, `eps_max`, `eps_frac_over_tau` and name the `rank`; else the dict is
                empty.
        """
        x_BTC = x_BTC + self.attention(self.attention_norm(x_BTC), attn_mask)[0]
        h_BTC = self.ffn_norm(x_BTC)
        x_BTC = self.ffn.finish(x_BTC + self.ffn(h_BTC), h_BTC)
        if not return_metrics:
            return x_BTC, {}
        measured = eps_metrics(self.ffn.eps(h_BTC), self.ffn.compensator.tau)
        return x_BTC, {**{name: value.item() for name, value in measured.items()}, "rank": self.ffn.spec.rank}


def create_vft_block(d_model: int, n_heads: int, rank: int, **fields: Any) -> VFTBlock:
    """A `VFTBlock`; further fields as it takes them."""
    return VFTBlock(d_model, n_heads, rank, **fields)


def _checked(kind: type[Any], fields: dict[str, Any], dims: Dims) -> Any:
    """A spec that fits the widths; all that is wrong with it in one error."""
    spec: ComponentSpec = validated(kind, fields)
    problems = spec.check(dims)
    if problems:
        raise SpecError(problems, where=spec.kind)
    return spec


# --- the document's registry ------------------------------------------------------------------------------------------

_own: dict[str, dict[str, Callable[..., Any]]] = {"attention": {}, "ffn": {}}


def register_attn(name: str) -> Callable[[T], T]:
    """Class decorator: an attention that `get_attention(name, **fields)` makes by calling the class with the fields.

    Its modules are called as `attn(x, attn_mask=None)` and return (out, weights | None). For a mechanism that a line
    can name, see `headwise.register_attention`.

    Raises:
        RegistryError: the name is taken.
    """
    return _register(ATTENTION, name)


def register_ffn(name: str) -> Callable[[T], T]:
    """The same for feed-forwards, called as `ffn(x)`."""
    return _register(FFN, name)


def _register(registry: Registry, name: str) -> Callable[[T], T]:
    if name in _names(registry):
        raise RegistryError(f"{registry.family} {name!r} is registered already; choose another name")

    def join(module: T) -> T:
        _own[registry.family][name] = module
        return module

    return join


def get_attention(name: str, **fields: Any) -> Any:
    """An attention by name: `get_attention("tva", d_model=768, n_heads=12, rank=4)(x)` → (out, weights | None).

    Raises:
        SpecError: an unknown name or field, or widths that do not fit one another.
    """
    return _own["attention"].get(name, lambda **fields: registry_attention(name, **fields))(**fields)


def get_ffn(name: str, **fields: Any) -> Any:
    """A feed-forward by name: `get_ffn("vft", d_model=768, rank=4)(x)`; raises as `get_attention` does."""
    return _own["ffn"].get(name, lambda **fields: registry_ffn(name, **fields))(**fields)


def list_attention() -> list[str]:
    """All names that `get_attention` knows, `tva` and `standard` among them."""
    return _names(ATTENTION)


def list_ffn() -> list[str]:
    """All names that `get_ffn` knows, `vft` and `standard` among them."""
    return _names(FFN)


def _names(registry: Registry) -> list[str]:
    return sorted({*registry.list(), *registry.aliases(), *_own[registry.family]})
