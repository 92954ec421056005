"""DeepSpeed behind one narrow door: forward, backward in chunks, step, and the weights as fp32 shards.

What differs between ZeRO stages stays in this file and `trainers/shards.py`; written against DeepSpeed 0.19.
"""

from __future__ import annotations

import importlib
import logging
import math
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data_services.schema import RunError, UsageError
from trainers.collectives import engine_gradient_scale
from trainers.config import EngineConfig, OptimizerConfig
from trainers.device import agree, choose_precision, prepare_device
from trainers.optimization import learning_rate, parameter_groups
from trainers.reduction import Reduction, choose_reduction
from trainers.shards import Shard, Sharding, flat_shards, partitioned_shards, replicated_shards

# Elements of one reduction. A bucket is allocated whole, so a small model gets a small one (`_settings`).
BUCKET_ELEMENTS = 200_000_000
# ZeRO-3 beside a frozen base: the share of the model's elements that may stay gathered, see `_keep_gathered`.
GATHERED_SHARE = 0.05


@dataclass(frozen=True)
class StepInfo:
    """grad_norm  norm of dL/dw over all workers, before clipping
    lr         the learning rate of this step
    taken      False where the gradient wasn't finite and nothing was updated, on all workers alike
    """

    grad_norm: float
    lr: float
    taken: bool


def initialize(model: nn.Module, settings: dict[str, Any], optimizer: torch.optim.Optimizer | None = None) -> Any:
    """`deepspeed.initialize`, quiet, and without compiling anything that training doesn't use."""
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", "0")
    # DeepSpeed's autotuner, which nothing here uses, takes MLflow along where it is installed: 2 s.
    with _not_to_be_had("mlflow"):
        import deepspeed
        from deepspeed.runtime import compiler

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", r".*Please use `torch\.distributed\.\w+_single`", FutureWarning)
    # An all-reduce in shared memory that only inference uses: 36 s of compilation.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # ZeRO imports its Muon optimizer to see that ours isn't one, and with it torch's compiler: 5 s.
    decorator, compiler.compile = compiler.compile, lambda *_, **__: lambda function: function
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        compiler.compile = decorator
    _let_groups_time_out()
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    return engine


def _let_groups_time_out() -> None:
    """DeepSpeed talks over a copy of the default group, which would wait half an hour whatever that group's limit."""
    from deepspeed.utils import groups

    if groups._WORLD_GROUP is None and dist.get_world_size() > 1:
        default = dist.distributed_c10d._get_default_group()
        groups._WORLD_GROUP = dist.new_group(timeout=default._get_backend(default._device_types[0]).options._timeout)


@contextmanager
def _not_to_be_had(module: str) -> Iterator[None]:
    """Inside, importing `module` raises ImportError, unless it is imported already."""
    hidden = module not in sys.modules
    if hidden:
        sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if hidden:
            del sys.modules[module]


