"""One run's state and its two moves: an update of the parameters, and a checkpoint. Knows nothing of files' layout."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from headwise.errors import TrainingError
from headwise.io.tensors import fill_module, module_tensors
from headwise.model import build
from headwise.train.evaluation import EvalResult, autocast, evaluate
from headwise.train.guards import all_finite, find_culprit
from headwise.train.job import Job
from headwise.train.objective import Example, loss_sum, make_objective, training_loss
from headwise.train.optim import make_optimizer, optimizer_tensors, restore_optimizer
from headwise.train.schedules import make_schedule
from headwise.train.vein import VeinSchedule

if TYPE_CHECKING:
    from torch import Tensor, nn

    from headwise.data import Batch
    from headwise.io.checkpoint import Checkpoint


class Source(Protocol):
    """Where batches come from."""

    def batch(self, step: int) -> Batch: ...


@dataclass
class Progress:
    """How far a run is; all of it is part of a checkpoint. `since_…` counts from the last record on,
    `last_loss` is that record's loss."""

    step: int = 0
    seconds: float = 0.0
    since_loss: float = 0.0
    since_steps: int = 0
    since_seconds: float = 0.0
    last_loss: float = 0.0
    val_step: int = 0
    val_nats: float | None = None
    val_bits: float | None = None


