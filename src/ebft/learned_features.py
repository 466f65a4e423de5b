"""An experimental feature map that learns: a classifier's hidden layer, trained to tell references from rollouts.

psi = tanh(W phi + b) / sqrt(H), with phi of a frozen network. A training step uses the psi that the steps before it
left, so that its gradient is that of a loss with fixed features; then the classifier takes a step of its own. Its
loss, a cross-entropy, is bounded below, unlike a feature-matching loss that features are trained to raise.
Shape letters: B rows, K blocks, N rollouts, D features of phi, H of psi.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import TrainerCallback

from .blocks import BlockLayout
from .features import where_valid
from .moving_average import FILE, saved_network

SIZE = 64  # H
SMOOTHING = 0.1  # of the labels: a classifier that is always right keeps finite weights


class Classifier(nn.Module):
    """The probability that features phi [..., D] are of a reference, as logits [...].

    Args:
        num_features: D.
        seed: Of its first weights, such that features of length 1 give values of about 1 before the tanh.
        dtype: Of its weights.
    """

    def __init__(self, num_features: int, seed: int, dtype: torch.dtype):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.hidden = nn.Linear(num_features, SIZE, dtype=dtype)
            self.logit = nn.Linear(SIZE, 1, dtype=dtype)
            nn.init.normal_(self.hidden.weight)

    def features(self, phi: Tensor) -> Tensor:
        """Psi [..., H], of length 1 at most."""
        with torch.autocast(phi.device.type, enabled=False):  # kernels would take bfloat16's rounding for features
            return self.hidden(phi).tanh() / math.sqrt(SIZE)

    def forward(self, phi: Tensor) -> Tensor:
        """Logits [...]."""
        return self.logit(self.hidden(phi).tanh()).squeeze(-1)


def classification(reference: Tensor, generated: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and accuracy in each group, references and rollouts counting half each.

    Args:
        reference: Logits [...].
        generated: Logits [..., N].

    Returns:
        [...] each: cross-entropy with smoothed labels, in nats, and the share that is told apart.
    """
    real = binary_cross_entropy_with_logits(reference, torch.full_like(reference, 1 - SMOOTHING), reduction="none")
    made = binary_cross_entropy_with_logits(generated, torch.full_like(generated, SMOOTHING), reduction="none")
    right = (reference > 0).double() + (generated < 0).double().mean(-1)
    return (real + made.mean(-1)) / 2, right / 2


class LearnedFeatures:
    """Feature map psi, in the place of the `FeatureNetwork` (or its like) that it reads.

    Args:
        network: phi, frozen.
        num_features: D.
        seed: Of the classifier's first weights.
    """

    def __init__(self, network: Any, num_features: int, seed: int):
        self.network = network
        dtype = torch.promote_types(next(network.decoder.parameters()).dtype, torch.float32)
        self.classifier = Classifier(num_features, seed, dtype)
        self.observe: Callable[[Tensor, Tensor, Tensor], None] | None = None  # sees phi of every group in training

        # What a run tells and stores of its network, moves to its device and counts.
        self.model, self.decoder, self.layer_indices = network.model, network.decoder, network.layer_indices
        self.pooling, self.norm, self.reduction = network.pooling, network.norm, network.reduction

    def size(self, completion_length: int) -> int:
        """H, whatever the length."""
        return SIZE

    @torch.no_grad()
    def __call__(
        self, input_ids: Tensor, tokens: Tensor, layout: BlockLayout, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Features [B, K, N, H] and [B, K, H]; arguments, features per token, and zeros as in `FeatureNetwork`."""
        generated, reference = self.network(input_ids, tokens, layout, lengths)
        valid = layout.expand(len(input_ids))[1].to(reference.device)
        if self.observe is not None:
            self.observe(generated, reference, valid)
        # A matrix product may round equal rows differently, which whitening would blow up.
        first = (generated[..., :, None, :] == generated[..., None, :, :]).all(-1).int().argmax(-1)
        psi = self.classifier.features(generated)
        psi = psi.gather(-2, first[..., None].expand_as(psi))
        return where_valid(psi, valid), where_valid(self.classifier.features(reference), valid)

    @torch.no_grad()
    def references(self, input_ids: Tensor, layout: BlockLayout) -> Tensor:
        """Features of the reference blocks alone, [B, K, H], or [B, K, G, H] per token."""
        valid = layout.expand(len(input_ids))[1]
        reference = self.network.references(input_ids, layout)
        return where_valid(self.classifier.features(reference), valid.to(reference.device))


class ClassifierSteps(TrainerCallback):
    """Trains the classifier, by Adam: one step after each optimiser step, on all groups of that step.

    Args:
        features: Whose classifier.
        learning_rate: Of Adam.
        record: Takes sums for the metrics, by name.
        sum_over_ranks: The sum over ranks of each rank's vector, on the CPU.
    """

    def __init__(self, features: LearnedFeatures, learning_rate: float, record: Callable, sum_over_ranks: Callable):
        self.features, self.classifier = features, features.classifier
        self.record, self.sum_over_ranks = record, sum_over_ranks
        self.optimizer = torch.optim.Adam(self.classifier.parameters(), lr=learning_rate)
        self.groups = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Learn from the groups of this step; from those of evaluations nothing is learned."""
        self.features.observe = self._observe
        self.groups = 0.0
        for parameter in self.classifier.parameters():
            parameter.grad = torch.zeros_like(parameter)

    @torch.enable_grad()
    def _observe(self, generated: Tensor, reference: Tensor, valid: Tensor) -> None:
        with torch.autocast(generated.device.type, enabled=False):
            loss, right = classification(self.classifier(reference[valid]), self.classifier(generated[valid]))
            loss.sum().backward()
        count = torch.tensor(float(loss.numel()))
        self.groups += float(count)
        self.record({"feature_classifier/loss": loss, "feature_classifier/accuracy": right, "classified": count})

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step down the mean loss of all ranks' groups; they had better all come by."""
        self.features.observe = None
        parameters = list(self.classifier.parameters())
        gradients = [p.grad.flatten().double() for p in parameters if p.grad is not None]
        total = self.sum_over_ranks(torch.cat([*gradients, gradients[0].new_tensor([self.groups])]))
        if total[-1] == 0:
            return
        means = (total[:-1] / total[-1]).split([parameter.numel() for parameter in parameters])
        for parameter, gradient in zip(parameters, means, strict=True):
            parameter.grad = gradient.view_as(parameter).to(parameter)
        self.optimizer.step()

    def save(self, folder: str | Path) -> None:
        """Write the classifier and its optimiser's state into a checkpoint."""
        state = dict(self.classifier.state_dict())
        for name, parameter in self.classifier.named_parameters():
            state |= {f"{name}.{key}": value for key, value in self.optimizer.state[parameter].items()}
        save_file(state, Path(folder) / FILE)

    def load(self, folder: str | Path) -> None:
        """Take them from a checkpoint.

        Raises:
            ValueError: It has none.
        """
        state = saved_network(folder)
        self.classifier.load_state_dict({name: state[name] for name in self.classifier.state_dict()})
        for name, parameter in self.classifier.named_parameters():
            if f"{name}.step" not in state:
                continue  # there was no group to learn from yet
            moments = {key: state[f"{name}.{key}"].to(parameter.device) for key in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[parameter] = moments | {"step": state[f"{name}.step"]}  # which Adam keeps on the CPU