class Engine:
    """A model sharded over the workers of the default process group, and its AdamW.

    The weights start as rank 0's. The masters start from the model as it was given, not from its rounding to
    bf16. `offload: cpu` keeps masters and moments in host memory.

    Raises UsageError for offload at ZeRO-0, which has nothing to offload to a worker's share, and for a reduction
    that the stage can't do, see `choose_reduction`. `config` is then what was chosen, without an `auto`.
    """

    def __init__(
        self,
        model: nn.Module,
        config: EngineConfig,
        optimizer: OptimizerConfig,
        total_steps: int,
        device: torch.device | str | None = None,
    ) -> None:
        if config.offload != "none" and config.zero_stage == 0:
            raise UsageError("engine.offload: cpu needs engine.zero_stage of 1, 2 or 3; it is 0")
        self.optimizer, self.total_steps = optimizer, total_steps
        self.device = prepare_device(device, config.deterministic)
        if not dist.is_initialized():
            dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
        elements = sum(p.numel() for p in model.parameters() if p.requires_grad)
        chosen = {
            "precision": choose_precision(config.precision, self.device),
            "reduction": choose_reduction(config, elements),
        }
        self.config = config = config.model_copy(update=chosen)
        self.global_steps = 0
        agree(model, self.device)
        self.names: dict[Any, str] = {p: name for name, p in model.named_parameters()}
        trained = {name: (p.shape, p.data) for p, name in self.names.items() if p.requires_grad}
        groups = parameter_groups(model, optimizer)
        lr = learning_rate(optimizer, 0, total_steps)  # set anew at every step
        self._adamw = torch.optim.AdamW(groups, lr=lr, betas=optimizer.betas, eps=optimizer.eps, fused=True)
        self._deepspeed = initialize(model, self._settings(elements), self._adamw)
        self.module: Any = model
        if config.zero_stage == 3 and len(trained) < len(self.names):
            self._keep_gathered()
        self.sharding = Sharding(
            {name: shape for name, (shape, _) in trained.items()},
            self._find_shards(),
            owner=config.zero_stage > 0 or dist.get_rank() == 0,
        )
        self._fill_masters({name: weight for name, (_, weight) in trained.items()})
        self._kept = list(self._buffers().values())
        self._before = [buffer.clone() for buffer in self._kept]
        masters = [shard.master for shard in self.shards]
        self._reduction = Reduction(self._deepspeed, config, self._trainable(), masters)

    @property
    def shards(self) -> list[Shard]:
        """This worker's fp32 master weights; the optimizer updates them in place."""
        return self.sharding.shards

    @property
    def compute_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.config.precision == "bf16" else torch.float32

    def _settings(self, elements: int) -> dict[str, Any]:
        stage = self.config.zero_stage
        zero: dict[str, Any] = {"stage": stage}
        settings: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
        settings["bf16"] = {"enabled": self.config.precision == "bf16"}
        # DeepSpeed's default is 1.0, not off. At ZeRO-0 `step` clips: there the norm would be of rounded gradients.
        settings["gradient_clipping"] = self.optimizer.clip_norm if stage else 0.0
        settings["zero_allow_untested_optimizer"] = True
        settings["communication_data_type"] = "fp32"
        settings["managed_gradient_accumulation"] = self.config.reduction == "once"
        if stage:
            zero["reduce_bucket_size"] = min(elements, BUCKET_ELEMENTS)
        if stage in (1, 2):
            # Reduced once, there is no backward left to overlap with; never staged in a bf16 buffer.
            zero |= {"overlap_comm": False, "contiguous_gradients": False}
        if stage in (2, 3):
            settings["data_types"] = {"grad_accum_dtype": "fp32"}
        if self.config.offload == "cpu":
            zero["offload_optimizer"] = {"device": "cpu"}
            # DeepSpeed's own CPU Adam is compiled on first use, and slower than torch's fused one.
            settings["zero_force_ds_cpu_optimizer"] = False
        return settings

    def _find_shards(self) -> list[Shard]:
        zero, rank = self._deepspeed.optimizer, dist.get_rank()
        if self.config.zero_stage == 3:
            return partitioned_shards(self.names, zero, rank)
        if self.config.zero_stage:
            return flat_shards(self.names, zero, rank)
        return replicated_shards(self.names, dict(self._replicas()))

    def _replicas(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """ZeRO-0: each parameter and its fp32 master, which in fp32 is the parameter itself."""
        if self.config.precision == "fp32":
            return ((p, p) for p in self._trainable())
        zero = self._deepspeed.optimizer
        return (
            pair
            for half, full in zip(zero.fp16_groups, zero.fp32_groups, strict=True)
            for pair in zip(half, full, strict=True)
        )

    def _trainable(self) -> list[Any]:
        return [p for p in self.names if p.requires_grad]

    def _keep_gathered(self) -> None:
        """ZeRO-3: lets the smallest trained parameters stay gathered between uses.

        An adapter is hundreds of small matrices, and a collective for each makes a step four to five times slower.
        """
        kept = self._deepspeed.optimizer.persistent_parameters
        left = GATHERED_SHARE * sum(p.ds_numel for p in self.names)
        for p in sorted(self._trainable(), key=lambda p: p.ds_numel):
            left -= p.ds_numel
            if left >= 0 and not p.ds_persist:
                p.ds_persist = True
                kept.append(p)

    @torch.no_grad()
    def gather_afresh(self) -> None:
        """ZeRO-3: no gathered copy of a trained parameter outlives this call, but of those that stay gathered.

        DeepSpeed keeps what it will use again soon, and gathers ahead; whoever puts other weights under the
        parameters for a while (the momentum encoder) calls this before and after. Collective.
        """
        if self.config.zero_stage != 3:
            return
        self._deepspeed.optimizer.parameter_offload.get_param_coordinator()._clean_inflight_param_registry()
        released = [p for p in self._trainable() if not p.ds_persist and p.ds_status.name == "AVAILABLE"]
        for p in released:
            p.partition()
        missing = [p for p in self._trainable() if p.ds_persist and p.ds_status.name != "AVAILABLE"]
        if missing:
            missing[0].all_gather(missing)

    @torch.no_grad()
    def _fill_masters(self, weights: Mapping[str, Tensor]) -> None:
        """Masters from the unrounded weights, and moments of zero, which AdamW would make at its first step."""
        for shard in self.shards:
            if self.config.precision == "bf16":
                for piece in shard.pieces:
                    part = weights[piece.name].view(-1)[piece.start : piece.start + piece.length]
                    shard.tensor[piece.offset : piece.offset + piece.length].copy_(part)
            self._adamw.state[shard.master] = {
                "step": torch.zeros((), dtype=torch.float32, device=shard.master.device),
                "exp_avg": torch.zeros_like(shard.master),
                "exp_avg_sq": torch.zeros_like(shard.master),
            }

    def train(self) -> None:
        """Begins a step: what its forwards do to buffers is undone if it isn't taken."""
        self._deepspeed.train()
        self._before = [buffer.clone() for buffer in self._kept]

    def eval(self) -> None:
        self._deepspeed.eval()

    def forward(self, **inputs: Any) -> Any:
        """The model's forward, with parameters gathered as the stage needs. Collective at ZeRO-3."""
        return self._deepspeed(**inputs)

    def backward(self, outputs: Sequence[Tensor], gradients: Sequence[Tensor], last: bool) -> None:
        """Adds one backward pass to the step's gradients, in fp32; at `last` they are reduced over the workers.

        outputs    of one or more forwards, backpropagated in one pass
        gradients  dL/doutput of the global loss, shapes of `outputs`; averaging over workers is undone here

        Collective: the same number of calls on every worker. Whole gradients (4 bytes a parameter) stay on every
        worker until `last`, unless `engine.reduction` is per_chunk.
        """
        if len(outputs) != len(gradients) or not outputs:
            raise ValueError(f"{len(outputs)} outputs and {len(gradients)} gradients: give as many, at least one")
        scale = engine_gradient_scale(dist.get_world_size())
        products = [(h * (g * scale)).sum() for h, g in zip(outputs, gradients, strict=True)]
        self._reduction.backward(torch.stack(products).sum(), last)

    def step(self) -> StepInfo:
        """One AdamW step, or none: where the gradient isn't finite everything stays as it was."""
        assert not self._reduction.open, "step() before the backward pass that is `last`"
        lr = learning_rate(self.optimizer, self.global_steps, self.total_steps)
        for group in self._adamw.param_groups:
            group["lr"] = lr * group["lr_share"]
        if self.config.zero_stage == 0:
            limit = self.optimizer.clip_norm or math.inf
            grad_norm = float(torch.nn.utils.clip_grad_norm_(self._trainable(), limit))
            if math.isfinite(grad_norm):
                self._deepspeed.step()
        else:
            self._deepspeed.step()  # skips the update by itself where the norm isn't finite
            grad_norm = float(self._deepspeed.get_global_grad_norm())
        taken = math.isfinite(grad_norm)
        if taken:
            self.global_steps += 1
        else:
            self._undo()
        return StepInfo(grad_norm, lr, taken)

    @torch.no_grad()
    def _undo(self) -> None:
        """What a step that isn't taken has left: gradients, and what its forwards did to buffers."""
        for p in self._trainable():
            p.grad = None
        for buffer, before in zip(self._kept, self._before, strict=True):
            buffer.copy_(before)

    def replicas(self) -> dict[str, Tensor]:
        """What every worker should hold alike, by name: at ZeRO 0 to 2 the weights it computes with, at ZeRO-3 those
        of them that stay gathered; at ZeRO-0 masters and moments too. Buffers are each worker's own."""
        partitioned = self.config.zero_stage == 3
        held = {name: p for p, name in self.names.items() if not partitioned or p.ds_persist}
        if self.config.zero_stage == 0:
            for kind, tensors in self._kinds().items():
                held |= {f"{kind}.{i}": tensor for i, tensor in enumerate(tensors)}
        return held

    @torch.no_grad()
    def publish(self) -> None:
        """Casts the master shards into the compute weights of every worker. Collective."""
        zero = self._deepspeed.optimizer
        if self.config.zero_stage == 3:
            zero._partition_all_parameters()
            for group in range(len(zero.fp16_groups)):
                zero._reassign_or_swap_out_partitioned_parameters(group)
            if zero.persistent_parameters:  # small ones that stay gathered between forwards
                zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
        elif self.config.zero_stage:
            zero.update_lp_params()
        elif self.config.precision == "bf16":
            for p, master in self._replicas():
                p.copy_(master)

    def _moments(self, kind: str) -> list[Tensor]:
        return [self._adamw.state[shard.master][kind] for shard in self.shards]

    def _kinds(self) -> dict[str, list[Tensor]]:
        return {
            "weight": [shard.tensor for shard in self.shards],
            "exp_avg": self._moments("exp_avg"),
            "exp_avg_sq": self._moments("exp_avg_sq"),
        }

    def state(self) -> dict[str, Tensor]:
        """This worker's share of masters and moments (`weight/`, `exp_avg/`, `exp_avg_sq/` + parameter name, 1-D
        fp32), the `layout` they were cut by, `global_steps` done and the persistent buffers (`buffer/` + name);
        on the CPU. Frozen parameters are not in it: they are what the model was built with."""
        state = {"layout": self.sharding.layout(), "global_steps": torch.tensor(self.global_steps)}
        state |= {f"buffer/{name}": b.detach().to("cpu", copy=True) for name, b in self._buffers().items()}
        for kind, tensors in self._kinds().items():
            state |= self.sharding.save(kind, tensors)
        return state

    def restore(self, states: Sequence[Mapping[str, Tensor]]) -> None:
        """Takes up the states of all workers of an earlier run, in rank order; any number, any ZeRO stage.

        Bit-exact at the same number of workers. A mapping that reads lazily is asked only for what overlaps this
        worker's shards. Collective. Raises RunError where the states are of another model.
        """
        with torch.no_grad():
            for kind, tensors in self._kinds().items():
                self.sharding.load(kind, tensors, states)
            for step in self._moments("step"):
                step.copy_(states[0]["global_steps"])
            for name, buffer in self._buffers().items():
                if f"buffer/{name}" not in states[0]:
                    raise RunError(f"the checkpoint lacks buffer {name}: resume with the model it was made with")
                buffer.copy_(states[0][f"buffer/{name}"])
        self.global_steps = int(states[0]["global_steps"])
        self.publish()

    def full_weights(self) -> dict[str, Tensor]:
        """Masters, frozen parameters and persistent buffers by name on the CPU of rank 0, {} elsewhere. Collective.

        Parameters are fp32; frozen ones have the precision they are computed in.
        """
        return self.with_constants(self.sharding.gather([shard.tensor for shard in self.shards], self.device))

    def with_constants(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Adds to gathered trainable weights what training doesn't change. Collective at ZeRO-3."""
        from deepspeed.runtime.zero import GatheredParameters

        for p, name in self.names.items():
            if not p.requires_grad:
                with GatheredParameters([p]):
                    if dist.get_rank() == 0:
                        weights[name] = p.detach().float().cpu()
        if dist.get_rank() == 0:
            weights |= {name: b.detach().to("cpu", copy=True) for name, b in self._buffers().items()}
        return weights

    def _buffers(self) -> dict[str, Tensor]:
        """The persistent ones."""
        kept = self.module.state_dict().keys()
        return {name: buffer for name, buffer in self.module.named_buffers() if name in kept}
