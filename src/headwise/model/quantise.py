"""Weight-only quantisation: the linear maps of a trained model in 8 or 4 bits, read once a token as they are.

Decoding one token reads every weight once, so its time is their size over the speed of memory: a quarter of the bytes,
up to four times the tokens. What is computed stays a product of floating numbers (`kernels/packed_linear`).

Only plain linear maps change. Embeddings, norms, routers and matrices that a mechanism reads apart from
multiplying by them stay as they are. The head keeps 8 bits in either scheme, since 4 bits cost more there than in all
the layers together; one that shares the embedding's matrix gets a quantised copy of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from headwise.errors import HeadwiseError, SettingsError, one_of
from headwise.kernels import packed_linear
from headwise.kernels.packed_linear import naive, packed
from headwise.linear import Linear
from headwise.model.base import LanguageModel

Scheme = Literal["int8", "int4"]
SCHEMES: tuple[Scheme, ...] = ("int8", "int4")
GROUP_SIZES = (32, 64, 128)


class QuantisedLinear(nn.Module):
    """x ↦ x·Wᵀ + b for W [N,K] kept as codes and scales.

    int8: codes int8 [N,K], scales bfloat16 [N]. int4: codes uint8 [N,⌈K/G⌉·G/2], two a byte, scales and zeros bfloat16
    [⌈K/G⌉,N,2]. The state dict holds the codes as `kernels.packed_linear.naive` describes them, whatever the order they
    are kept in for the kernels of this machine.

    Attributes:
        in_order: whether the codes are in the order of the packed kernels.
        joint: how the product is made together with those of other maps; None where it is not.
    """

    codes: Tensor
    scales: Tensor
    bias: nn.Parameter | None

    def __init__(self, codes: Tensor, scales: Tensor, in_features: int, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, len(codes)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.register_parameter("bias", bias)
        self.in_order = False
        self.joint: Joint | None = None

    @classmethod
    @torch.no_grad()
    def of(cls, linear: nn.Linear, scheme: Scheme, group_size: int) -> QuantisedLinear:
        """The map `linear` in that many bits."""
        weight_NK = linear.weight.detach()
        made = naive.quantise_int8(weight_NK) if scheme == "int8" else naive.quantise_int4(weight_NK, group_size)
        return cls(*made, linear.in_features, linear.bias)

    @property
    def scheme(self) -> Scheme:
        return "int8" if self.codes.dtype == torch.int8 else "int4"

    @property
    def group_size(self) -> int | None:
        """Neighbours in a row that share a scale; None where a whole row does."""
        return None if self.scheme == "int8" else 2 * self.codes.shape[1] // len(self.scales)

    @property
    def weight(self) -> Tensor:
        """The matrix that the codes stand for, float32 [N,K], made anew."""
        return naive.dequantise(self.plain_codes(), self.scales, self.in_features)

    @property
    def n_bytes(self) -> int:
        """Bytes of codes and scales."""
        return sum(t.numel() * t.element_size() for t in (self.codes, self.scales))

    def plain_codes(self) -> Tensor:
        """The codes as the state dict holds them."""
        return packed.unpack(self.codes) if self.in_order else self.codes

    def forward(self, x: Tensor) -> Tensor:
        """x [...,K] → [...,N], in x's dtype."""
        return self.shifted(packed_linear.linear(x, self.codes, self.scales, in_order=self.in_order))

    def shifted(self, y: Tensor) -> Tensor:
        """y + b, in y's dtype."""
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.scheme}, group_size={self.group_size}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantisedLinear:
        # Codes and scales move between devices, in plain order, and keep their dtypes: a bias alone changes precision.
        codes, scales = self.codes, self.scales
        if fn(scales[:0]).device != scales.device:
            codes, self.in_order, self.joint = self.plain_codes(), False, None
        super()._apply(fn, recurse)
        if codes.is_meta:
            self.scales = self.scales.bfloat16()
        else:
            self.codes, self.scales = codes.to(self.scales.device), scales.to(self.scales.device)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination |= {f"{prefix}codes": self.plain_codes(), f"{prefix}scales": self.scales.contiguous()}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.in_order:
            self.codes.copy_(packed.pack(self.codes))


