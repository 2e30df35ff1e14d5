"""A student and all that learns beside it: the losses of one step, and how near it has come to its teachers."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from headwise.distill.beside import Beside, joined, parted
from headwise.distill.caching import batches_of
from headwise.distill.capture import capture
from headwise.distill.lesson import Lesson
from headwise.distill.lora import add_lora
from headwise.distill.losses import logit_kd
from headwise.distill.matching import Matching, Seen
from headwise.distill.measure import measure
from headwise.distill.recipes import SIGNALS, Layerwise, Stage, has_updates, layerwise_loss, staged_schedule, stages_of
from headwise.distill.router import Router, mixture_loss
from headwise.errors import TrainingError
from headwise.io.pretrained import load
from headwise.io.tensors import fill_module
from headwise.train.guards import all_finite
from headwise.train.objective import IGNORED, Example
from headwise.train.parts import evaluate_examples
from headwise.train.trainer import Source, Trainer

if TYPE_CHECKING:
    from torch import Tensor

    from headwise.data import Batch
    from headwise.distill.job import DistillJob
    from headwise.io.checkpoint import Checkpoint
    from headwise.train.evaluation import EvalResult


ATTENTION_MAPS = ("wq", "wk", "wv", "wo")  # that low-rank updates are added to


class DistillTrainer(Trainer):
    """Training's trainer, with teachers."""

    job: DistillJob

    def __init__(self, job: DistillJob) -> None:
        super().__init__(job)
        self.objective = self.lesson
        self.stages = stages_of(job.settings)
        self.schedule = staged_schedule(job.settings, self.stages)
        self._try_stages()
        self.now: dict[str, Tensor] = {}  # each loss of this update
        self.sums: dict[str, tuple[Tensor, int]] = {}  # since the last record, and of how many updates
        self.measured: dict[str, Any] = {}
        self.last_shares: Tensor | None = None

    def make_trained(self) -> nn.Module:
        job, settings = self.job, self.job.settings
        if job.start is not None:  # who resumes has the weights of a checkpoint instead
            self.model.load_state_dict(load(job.start, dtype=torch.float32).state_dict())
        if has_updates(settings):
            held = {name.rpartition(".")[2] for name, _ in self.model.named_modules()}
            rank, maps = settings.lora_rank, sorted(held.intersection(ATTENTION_MAPS))
            add_lora(self.model, rank, 2.0 * rank, maps)
            self.model.requires_grad_(True)
        with torch.random.fork_rng(devices=[]):  # whatever is drawn here, the student's dropout stays the same
            self.matchings = [self._matching(n) for n in range(len(job.teachers))]
        others: dict[str, nn.Module] = {"aligner": nn.ModuleList(self.matchings)}
        self.router = None
        if settings.teacher_weights == "router":
            self.router = others["router"] = Router(job.spec.dims.d_model, len(job.teachers))
        self.beside = nn.ModuleDict(others).to(job.device)
        self.of_student = frozenset[str]().union(*(matching.of_student for matching in self.matchings))
        return Beside(self.model, **self.beside)

    @torch.no_grad()
    def _matching(self, n: int) -> Matching:
        """With teacher `n`; its layer map may go by what the two make of the first batch."""
        job, settings = self.job, self.job.settings
        made = Matching(job.teachers[n].spec, job.spec, settings)
        if settings.layer_map != "cka" or not made.measured:
            return made
        part = self.lesson(self.make_batches().batch(0)).to(job.device)
        with capture(self.model.eval(), made.measured) as student:
            self.model(part.ids_BT, last=True)
        self.model.train()
        similarity_ST = made.similarity(student, self.look(n, part, made.measured, kept=False))
        return Matching(job.teachers[n].spec, job.spec, settings, similarity_ST)

    def make_batches(self) -> Source:
        return batches_of(self.job)

    def lesson(self, batch: Batch, step: int = 0) -> Lesson:
        """The objective: the batch as it comes."""
        return Lesson.of(batch, self.job.dataset.parts)

    # ---- one step ----

    @property
    def stage(self) -> Stage:
        """The recipe's stage of the next update; of the last one when all is done."""
        return next((stage for stage in self.stages if self.at.step < stage.last), self.stages[-1])

    def update(self) -> None:
        if len(self.stages) > 1:
            self.stage.free(self.model)
        self.now = {}
        super().update()
        for name, loss in self.now.items():
            total, count = self.sums.get(name, (torch.zeros_like(loss), 0))
            self.sums[name] = (total + loss, count + 1)

    def before_step(self) -> None:
        """What learns beside the student is clipped apart: its gradients must not decide how far the student goes, or
        ways to project would differ in the student's learning rate too."""
        beside = [parameter for parameter in self.beside.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(beside, self.job.settings.clip or math.inf).item()
        if not all_finite(norm) and not self.scaler.is_enabled():
            raise TrainingError(
                f"step {self.at.step + 1}: the norm of the projector's gradients is {norm:g}. Stopped before the "
                "update; a lower lr, a longer warmup or --lr-multipliers aligner=0.1 may help"
            )

    @torch.no_grad()
    def _try_stages(self) -> None:
        """Two tokens through every loss between layers, so that layers which cannot be compared are refused at once."""
        ids_BT = torch.zeros(1, 2, dtype=torch.int64, device=self.job.device)
        part = Lesson(ids_BT, ids_BT, lengths_B=torch.full((1,), 2, device=self.job.device))
        for stage in self.stages:
            if stage.layerwise is not None:
                self.between_layers(stage.layerwise, part)

    def between_layers(self, kind: Layerwise, part: Lesson) -> Tensor:
        """The loss of a stage that goes layer by layer."""
        seen = self.look(0, part, SIGNALS[kind])
        return layerwise_loss(kind, self.model, self.job.teachers[0].model, seen.signals, seen.mask_BT)

    def part_loss(self, part: Example, count: int, n_parts: int) -> tuple[Tensor, Tensor]:
        assert isinstance(part, Lesson)
        kind, weights = self.stage.layerwise, self.weights
        found = self.losses(part) if kind is None else {kind: self.between_layers(kind, part)}
        losses = {name: loss / (count if name == "task" else n_parts) for name, loss in found.items()}
        total = torch.stack([weights.get(name, 1.0) * loss for name, loss in losses.items()]).sum()
        for name, loss in losses.items():
            self.now[name] = self.now.get(name, 0) + loss.detach()
        aux = self.model.aux_loss() if kind is None else None
        return total.detach(), total if aux is None else total + aux / n_parts

    @property
    def weights(self) -> Mapping[str, float]:
        """What each loss is multiplied by, where it is not 1."""
        settings = self.job.settings
        kv, logits = settings.lambda_kv, settings.logit_kd[1] if settings.logit_kd else 0.0
        others = {"struct": settings.lambda_struct, "hidden": settings.hidden, "logits": logits}
        return {"task": settings.lambda_task, "k": kv, "v": kv, "output": kv, **others}

    def losses(self, part: Lesson) -> dict[str, Tensor]:
        """The losses by name, 0-d: `task` is the sum over the targets, the others are means over tokens.

        Of several teachers each loss is the mean by their weights, which of a router differ from row to row.
        """
        with capture(self.model, self.of_student) as student:
            logits_BTV = self.model(part.ids_BT)
        targets_BT, settings = part.targets_BT, self.job.settings
        flat = (logits_BTV.flatten(0, 1), targets_BT.flatten())
        losses = {"task": F.cross_entropy(*flat, ignore_index=IGNORED, reduction="sum")}
        seen = [self.look(n, part, matching.of_teacher) for n, matching in enumerate(self.matchings)]
        pairs = [each.pairs(student, one, each.of_student) for each, one in zip(self.matchings, seen)]
        words = []
        if settings.logit_kd is not None or self.router is not None:
            n_words = min(self.job.spec.dims.vocab_size, *(t.spec.dims.vocab_size for t in self.job.teachers))
            words = [t.logits(one.signals["final"])[..., :n_words] for t, one in zip(self.job.teachers, seen)]
        for rows, shares_N in self.shares(part):
            for n, matching in enumerate(self.matchings):
                found = matching.losses(
                    {k: (s[rows], t[rows]) for k, (s, t) in pairs[n].items()}, seen[n].mask_BT[rows]
                )
                if settings.logit_kd is not None:
                    own = (logits_BTV[rows, :, :n_words], words[n][rows], targets_BT[rows] != IGNORED)
                    found["logits"] = logit_kd(*own, settings.logit_kd[0])
                for name, loss in found.items():
                    losses[name] = losses.get(name, 0) + shares_N[n] * loss
        if self.router is not None:
            losses["router"] = mixture_loss(self.routed(part), words, targets_BT)
        return losses

    def shares(self, part: Lesson) -> list[tuple[slice, Sequence[float | Tensor]]]:
        """How much of each teacher goes into the loss, for all rows alike or row by row."""
        if self.router is None:
            return [(slice(None), self.job.shares)]
        shares_BN = self.routed(part).detach()
        self.last_shares = shares_BN.mean(0)
        return [(slice(row, row + 1), list(shares_N / len(shares_BN))) for row, shares_N in enumerate(shares_BN)]

    def routed(self, part: Lesson) -> Tensor:
        """The router's shares, [B,N]."""
        assert self.router is not None
        assert part.prompt_BT is not None
        return self.router(self.model.embedding(part.ids_BT), part.prompt_BT)

    def look(self, n: int, part: Lesson, wanted: Collection[str], split: str = "train", *, kept: bool = True) -> Seen:
        """What teacher `n` makes of these windows of a split; of the training split's it may have kept that."""
        teacher, ids_BT, lengths_B, mask_BT = self.job.teachers[n], part.ids_BT, part.lengths_B, part.mask_BT
        segments = None
        assert lengths_B is not None
        if (own := teacher.windows.get(split)) is not None:
            assert part.rows_B is not None
            read = own.batch(part.rows_B.cpu().numpy())
            ids_BT, lengths_B = read.ids, read.lengths
            segments = (read.segments.to(mask_BT.device), read.student_segments.to(mask_BT.device))
            mask_BT = segments[1] >= 0
        signals = teacher.signals(ids_BT, lengths_B, wanted, part.rows_B if split == "train" and kept else None)
        return Seen(signals, teacher.encodings(ids_BT.shape[1]), mask_BT, segments)

    def checked_loss(self, part: Example) -> Tensor:
        assert isinstance(part, Lesson)
        kind = self.stage.layerwise
        found = self.losses(part).values() if kind is None else [self.between_layers(kind, part)]
        return torch.stack(list(found)).sum()

    # ---- evaluation, records and checkpoints ----

    def evaluate(self) -> EvalResult:
        """The student alone over the whole validation split, by part; and how near it has come to its teachers."""
        settings, data = self.job.settings, self.job.dataset
        result = evaluate_examples(
            self.model, data.val, seq_len=settings.seq_len, loss_on=settings.loss_on, dtype=settings.dtype
        )
        self.at.val_step, self.at.val_nats, self.at.val_bits = self.at.step, result.nats, result.bits_per_byte
        self.measured = {"val_loss_by_part": result.by_part, **measure(self)}
        return result

    def take_record(self) -> dict[str, Any]:
        values = super().take_record()
        values |= {f"loss_{name}": total.item() / count for name, (total, count) in self.sums.items()}
        self.sums = {}
        if self.last_shares is not None:
            values["teacher_shares"] = self.last_shares.tolist()
        if self.at.val_step == self.at.step:
            values |= self.measured
        return values

    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """As training's; the optimiser's file also has what learns beside the student."""
        _, others = super().tensors()
        model, beside = parted(self.model, self.beside)
        return model, others | beside

    def numbers(self) -> dict[str, Any]:
        sums = {name: [total.item(), count] for name, (total, count) in self.sums.items()}
        return {**super().numbers(), "sums": sums, "measured": self.measured}

    def restore(self, checkpoint: Checkpoint) -> None:
        plain, beside = joined(checkpoint)
        super().restore(plain)
        fill_module(self.beside, beside, checkpoint.path)
        state = checkpoint.state
        device = self.job.device
        self.sums = {name: (torch.tensor(total, device=device), n) for name, (total, n) in state["sums"].items()}
        self.measured = state["measured"]
