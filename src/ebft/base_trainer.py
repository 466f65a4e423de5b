"""What every run needs, whatever it trains on: its folder, exact resume, a log per step, a stop at a broken step."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn
from transformers import ProgressCallback, Trainer

from . import pickles
from ._compat import prepare_fsdp2
from .artifacts import (
    LOCK,
    RunFolder,
    check_output_dir,
    check_resume,
    forget_start,
    settings_of,
    where_to_go_on,
)
from .blocks import BlockLayout
from .callbacks import FeatureNetworkRecord, KernelRecord, StepEnd, StepLine, checkpoint_records
from .checkpoints import check_whole, last_complete_checkpoint
from .config import EBFTConfig
from .data.fingerprint import fingerprint
from .engine_checks import check_precision
from .features import FeatureNetwork
from .finishing import train_no_further
from .forward import causal_lm
from .layouts import batch_layout
from .learned_features import ClassifierSteps, LearnedFeatures
from .memory_guard import MemoryGuard
from .metrics import means
from .model_card import write_model_card
from .moving_average import MovingAverage
from .preemption import Preemption, Stopped, spare_workers
from .recorder import StepRecorder
from .resuming import check_data, check_feature_network, check_run
from .saving import save_whole_checkpoints
from .scoring import Scorer, kernel_of, resumed_kernel
from .sharding import agreed, precision
from .speedups import speed_up

T = TypeVar("T")


class RecordedTrainer(Trainer):
    """transformers' Trainer with the run's records; what is trained is up to the subclass.

    Attributes:
        recorder: What the subclass tells of the step at hand.
        run_description: Settings outside `args` (model, data) to be written into `resolved_config.yaml`.
        feature_network_record: Name, revision and hash of the feature network, or None without one.
        kernel_record: All that makes the kernel, or None where no rollouts are scored.
        scorer: What scores rollouts, or None.
    """

    args: EBFTConfig
    model: nn.Module
    # Set by the subclass, before it calls ours.
    anchors: str
    feature_network: FeatureNetwork | None  # or what stands in for one
    reference_model: nn.Module | None

    def __init__(self, *, base_name: str | None, **kwargs):
        self.base_name = base_name
        self.recorder = StepRecorder()
        self.run_description: dict[str, Any] = {"model_name_or_path": base_name} if base_name else {}
        self.feature_network_record: dict[str, Any] | None = None
        self.network_updates: MovingAverage | ClassifierSteps | None = None
        self.kernel_record: dict[str, Any] | None = None
        self.scorer: Scorer | None = None
        networks = kwargs["model"], self.feature_network, self.reference_model
        self.memory = MemoryGuard(kwargs["args"], *networks)
        self.memory.check_weights()
        speed_up(kwargs["args"], *networks)
        super().__init__(**kwargs)
        self.output_dir = Path(str(self.args.output_dir))
        self.run_folder = RunFolder(self.output_dir, writes=self.is_world_process_zero())
        self.add_callback(StepEnd(self.save_step_rollouts))
        self.data_fingerprint: dict[str, Any] = {}  # of the training data, known when training starts
        self.preemption = Preemption(self)
        self.add_callback(self.preemption)
        save_whole_checkpoints(self, lambda: {"settings": self.settings, "data": self.data_fingerprint})
        train_no_further(self)
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(StepLine())
        check_precision(self.args, self.accelerator.mixed_precision)
        if self.is_fsdp_enabled:
            prepare_fsdp2(self.accelerator, precision(bool(self.args.bf16)))

    def create_accelerator_and_postprocess(self) -> None:
        """As in transformers, but `torch_compile` is done (`speedups`): not by accelerate, which also allows TF32."""
        backend, self.args.torch_compile_backend = self.args.torch_compile_backend, None
        super().create_accelerator_and_postprocess()
        self.args.torch_compile_backend = backend

    def lay_out_blocks(self, batches: Sequence[dict[str, Any]], step: int | None) -> list[BlockLayout]:
        """Give each micro-batch its `layout`, where weights are sharded one with a block if any process has one.

        Args:
            batches: Equally many on each process.
            step: As in `batch_layout`.

        Returns:
            The layouts.
        """
        layouts = [batch_layout(batch, self.args, self.anchors, step) for batch in batches]
        layouts = agreed(layouts, self.sum_over_ranks) if self.is_fsdp_enabled else layouts
        for batch, layout in zip(batches, layouts, strict=True):
            batch["layout"] = layout
        return layouts

    def record_feature_network(self, record: dict[str, Any]) -> None:
        """Print which feature network the run uses, and store it in every checkpoint."""
        if self.args.feature_network == "ema":  # begins as the very network that a run without it keeps
            record = record | {"ema": self.args.feature_ema_decay}
        self.feature_network_record = record
        self.add_callback(FeatureNetworkRecord(record))
        if self.is_world_process_zero():
            shown = record | {"sha256": record["sha256"][:12]}
            print("Feature network: " + ", ".join(f"{k} {v}" for k, v in shown.items() if v is not None))

    def use_kernel(self, record: dict[str, Any]) -> None:
        """Score rollouts by the kernel of this record (`scoring`), print it, and store it in every checkpoint."""
        self.scorer = Scorer(self.feature_network, kernel_of(record, self.args.device), self.args.rewarding)
        self.kernel_record = record
        if record["name"] == "linear":
            return  # as in checkpoints from before there was a choice, which transformers could not resume otherwise
        self.pop_callback(KernelRecord)
        self.add_callback(KernelRecord(record))
        if self.is_world_process_zero():
            print("Kernel: " + ", ".join(f"{k} {v}" for k, v in record.items() if k != "sha256"))

    def update_feature_network(self) -> None:
        """Let a feature network that is not frozen change after every step, and make it a part of every checkpoint."""
        args, network = self.args, cast(Any, self.feature_network)
        if isinstance(network, LearnedFeatures):
            network.classifier.to(args.device)
            rate = args.feature_classifier_learning_rate
            self.network_updates = ClassifierSteps(network, rate, self.recorder.add, self.sum_over_ranks)
        elif args.feature_network == "ema" and network is not None:
            policy = causal_lm(self.model).base_model
            self.network_updates = MovingAverage(network.decoder, policy, args.feature_ema_decay)
        if self.network_updates is not None:
            self.add_callback(self.network_updates)

    @property
    def settings(self) -> dict[str, Any]:
        """All settings of the run, as `resolved_config.yaml` has them."""
        return {**self.run_description, **settings_of(self.args)}

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """Train, writing the run's artifacts.

        Args:
            resume_from_checkpoint: A checkpoint; True or `last` for the newest whole one; `auto` for that or, where
                there is none, a new start.
            **kwargs: As in transformers.

        Raises:
            ValueError: The output folder cannot be written to or holds another run, there is nothing to resume, the
                checkpoint is damaged, or it was written with other data, settings, feature network or kernel; or
                memory ran out.
            FloatingPointError: Loss or gradient is not finite; the weights are those before the step.
            OSError: The disk is full, or a stream's file is gone.
            Stopped: SIGTERM or SIGUSR1 came, and a checkpoint is written; a SystemExit with status 143.
        """
        self.preemption.watch()
        try:
            self.on_first_process(self.run_folder.acquire)
            return self._train(self.on_first_process(lambda: self._find(resume_from_checkpoint)), kwargs)
        except Stopped:
            self.callback_handler.on_train_end(self.args, self.state, self.control)
            raise
        finally:
            self.preemption.unwatch()
            self.run_folder.release()

    def on_first_process(self, find: Callable[[], T]) -> T:
        """What `find` returns on the first process, or its ValueError, on all of them."""
        outcome: list[Any] = [None, None]
        if self.is_world_process_zero():
            try:
                outcome[0] = find()
            except ValueError as error:
                if self.accelerator.num_processes == 1:
                    raise
                outcome[1] = str(error)
        if self.accelerator.num_processes > 1:
            broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise ValueError(outcome[1])
        return outcome[0]

    def _find(self, wanted: str | bool | None) -> str | None:
        """The checkpoint to go on from, found whole; None for a new run."""
        found = last_complete_checkpoint(self.output_dir) if wanted in (True, "last", "auto") else wanted
        if wanted in (True, "last") and not found:
            raise ValueError(f"resume_from_checkpoint: output_dir='{self.output_dir}' holds no whole checkpoint.")
        if found:
            check_whole(Path(str(found)))
            return str(found)
        # An evaluation of this very model before its training belongs to the run.
        own = self.run_folder.written and self.state.global_step == 0
        if wanted == "auto" and not own:
            forget_start(self.output_dir)
        check_output_dir(self.output_dir, resuming=own)
        return None

    def _train(self, checkpoint: str | None, kwargs: dict[str, Any]):
        if not (self.output_dir / LOCK).exists():
            raise ValueError(
                f"output_dir='{self.output_dir}' is not the same folder on all machines: name one on a file system "
                "that they share."
            )
        step = None
        if checkpoint:
            step = self._check_records(checkpoint)
            check_resume(self.output_dir, checkpoint)
            self.on_first_process(lambda: check_run(Path(checkpoint), self.settings, self))
        self.data_fingerprint = self.on_first_process(lambda: self._check_data(checkpoint))
        self.accelerator.wait_for_everyone()
        self.run_folder.start(self.settings, step)
        if checkpoint:
            self.args.eval_on_start = False  # the unbroken run does not evaluate here
            if self.network_updates is not None:
                self.network_updates.load(checkpoint)
        self.memory.check_dataset(self.train_dataset, self.anchors)
        with self.memory.explained(), pickles.resuming(checkpoint):
            result = super().train(resume_from_checkpoint=checkpoint, **kwargs)
        if self.args.should_save:
            self.create_model_card()
        return result

    def _check_data(self, checkpoint: str | None) -> dict[str, Any]:
        found = fingerprint(self.train_dataset)
        if checkpoint:
            check_data(Path(checkpoint), found)
        return found

    def _check_records(self, checkpoint: str) -> int:
        network, kernel, step = checkpoint_records(checkpoint)
        check_feature_network(checkpoint, network, self.feature_network_record)
        if self.kernel_record is not None:
            kernel = resumed_kernel(kernel, self.kernel_record, self.args, checkpoint)
            if kernel != self.kernel_record:
                self.use_kernel(kernel)
        return step

    def get_train_dataloader(self):
        """As in transformers, with workers that outlive a SIGTERM until the run has stopped."""
        loader = super().get_train_dataloader()
        spare_workers(loader)
        return loader

    def get_batch_samples(self, epoch_iterator, num_batches: int, device) -> tuple[list, Any]:
        """As in transformers; where a stream's file is gone, with what became of the run.

        Raises:
            OSError: It is.
        """
        try:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        except OSError as error:
            raise OSError(
                f"train_dataset could not be read behind step {self.state.global_step} ({error}): bring it back as it "
                f"was, {where_to_go_on(self.output_dir)}."
            ) from error

    def begin_step(self, started: float) -> None:
        """A new optimiser step began at `started` (of `time.perf_counter`): forget the last one."""
        self._step_started = started
        self.recorder.reset()

    def count_tokens(self, count: int) -> None:
        """Count the document tokens of this step, over all ranks; the total is part of a checkpoint."""
        self._step_tokens = count
        self.state.num_input_tokens_seen += count

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """The sum of each rank's `values`, on the CPU."""
        if self.accelerator.num_processes == 1:
            return values
        total = self.accelerator.reduce(values.to(self.args.device), reduction="sum")
        return cast(Tensor, total).cpu()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the step's metrics to `logs`, and write them to `metrics.jsonl` as well as to every other logger."""
        if "loss" in logs and "learning_rate" in logs:
            logs |= self._step_metrics()
        super().log(logs, start_time)
        self.run_folder.log({"epoch": self.state.epoch, **logs}, self.state.global_step)

    def _step_metrics(self) -> dict[str, float]:
        names = sorted(self.recorder.sums)
        # Ranks may have recorded different things (a rank without blocks): agree on the names first.
        names = sorted(set(gather_object(names))) if self.accelerator.num_processes > 1 else names
        values = torch.stack([torch.as_tensor(self.recorder.sums[n], dtype=torch.float64).cpu() for n in names])
        sums = dict(zip(names, self.sum_over_ranks(values).tolist(), strict=True))
        out = {name: sums[name] for name in ("loss", "policy_loss", "ce_loss", "kl_loss") if name in sums} | means(
            sums
        )
        seconds = time.perf_counter() - self._step_started
        length = sums.get("completions/mean_length", sums.get("blocks", 0) * self.args.completion_length)
        tokens = self._step_tokens + length * self.args.num_generations
        out |= {"documents_without_block": sums["short"], "num_tokens": self.state.num_input_tokens_seen}
        return out | {"step_time": seconds, "tokens_per_second": tokens / seconds}

    def saves_rollouts(self, step: int) -> bool:
        """Whether the rollouts of a step, counted from 1, are written: the first's and every so many."""
        every = self.args.rollout_save_steps
        return every > 0 and (step == 1 or step % every == 0)

    def save_step_rollouts(self) -> None:
        """Write the step's rollouts, of all ranks, if this is a step whose rollouts are kept."""
        step = self.state.global_step
        if self.saves_rollouts(step):
            rows = self.recorder.rollout_rows
            rows = gather_object(rows) if self.accelerator.num_processes > 1 else rows
            self.run_folder.save_rollouts(rows, step)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch=None) -> Tensor:
        """One micro-batch forward and backward; after the step's last one, the check that all of it is finite."""
        self.memory.at_work(inputs)
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            # Before clipping, which makes a gradient of infinite norm one of zeros.
            self.check_step_is_finite()
        return loss

    def check_step_is_finite(self) -> None:
        """Stop the run before the optimiser's step, with DeepSpeed behind it, if loss or gradient is not finite.

        Raises:
            FloatingPointError: On every rank, if they are not on one; the step's inputs are in
                `output_dir/nonfinite_step_*`.
        """
        loss, norm = self.recorder.norms(self.model)
        when = "before the optimiser's step"
        if self.is_deepspeed_enabled:  # its backward pass makes the step, too
            found = cast(Any, self.model_wrapped).get_global_grad_norm() or 0.0  # None if it is told to have none
            norm, when = torch.as_tensor(found).cpu(), "behind the step"
            norm = norm.where(norm >= 0, torch.inf)  # it says -1 of a norm that is not finite
        broken = ~(torch.isfinite(norm) & torch.isfinite(loss))
        if not self.sum_over_ranks(broken.double()[None]).item():
            return
        step = self.state.global_step + 1
        folder = self.output_dir / f"nonfinite_step_{step:06d}"
        self.recorder.save_inputs(folder, self.args.process_index)
        raise FloatingPointError(
            f"Step {step} has loss {float(loss):g} and gradient norm {float(norm):g} on rank "
            f"{self.args.process_index}: stopped {when}. Its inputs are in {folder}; look there, "
            "lower learning_rate, or resume from the last checkpoint."
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in transformers, with our model card beside the weights (peft leaves an empty one)."""
        plugin: Any = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        kind = plugin and plugin.state_dict_type
        if plugin is not None and not _internal_call:
            plugin.set_state_dict_type("FULL_STATE_DICT")  # else nothing would be saved but in checkpoints
        super().save_model(output_dir, _internal_call)
        if plugin is not None:
            plugin.state_dict_type = kind
        if self.network_updates is not None and _internal_call and self.is_world_process_zero():
            self.network_updates.save(output_dir or self.output_dir)
        self._write_card(Path(output_dir or self.output_dir))

    def create_model_card(self, model_name: str | None = None, dataset_name: str | None = None, tags=None) -> None:
        """Write README.md into the output folder: base model, feature network, data, settings, last metrics."""
        hub_name = self.hub_model_id if model_name and self.args.push_to_hub else None
        self._write_card(self.output_dir, model_name, dataset_name, hub_name=hub_name, tags=tags or ())

    def _write_card(
        self, folder: Path, model_name: str | None = None, dataset_name: str | None = None, **for_the_hub
    ) -> None:
        if self.is_world_process_zero():
            write_model_card(
                folder,
                name=model_name,
                base=self.base_name,
                dataset=dataset_name or self.run_description.get("dataset_name"),
                feature_network=self.feature_network_record,
                kernel=self.kernel_record,
                history=self.state.log_history,
                settings=self.settings,
                adapter=hasattr(self.model, "peft_config"),
                **for_the_hub,
            )