class Joint:
    """Maps of one input whose codes lie one below the other in memory, each map's a view: one product makes all.

    Attributes:
        maps: the maps, in order; they must be in the order of the packed kernels.
    """

    def __init__(self, maps: tuple[QuantisedLinear, ...]) -> None:
        self.maps = maps
        self._rows = [each.out_features for each in maps]
        across = 0 if maps[0].scheme == "int8" else 1
        self._codes = torch.cat([each.codes for each in maps])
        self._scales = torch.cat([each.scales for each in maps], across)
        parts = zip(self._codes.split(self._rows), self._scales.split(self._rows, across))
        for each, (codes, scales) in zip(maps, parts):
            each.codes, each.scales, each.joint = codes, scales, None
        maps[0].joint = self

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """What each map makes of x."""
        y = packed_linear.linear(x, self._codes, self._scales, in_order=True)
        return tuple(each.shifted(part) for each, part in zip(self.maps, y.split_with_sizes(self._rows, -1)))


def quantise(module: nn.Module, scheme: Scheme = "int4", *, group_size: int | None = None) -> nn.Module:
    """Put the linear maps of a module, in place, into 8 or 4 bits; returns the module.

    Args:
        module: a model, or any part of one.
        scheme: "int8" (a scale a row) or "int4" (a scale and a zero a group of neighbours in a row).
        group_size: of int4: 32 (by default), 64 or 128; smaller groups cost more memory and less of the loss.

    Raises:
        SettingsError: no such scheme or group size.
        HeadwiseError: the module is quantised already.
    """
    if scheme not in SCHEMES:
        raise SettingsError(one_of(scheme, SCHEMES, "scheme of quantisation"))
    if scheme == "int8" and group_size is not None:
        raise SettingsError(
            f"group_size={group_size} was given, but int8 has a scale a row; leave it out, or take int4"
        )
    if group_size not in (None, *GROUP_SIZES):
        raise SettingsError(f"group_size should be one of {', '.join(map(str, GROUP_SIZES))}, not {group_size}")
    if (found := quantisation(module)) is not None:
        raise HeadwiseError(
            f"the model is quantised already ({found['scheme']}); load it anew to quantise it otherwise"
        )
    for owner, name in list(_linears(module)):
        wanted = "int8" if isinstance(owner, LanguageModel) else scheme
        setattr(owner, name, QuantisedLinear.of(getattr(owner, name), wanted, group_size or 32))
    arrange(module)
    return module


def _linears(module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Owner and name of each map that is quantised."""
    for owner in module.modules():
        for name, child in owner.named_children():
            if type(child) in (Linear, nn.Linear) and name not in getattr(owner, "read_as_matrices", ()):
                yield owner, name


def arrange(module: nn.Module) -> None:
    """Put codes into the order of this machine's kernels, and those of maps that share an input (their owner's
    `side_by_side`) one below the other; where a device has no such kernels they stay as they are.
    """
    for each in module.modules():
        if isinstance(each, QuantisedLinear) and not each.in_order:
            each.in_order = packed.fits(each.codes, each.scales, each.in_features)
            each.codes = packed.pack(each.codes) if each.in_order else each.codes
    for owner in module.modules():
        names = getattr(owner, "side_by_side", ())
        maps = tuple(
            each for name, each in owner.named_children() if name in names and isinstance(each, QuantisedLinear)
        )
        if maps and len(maps) == len(names) and all(each.in_order for each in maps):
            Joint(maps)


def quantisation(module: nn.Module) -> dict[str, Any] | None:
    """What `quantise` was told, as its keywords; None for a module that is not quantised."""
    found = [each for each in module.modules() if isinstance(each, QuantisedLinear)]
    chosen = max(found, key=lambda each: each.scheme == "int4", default=None)  # int4 has a head of int8
    return None if chosen is None else {"scheme": chosen.scheme, "group_size": chosen.group_size}
