"""One layer: attention and feed-forward around the residual stream, in one of six orders (document 001).

* `pre`:       x += f(norm(x)), a final norm after the last layer (GPT-2, Llama)
* `post`:      x = norm(x + f(x)), no final norm (Vaswani et al. 2017, GPT-1)
* `sandwich`:  x += norm(f(norm(x))), a final norm (CogView, Gemma 2)
* `reordered`: x += norm(f(x)), a final norm (OLMo 2)
* `parallel`:  x += attention(h) + ffn(h), h = norm(x), a final norm (GPT-J, Falcon)
* `parallel_two_norms`: x += attention(norm(x)) + ffn(norm(x)), a norm for each, a final norm (GPT-NeoX, Falcon 40b)
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from headwise.attention import Context
from headwise.dims import Dims
from headwise.registry import ATTENTION, FFN, NORM
from headwise.spec import ModelSpec


class Block(nn.Module):
    """Layer `layer` of the model `spec` describes; `cross` adds a cross-attention between attention and
    feed-forward.
    """

    def __init__(self, spec: ModelSpec, dims: Dims, layer: int, *, cross: bool = False) -> None:
        super().__init__()
        self.order = spec.order

        def norm() -> nn.Module:
            return NORM.build(spec.norm.at(layer), dims)

        self.attention = ATTENTION.build(spec.attention.at(layer), dims)
        self.ffn = FFN.build(spec.ffn.at(layer), dims)
        self.attention_norm = norm()
        if self.order != "parallel":
            self.ffn_norm = norm()
        if self.order == "sandwich":
            self.attention_out_norm, self.ffn_out_norm = norm(), norm()
        self.cross_attention = None
        if cross:
            self.cross_attention = ATTENTION.build(spec.cross_attention, dims)
            self.cross_norm = norm()
            if self.order == "sandwich":
                self.cross_out_norm = norm()

    def forward(
        self,
        x_BTC: Tensor,
        context: Context,
        memory_BSC: Tensor | None = None,
        memory_context: Context | None = None,
        *,
        last: bool = False,
    ) -> Tensor:
        """x [B,T,C] → [B,T,C]; `memory_BSC` is what cross-attention looks at, left out where there is none.

        With `last` only the last token goes on after attention, [B,1,C]: of the last layer of a prompt no more is read.
        """

        def going_on(x_BTC: Tensor) -> Tensor:
            return x_BTC[:, -1:] if last else x_BTC

        def attend(h_BTC: Tensor) -> Tensor:
            return self.attention(h_BTC, context=context)[0]

        def look(h_BTC: Tensor) -> Tensor:
            assert self.cross_attention is not None
            return self.cross_attention(h_BTC, context=memory_context, memory_BSC=memory_BSC)[0]

        if last and memory_context is not None and memory_context.segments is not None:
            own_BT, read_BS = memory_context.segments
            memory_context = memory_context._replace(segments=(going_on(own_BT), read_BS))
        if self.order in ("parallel", "parallel_two_norms"):
            h_BTC = self.attention_norm(x_BTC)
            x_BTC, h_BTC, y_BTC = going_on(x_BTC), going_on(h_BTC), going_on(attend(h_BTC))
            if self.order == "parallel_two_norms":
                h_BTC = self.ffn_norm(x_BTC)
            return self.finish(x_BTC + (y_BTC + self.ffn(h_BTC)), h_BTC)
        x_BTC = going_on(self._around(x_BTC, attend, "attention"))
        if self.cross_attention is not None and memory_BSC is not None:
            x_BTC = self._around(x_BTC, look, "cross")
        return self._around(x_BTC, self.ffn, "ffn", self.finish)

    def finish(self, x_BTC: Tensor, h_BTC: Tensor) -> Tensor:
        """The stream x after the feed-forward of h, as the feed-forward wants to leave it; most leave it alone."""
        return self.ffn.finish(x_BTC, h_BTC) if hasattr(self.ffn, "finish") else x_BTC

    def _around(
        self,
        x_BTC: Tensor,
        f: Callable[[Tensor], Tensor],
        name: str,
        finish: Callable[[Tensor, Tensor], Tensor] = lambda x_BTC, h_BTC: x_BTC,
    ) -> Tensor:
        norm = getattr(self, f"{name}_norm")
        if self.order == "post":
            return norm(finish(x_BTC + f(x_BTC), x_BTC))
        if self.order == "reordered":
            return finish(x_BTC + norm(f(x_BTC)), x_BTC)
        h_BTC = norm(x_BTC)
        y_BTC = f(h_BTC)
        if self.order == "sandwich":
            y_BTC = getattr(self, f"{name}_out_norm")(y_BTC)
        return finish(x_BTC + y_BTC, h_BTC)
