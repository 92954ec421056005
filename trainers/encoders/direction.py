"""Whether a tower's attention sees later tokens, and making it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from data_services.schema import UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel


def set_direction(model: PreTrainedModel, bidirectional: bool | None) -> bool:
    """Make attention see both ways or not (None: leave it), and say whether it does.

    `config.is_causal = False` drops a decoder's mask in transformers, a sliding window then reaches both ways;
    whether every layer honours it is probed, not believed.
    """
    causal, layers = _causal_layers(model)
    if bidirectional is None or bidirectional == (not causal):
        return not causal
    kind = model.config.model_type
    if not bidirectional:
        if len(causal) == len(layers):
            return False
        raise UsageError(f"model.bidirectional: false, but {kind} attends both ways; remove the key")
    model.config.is_causal = False
    causal, layers = _causal_layers(model)
    if causal:
        which = "" if len(causal) == len(layers) else f" in {len(causal)} of its {len(layers)} layers ({causal[0]}, …)"
        raise UsageError(
            f"model.bidirectional: true, but the causal order of {kind} can't be dropped{which}; "
            "set it to false (and model.pooling to last)"
        )
    return True


def _causal_layers(model: PreTrainedModel) -> tuple[list[str], list[str]]:
    """(Names of the layers in which no token sees a later one, names of all).

    A model without layers of transformers' own kind is one layer. One by one, since a recurrent layer between layers
    of attention would not show in the model's output; the whole first, since a layer may carry a state over calls.
    """
    import torch

    layers = _layers(model)
    calls: dict[nn.Module, _Call] = {}

    def note(layer: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        calls[layer] = _Call(args, kwargs, _states(output))

    ids = torch.arange(8)[None] % model.config.get_text_config().vocab_size
    training = model.training
    model.eval()
    hooks = [layer.register_forward_hook(note, with_kwargs=True) for layer in {model, *layers.values()}]
    with torch.inference_mode():
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
        for hook in hooks:
            hook.remove()
        mixed = _sees_later_tokens(model, calls[model])
        read = {name: layer for name, layer in layers.items() if layer in calls}
        causal = [name for name, layer in read.items() if not (mixed and _sees_later_tokens(layer, calls[layer]))]
    model.train(training)
    return causal, list(read)


@dataclass(frozen=True)
class _Call:
    """What a module was called with and the token vectors [1, L, H] that it gave."""

    args: tuple
    kwargs: dict[str, Any]
    states: Tensor


def _layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    from transformers.modeling_layers import GradientCheckpointingLayer

    found: dict[str, nn.Module]
    found = {name: m for name, m in model.named_modules() if isinstance(m, GradientCheckpointingLayer)}
    outermost = {name: m for name, m in found.items() if not any(name.startswith(f"{other}.") for other in found)}
    return outermost or {model.config.model_type: model}


def _sees_later_tokens(module: nn.Module, call: _Call) -> bool:
    """Whether another last token changes what the module makes of those before it."""
    from transformers import Cache

    # a cache would hold the tokens of the first call in the second
    args = [None if isinstance(x, Cache) else x for x in call.args]
    kwargs = {key: x for key, x in call.kwargs.items() if not isinstance(x, Cache)}
    name = next((name for name in ("hidden_states", "input_ids") if name in kwargs), None)
    tokens: Any = kwargs[name] if name else args[0]
    other = tokens.clone()
    other[:, -1] = tokens[:, -1].roll(1, -1) if tokens.is_floating_point() else 1
    after = module(*args, **kwargs | {name: other}) if name else module(other, *args[1:], **kwargs)
    before = call.states[:, :-1].float()
    moved = (before - _states(after)[:, :-1].float()).norm(dim=-1)
    # relative to each token: some tokens of pretrained models are thousands of times longer than others
    return bool((moved > 1e-6 * before.norm(dim=-1)).any())


def _states(output: Any) -> Tensor:
    if hasattr(output, "last_hidden_state"):
        return output.last_hidden_state
    return output[0] if isinstance(output, tuple) else output
