"""Padding-free encoding: the texts of a chunk end to end in one row, each attending to itself only.

    padded  [n, L]  every layer computes n·L tokens
    packed  [1, T]  every layer computes the T tokens there are; each token keeps its position in its own text

All of a transformer but attention works token by token and needs no change. Attention is replaced through
transformers' attention interface. Which tokens of a text see which (all, earlier ones, a window) stays the
architecture's own business: its mask function is kept as it is and evaluated over one text instead of the row.

On a CPU a loop over the texts, those of one length together. On a GPU FlashAttention 2 for variable lengths where
`model.attention` is flash_attention_2, else torch's jagged tensors, which bring such a kernel for half precision and
one for fp32. The kernels on a GPU have not been measured here.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from data_services.schema import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from trainers.config import ModelConfig

ATTENTION = "gyre_packed"
FLASH = "flash_attention_2"
PROBE_LENGTHS = (3, 7, 1, 7)


@dataclass(frozen=True)
class Layout:
    """Where the tokens of n padded texts go: text after text, the shortest first, so that equal lengths are adjacent.

    places     [T] int64, of each packed token among the n·L padded ones
    positions  [T] int64, its position in its text
    lengths    tokens of each text, ascending; texts without any are left out
    """

    places: Tensor
    positions: Tensor
    lengths: list[int]

    @classmethod
    def of(cls, mask: Tensor) -> Layout:
        """mask [n, L], 1 where there is a token. Of a chunk without tokens the first place is taken: every worker
        must run the model, and nobody reads the result."""
        lengths = mask.sum(1)
        order = lengths.argsort(stable=True)
        text, positions = mask[order].nonzero(as_tuple=True)
        if not len(text):
            first = mask.new_zeros(1, dtype=torch.int64)
            return cls(first, first, [1])
        places = order[text] * mask.shape[1] + positions
        return cls(places, positions, [length for length in lengths[order].tolist() if length])

    @cached_property
    def runs(self) -> list[tuple[int, int]]:
        """(texts, length) of each run of texts of one length."""
        return [(len(list(texts)), length) for length, texts in itertools.groupby(self.lengths)]

    @cached_property
    def bounds(self) -> Tensor:
        """[texts + 1] int32, the offset at which each text begins, and T."""
        ends = torch.tensor([0, *itertools.accumulate(self.lengths)], dtype=torch.int32)
        return ends.to(self.places.device)


class Pattern:
    """Which tokens of a text see which: the mask function that the architecture gives to transformers.

    One for each kind of layer, made anew in each forward, whose layers share its masks.
    """

    def __init__(self, function: Callable[..., Tensor], use_vmap: bool, dtype: torch.dtype) -> None:
        self._function, self._use_vmap, self._dtype = function, use_vmap, dtype
        self._shape: str | None = None
        self._biases: list[Tensor | None] | None = None

    def shape(self, layout: Layout) -> str:
        """`all`, `causal`, or `other` where it is neither: whatever the first position of a text sees of the others,
        and the last, every token sees as far ahead and behind."""
        if self._shape is None:
            longest = int(layout.positions.max()) + 1
            ahead, behind = (self._visible(layout, at, 1, longest) for at in (0, longest - 1))
            causal = "causal" if int(ahead.sum()) == 1 else "other"
            self._shape = "other" if not behind.all() else "all" if ahead.all() else causal
        return self._shape

    def biases(self, layout: Layout) -> list[Tensor | None]:
        """Of each run what is added to its scores, [m, 1, L, L]; None where every token sees every other."""
        if self._biases is None:
            longest = int(layout.positions.max()) + 1
            visible, self._biases = self._visible(layout, 0, longest, longest), []
            tokens = [texts * length for texts, length in layout.runs]
            for (texts, length), at in zip(layout.runs, layout.positions.split(tokens), strict=True):
                at = at.view(texts, length)
                seen = visible[at[:, :, None], at[:, None, :]]
                bias = torch.zeros_like(seen, dtype=self._dtype).masked_fill_(~seen, torch.finfo(self._dtype).min)
                self._biases.append(None if seen.all() else bias[:, None])
        return self._biases

    def _visible(self, layout: Layout, first: int, queries: int, keys: int) -> Tensor:
        """[queries, keys] bool, whether the tokens at positions `first`, first + 1, … see those at 0, 1, …"""
        mask = sdpa_mask(
            batch_size=1,
            q_length=queries,
            kv_length=keys,
            q_offset=first,
            mask_function=self._function,
            allow_is_causal_skip=False,
            use_vmap=self._use_vmap,
            device=layout.positions.device,
        )
        assert mask is not None, "sdpa_mask leaves a mask out only where it may"
        return mask[0, 0]


def _pattern(*, mask_function: Callable[..., Tensor], use_vmap: bool = False, dtype: torch.dtype, **_: Any) -> Pattern:
    """What transformers calls for a mask; the attention function gets what it returns."""
    return Pattern(mask_function, use_vmap, dtype)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Pattern,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    layout: Layout | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """query [1, h, T, A], key and value [1, h or fewer, T, A] -> [1, T, h, A], as transformers' functions do.

    softcap  c of c·tanh(score/c) (Gemma 2)
    """
    if layout is None:
        raise ValueError("layout is needed: this backbone takes packed texts, call it through `run`")
    for name in ("position_bias", "s_aux"):
        if others.get(name) is not None:
            raise UsageError(f"model.packing: on, but {type(module).__name__} has a {name}; set it to off")
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    query = query * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    dropout = dropout if module.training else 0.0
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, h, A]
    if query.device.type == "cuda" and softcap is None and attention_mask.shape(layout) != "other":
        mixed = jagged(q, k, v, layout, attention_mask.shape(layout) == "causal", dropout)
    else:
        mixed = text_by_text(q, k, v, layout, attention_mask.biases(layout), dropout, softcap)
    return mixed[None], None


def text_by_text(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    biases: list[Tensor | None],
    dropout: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """A loop over runs of texts of one length: query (scaled), key, value [T, h, A] -> [T, h, A]."""
    tokens = [texts * length for texts, length in layout.runs]
    mixed = []
    for (texts, length), bias, *parts in zip(
        layout.runs, biases, *(x.split(tokens) for x in (query, key, value)), strict=True
    ):
        q, k, v = (part.unflatten(0, (texts, length)).transpose(1, 2) for part in parts)  # [m, h, L, A]
        scores = q @ k.transpose(2, 3)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if bias is not None:
            scores = scores + bias
        weights = F.dropout(scores.softmax(-1), dropout)
        mixed.append((weights @ v).transpose(1, 2).flatten(0, 1))
    return torch.cat(mixed)


def jagged(query: Tensor, key: Tensor, value: Tensor, layout: Layout, causal: bool, dropout: float = 0.0) -> Tensor:
    """The same by torch's kernels for jagged tensors: query (scaled), key, value [T, h, A] -> [T, h, A]."""
    bounds, (shortest, longest) = layout.bounds, (layout.lengths[0], layout.lengths[-1])
    q, k, v = (
        torch.nested.nested_tensor_from_jagged(
            x.contiguous(), bounds, min_seqlen=shortest, max_seqlen=longest
        ).transpose(1, 2)
        for x in (query, key, value)
    )
    mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=causal, scale=1.0)
    return mixed.transpose(1, 2).values()


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, _pattern)