class Trainer:
    """A model with everything that changes while it trains.

    `trained` is all that learns: the model, here nothing beside it. Training that reads other batches, trains more than
    the model or minimises more than its loss overrides `make_trained`, `make_batches`, `part_loss` and `before_step`.
    """

    def __init__(self, job: Job) -> None:
        settings = job.settings
        self.job = job
        self.model = build(job.spec, seed=settings.seed, device=job.device)
        if settings.activation_checkpointing:
            self.model.activation_checkpointing = True
        self.model.train()
        self.trained = self.make_trained()
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = make_optimizer(self.trained, settings)
        self.schedule = make_schedule(settings)
        self.veins = VeinSchedule(self.model, settings)
        self.objective = make_objective(job.spec, settings.seed)
        self.batches = self.make_batches()
        # float16's narrow exponent needs its gradients scaled; for other types the scaler does nothing at all.
        self.scaler = torch.amp.GradScaler(job.device.type, enabled=settings.dtype == "float16")
        self.training_loss = torch.compile(training_loss, dynamic=False) if settings.compile else training_loss
        self.at = Progress()
        self.last_lr, self.last_norm = 0.0, 0.0

    def make_trained(self) -> nn.Module:
        """All that learns."""
        return self.model

    def make_batches(self) -> Source:
        """What gives the batch of each step, as a pure function of it."""
        from headwise.data import Batches

        job, settings = self.job, self.job.settings
        return Batches(job.dataset.train, settings.batch_size * settings.accumulate, settings.seq_len, settings.seed)

    def part_loss(self, part: Example, count: int, n_parts: int) -> tuple[Tensor, Tensor]:
        """(the loss to report, the one to differentiate), 0-d, of one forward pass of `n_parts`: the share of the mean
        over the step's `count` targets, and with it what the model's mechanisms add."""
        loss, aux = self.training_loss(self.model, part)
        loss = loss / count
        return loss.detach(), loss if aux is None else loss + aux / n_parts

    def update(self) -> None:
        """One step: gradients of `accumulate` forward passes, checked, clipped and applied.

        The loss is the mean over all counted targets of the step, so k passes over b rows equal one over k·b.
        Raises `TrainingError` before anything changes if the loss or the gradients' norm is not finite.
        """
        began = time.perf_counter()
        settings, at = self.job.settings, self.at
        self.veins.set(at.step)
        example = self.objective(self.batches.batch(at.step), at.step)
        count = max(1, example.count())
        parts = example.to(self.job.device).split(settings.accumulate)
        total = torch.zeros((), device=self.job.device)
        for part in parts:
            with autocast(self.job.device, settings.dtype):
                reported, loss = self.part_loss(part, count, len(parts))
                total += reported
            self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        norm_0d = torch.nn.utils.get_total_norm(gradients)
        loss_value, norm = torch.stack((total, norm_0d.to(total.dtype))).tolist()  # one wait for the device, not two
        if not all_finite(loss_value, norm) and not self._scaler_can_help(loss_value):
            raise self._not_finite(loss_value, norm, parts)
        if settings.clip and norm > settings.clip and all_finite(norm):
            torch.nn.utils.clip_grads_with_norm_(self.parameters, settings.clip, norm_0d)
        self.before_step()
        self.last_lr, self.last_norm = self.schedule(at.step), norm
        for group in self.optimizer.param_groups:
            group["lr"] = self.last_lr * group["factor"]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        at.step += 1
        at.since_loss += loss_value
        at.since_steps += 1
        at.since_seconds += time.perf_counter() - began

    def before_step(self) -> None:
        """What else is done with gradients before they are applied; here nothing."""

    def _scaler_can_help(self, loss: float) -> bool:
        """Whether infinite gradients only mean that float16's scale is too high: the scaler skips such a step."""
        return self.scaler.is_enabled() and all_finite(loss) and self.scaler.get_scale() > 1.0

    def _not_finite(self, loss: float, norm: float, parts: list[Example]) -> TrainingError:
        def forward() -> Tensor:
            with autocast(self.job.device, self.job.settings.dtype):
                return torch.stack([self.checked_loss(part) for part in parts])

        where = find_culprit(self.trained, forward)
        return TrainingError(
            f"step {self.at.step + 1}: the loss is {loss:g}, the norm of the gradients {norm:g}; {where}. "
            f"Stopped before the update; a lower lr, a longer warmup or clip may help"
        )

    def checked_loss(self, part: Example) -> Tensor:
        """A loss (0-d) that runs everything which may have gone wrong in a step."""
        return loss_sum(self.model, part)

    def evaluate(self) -> EvalResult:
        """The loss over the whole validation split, remembered with its step."""
        settings = self.job.settings
        result = evaluate(
            self.model,
            self.job.dataset.val,
            objective=make_objective(self.job.spec, seed=0),
            seq_len=settings.seq_len,
            dtype=settings.dtype,
        )
        self.at.val_step, self.at.val_nats, self.at.val_bits = self.at.step, result.nats, result.bits_per_byte
        return result

    @property
    def tokens_per_step(self) -> int:
        settings = self.job.settings
        return settings.batch_size * settings.accumulate * settings.seq_len

    def take_record(self) -> dict[str, Any]:
        """What there is to tell since the last record, which this one becomes."""
        at = self.at
        at.seconds += at.since_seconds
        at.last_loss = at.since_loss / at.since_steps
        values: dict[str, Any] = {
            "step": at.step,
            "loss": at.last_loss,
            "lr": self.last_lr,
            "grad_norm": self.last_norm if all_finite(self.last_norm) else None,
            "tokens": at.step * self.tokens_per_step,
            "seconds": at.seconds,
            "tokens_per_s": at.since_steps * self.tokens_per_step / at.since_seconds,
        }
        values |= self.model.metrics()
        if at.val_step == at.step:
            values["val_loss"] = at.val_nats
            values["bits_per_byte"] = at.val_bits
        at.since_loss, at.since_steps, at.since_seconds = 0.0, 0, 0.0
        return values

    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The model's tensors, and the run's others: the optimiser's, and torch's random states as bytes."""
        others = optimizer_tensors(self.trained, self.optimizer)
        others["rng/cpu"] = torch.get_rng_state()
        if self.job.device.type == "cuda":
            others["rng/cuda"] = torch.cuda.get_rng_state(self.job.device)
        return module_tensors(self.model), others

    def numbers(self) -> dict[str, Any]:
        """The rest of the state, as JSON (which keeps every float exactly)."""
        return {"progress": vars(self.at).copy(), "scaler": self.scaler.state_dict()}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Become bit for bit what `tensors` and `numbers` described; `FormatError` if it is of another model."""
        fill_module(self.model, checkpoint.model, checkpoint.path)
        others = dict(checkpoint.optimizer)
        torch.set_rng_state(others.pop("rng/cpu"))
        cuda_state = others.pop("rng/cuda", None)
        if cuda_state is not None and self.job.device.type == "cuda":
            torch.cuda.set_rng_state(cuda_state, self.job.device)
        restore_optimizer(self.trained, self.optimizer, others)
        self.at = Progress(**checkpoint.state["progress"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(checkpoint.state["scaler"])