def run(backbone: PreTrainedModel, input_ids: Tensor, mask: Tensor, packed: bool, **options: Any) -> Any:
    """The backbone's output for input_ids, mask [n, L], its token vectors [n, L, H].

    packed  as `prepare` answered for this backbone; the vectors are then zero where there is no token
    """
    if not packed:
        return backbone(input_ids=input_ids, attention_mask=mask, **options)
    layout = Layout.of(mask)
    row = input_ids.flatten()[layout.places][None]
    output = backbone(
        input_ids=row,
        # All ones says nothing, but without a mask transformers would look for texts in the positions.
        attention_mask=torch.ones_like(row),
        position_ids=layout.positions[None] + _first_position(backbone),
        **_attention_arguments(backbone, layout),
        **options,
    )

    def padded(hidden: Tensor) -> Tensor:
        places = hidden.new_zeros(input_ids.numel(), hidden.shape[-1]).index_copy(0, layout.places, hidden[0])
        return places.view(*input_ids.shape, -1)

    output.last_hidden_state = padded(output.last_hidden_state)
    if output.hidden_states is not None:
        output.hidden_states = tuple(padded(layer) for layer in output.hidden_states)
    return output


def _attention_arguments(backbone: PreTrainedModel, layout: Layout) -> dict[str, Any]:
    """What reaches the attention functions through the model: `layout` to ours, the bounds to FlashAttention's."""
    if backbone.config._attn_implementation == ATTENTION:
        return {"layout": layout}
    bounds, longest = layout.bounds, layout.lengths[-1]
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}


def _first_position(backbone: nn.Module) -> int:
    """RoBERTa and its kin number positions from padding_idx + 1, all others from 0."""
    for module in backbone.modules():
        padding = getattr(module, "padding_idx", None)
        if padding is not None and isinstance(getattr(module, "position_embeddings", None), nn.Embedding):
            return padding + 1
    return 0


def prepare(backbone: PreTrainedModel, config: ModelConfig) -> bool:
    """Whether `run` is to pack, by `model.packing`; if so the backbone takes packed texts only.

    auto  on with `model.attention: flash_attention_2` and an architecture that can, else off. On a CPU the loop takes
          what it saves: against length-sorted chunks of 128 pairs, with 5 % of padding, packed ones were 1.00 times as
          fast (0.89 to 1.03), against those of 16 pairs, with 12 %, 1.03 times (0.99 to 1.08)

    UsageError where it is on and the architecture can't.
    """
    if config.packing == "off" or (config.packing == "auto" and config.attention != FLASH):
        return False
    obstacle = _obstacle(backbone, config)
    if obstacle and config.packing == "on":
        raise UsageError(f"model.packing: on, but {obstacle}")
    if obstacle:
        return False
    if config.attention != FLASH:
        backbone.set_attn_implementation(ATTENTION)
    return True


def _obstacle(backbone: PreTrainedModel, config: ModelConfig) -> str | None:
    """Why this backbone can't be packed, and the remedy. That texts stay apart is compared, not believed."""
    kind, implementation = backbone.config.model_type, backbone.config._attn_implementation
    if config.attention not in ("auto", FLASH):
        return f"model.attention is {config.attention}, and packing brings its own; set that to auto or {FLASH}"
    takes = inspect.signature(backbone.forward).parameters
    if not getattr(backbone, "_supports_attention_backend", False) or "position_ids" not in takes:
        return f"transformers lets nobody replace the attention of {kind}; set it to off"
    windowed = getattr(backbone.config.get_text_config(), "sliding_window", None) is not None
    if config.attention == FLASH and windowed and config.token_dropout:
        return f"{FLASH} counts the window of {kind} without the tokens that model.token_dropout hides; set that to 0"
    states = []
    for name, packed in (("eager", False), (ATTENTION, True)):
        backbone.set_attn_implementation(name)
        states.append(_probe(backbone, packed))
    backbone.set_attn_implementation(implementation)
    want, got = states
    if not torch.allclose(got, want, rtol=1e-3, atol=1e-4 * float(want.abs().max())):
        return f"{kind} mixes texts that share a row; set it to off"
    return None


@torch.inference_mode()
def _probe(backbone: PreTrainedModel, packed: bool) -> Tensor:
    """Token vectors [T, D] of a few short texts, in evaluation mode."""
    mask = (torch.arange(max(PROBE_LENGTHS)) < torch.tensor(PROBE_LENGTHS)[:, None]).long()
    ids = (torch.arange(mask.numel()).view(mask.shape) + 3) % backbone.config.get_text_config().vocab_size
    training = backbone.training
    hidden = run(backbone.eval(), ids, mask, packed).last_hidden_state
    backbone.train(training)
    return hidden[mask.bool()].float()
