"""One optimiser step of EBFT, slow and obvious: every document, block and rollout in a causal run of its own.

No packing, no padding, no cache, no Gram matrices; the gradient is autograd's, the step plain SGD. The rollouts are
given: they are those the trainer drew.
"""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

import oracles


def anchors(document: dict, args, in_completion: bool, offset: int = 0) -> list[int]:
    """Every anchor of a document: a whole reference behind it, at least `context_length` tokens before it."""
    first = document["completion_mask"].index(1) if in_completion else args.context_length
    last = len(document["input_ids"]) - args.completion_length
    return [a for a in range(first + offset, last + 1, args.stride) if a >= args.context_length]


def reference(document: dict, anchor: int, args) -> Tensor:
    """What a block's rollouts are compared with: G tokens, or the completion to the first token that ends it."""
    rest = document["input_ids"][anchor : anchor + args.rollout_length]
    if args.rollout == "completion":
        rest = rest[: next((i + 1 for i, token in enumerate(rest) if token in args.stop_token_ids), len(rest))]
    return torch.tensor(rest)


def kernel_of(record: dict) -> Callable | None:
    """k(x, y) of a run's kernel record; None for the inner product."""
    if record["name"] == "linear":
        return None
    options = {"bandwidths": [scale * record["bandwidth"] for scale in record.get("scales", ())]}
    if record["name"] == "characteristic":
        drawn = np.random.Generator(np.random.PCG64([record["seed"], 5]))
        normals = drawn.standard_normal((record["frequencies"], record["features"]))
        scales = [options["bandwidths"][m % len(record["scales"])] for m in range(record["frequencies"])]
        options["frequencies"] = normals.T / scales
    return partial(oracles.kernel_value, name=record["name"], sizes=record.get("sizes", ()), **options)


def step_loss(
    policy, initial, phi, documents: list[dict], groups: dict, args, kernel: Callable | None = None
) -> dict[str, Tensor]:
    """Loss of a whole step with its graph, and the metrics.

    Args:
        policy: The model before the step.
        initial: The model before training, for the KL.
        phi: The causal LM whose hidden states are the features.
        documents: `input_ids` and `loss_mask` of each document; its place is its id.
        groups: `(document, anchor) -> rows of rollouts/step_*.parquet`.
        args: The run's config.
        kernel: From `kernel_of`.
    """
    tokens: list[list[Tensor]] = []
    blocks: list[list[dict]] = []
    for index, document in enumerate(documents):
        ids = torch.tensor(document["input_ids"])
        log_probs = _logits(policy, ids).log_softmax(-1)
        trained = [p for p in range(1, len(ids)) if document["loss_mask"][p]]
        tokens.append([-log_probs[p - 1, ids[p]] for p in trained])
        mine = sorted(anchor for doc, anchor in groups if doc == index)
        rollouts = [[torch.tensor(row["token_ids"]) for row in groups[index, anchor]] for anchor in mine]
        references = [reference(document, anchor, args) for anchor in mine]
        each = zip(mine, references, rollouts, strict=True)
        blocks.append([_block(policy, initial, phi, ids[:a], y, t, args, kernel) for a, y, t in each])

    def of_blocks(name, mode="token"):
        return _mean([[block[name] for block in document] for document in blocks], mode)

    def objective(name):
        if args.max_blocks is None or mode == "document":
            return of_blocks(name, mode)
        # Each block that was drawn stands for as many as its document had per drawn one.
        anchors_of = [sorted(anchor for doc, anchor in groups if doc == index) for index in range(len(documents))]
        full = [
            _number_of_blocks(len(d["input_ids"]), mine, args) for d, mine in zip(documents, anchors_of, strict=True)
        ]
        means = [
            n * torch.stack([block[name] for block in mine]).mean() for n, mine in zip(full, blocks, strict=True) if n
        ]
        return torch.stack(means).sum() / sum(full)

    mode = args.loss_normalization
    metrics = {"ce_loss": _mean(tokens, mode), "policy_loss": objective("policy")}
    loss = metrics["policy_loss"] * args.rl_coef + metrics["ce_loss"] * args.ce_coef
    if args.beta and args.kl_estimator != "k1":
        loss = loss + args.rl_coef * args.beta * objective("kl_loss")
    names = ("reward", "rewards/alignment/mean", "rewards/diversity/mean", "feature_matching_loss")
    metrics |= {name: of_blocks(name) for name in (*names, *(["kl"] if args.beta else []))}
    return {"loss": loss, **metrics}


def sgd_step(model, loss: Tensor, learning_rate: float, max_norm: float = 0.0) -> dict[str, Tensor]:
    """The weights after one step, with the gradient's norm clipped unless `max_norm` is 0."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    gradients = [torch.zeros_like(p) if g is None else g for p, g in zip(trained.values(), gradients, strict=True)]
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
    scale = min(1.0, max_norm / (norm + 1e-6)) if max_norm else 1.0
    after = {name: value.clone() for name, value in model.state_dict().items()}
    for (name, parameter), gradient in zip(trained.items(), gradients, strict=True):
        new = (parameter - learning_rate * scale * gradient).detach()
        for alias in [k for k, v in model.state_dict(keep_vars=True).items() if v is parameter]:  # tied embeddings
            after[alias] = new
        assert name in after
    return after


def _number_of_blocks(length: int, drawn: list[int], args) -> int:
    """How many blocks a document without prompt had, of which some were drawn; they tell the random offset."""
    if not drawn:
        return 0
    first = args.context_length + (drawn[0] - args.context_length) % args.stride
    return len(range(first, length - args.completion_length + 1, args.stride))


def _mean(per_document: list[list[Tensor]], mode: str) -> Tensor:
    """Over everything, or over the documents that have anything of the mean of each."""
    per_document = [values for values in per_document if values]
    if not per_document:
        return torch.zeros(())
    if mode == "token":
        per_document = [[value for values in per_document for value in values]]
    return torch.stack([torch.stack(values).mean() for values in per_document]).mean()


def _block(
    policy, initial, phi, prefix: Tensor, reference: Tensor, rollouts: list[Tensor], args, kernel: Callable | None
) -> dict[str, Tensor]:
    """Loss and metrics of one block with its n rollouts, each [G] or, of completions, as long as it is."""
    n, G = len(rollouts), args.rollout_length
    log_probs = [_log_probs(policy, prefix, r, args.temperature) for r in rollouts]
    with torch.no_grad():
        X = np.stack([_features(phi, prefix, r, args) for r in rollouts], axis=1)  # [G or 1, n, D]
        y = _features(phi, prefix, reference, args)  # [G or 1, D]
    rewards = [_rewards(a, b, args, kernel) for a, b in zip(X, y, strict=True)]
    aligned, diverse = np.stack(rewards, axis=1)  # [G or 1, n] each
    per_feature = np.stack([_leave_one_out(a, b, args, kernel) for a, b in zip(X, y, strict=True)])  # [G or 1, n]
    # A token's advantage counts the features from its own on; with one feature per block that is the block's.
    advantages = [per_feature[min(t, len(X) - 1) :].sum(0) for t in range(max(map(len, rollouts)))]
    advantage = torch.from_numpy(np.stack(advantages, axis=1))  # [n, tokens]
    out = {}
    if args.beta:
        with torch.no_grad():
            before = [_log_probs(initial, prefix, r, args.temperature) for r in rollouts]
        ratio = torch.stack([(b - a).sum() for a, b in zip(log_probs, before, strict=True)])  # log ref / pi of each
        out["kl"] = -(ratio / torch.tensor([len(r) for r in rollouts])).mean()
        kl_loss = {"k1": 0 * ratio, "k2": ratio**2 / 2, "k3": ratio.exp() - 1 - ratio}[args.kl_estimator]
        out["kl_loss"] = kl_loss.sum() / (G * n)
        if args.kl_estimator == "k1":
            k1 = -ratio.detach().double()
            others = torch.stack([k1[torch.arange(n) != j].mean() for j in range(n)])
            advantage = advantage - args.beta * (k1 - others)[:, None]
    total = args.alignment_coef * aligned - args.diversity_coef * diverse
    u_statistic = oracles.u_statistic if kernel is None else partial(oracles.mmd_u_statistic, kernel=kernel)
    loss = np.mean([u_statistic(a, b) for a, b in zip(X, y, strict=True)])
    numbers = {"reward": total, "rewards/alignment/mean": aligned, "rewards/diversity/mean": diverse}
    out |= {name: torch.tensor(value.mean()) for name, value in numbers.items()}
    out |= {"feature_matching_loss": torch.tensor(loss), "advantages": advantage}
    weighed = [(a[: len(p)].to(p) * p).sum() for a, p in zip(advantage, log_probs, strict=True)]
    return out | {"policy": -torch.stack(weighed).sum() / (G * n)}


def _log_probs(model, prefix: Tensor, rollout: Tensor, temperature: float) -> Tensor:
    logits = _logits(model, torch.cat([prefix, rollout]))[len(prefix) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(-1, rollout[:, None])[:, 0]


def _logits(model, ids: Tensor) -> Tensor:
    logits = model(ids[None]).logits[0]
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _features(phi, prefix: Tensor, block: Tensor, args) -> np.ndarray:
    """Features of one block as [1, D], or [G, D] per token; its token ids [1, G] where these are matched."""
    if args.kernel == "ngram":
        return block[None].numpy()
    hidden = phi.base_model(torch.cat([prefix, block])[None], output_hidden_states=True).hidden_states
    depth = phi.config.num_hidden_layers
    taps = [hidden[max(1, math.floor(fraction * depth))][0, len(prefix) :] for fraction in (0.25, 0.5, 0.75)]
    features = torch.cat(taps, dim=-1).double()
    features = features / features.norm(dim=-1, keepdim=True)
    pooled = {"last_token": features[-1:], "mean_pooling": features.mean(0)[None], "concat": features.flatten()[None]}
    return pooled.get(args.pooling, features).numpy()


def _rewards(X: np.ndarray, y: np.ndarray, args, kernel) -> tuple[np.ndarray, np.ndarray]:
    if kernel is not None:
        return oracles.kernel_rewards(X, y, kernel)
    return oracles.rewards(X, y, args.whitening, args.alignment)


def _leave_one_out(X: np.ndarray, y: np.ndarray, args, kernel) -> np.ndarray:
    """Reward minus the mean reward of the others, computed again as if sample j had never been drawn (eq 94).

    Whitening is that of the whole group; the dots and cosines behind it are recomputed.
    """
    alignment = "cosine" if args.whitening != "none" else args.alignment
    X, y = oracles.whitened_features(X, y, args.whitening)

    def rewards(samples):
        aligned, diverse = oracles.rewards(samples, y, "none", alignment)
        if kernel is not None:
            aligned, diverse = oracles.kernel_rewards(samples, y, kernel)
        return args.alignment_coef * aligned - args.diversity_coef * diverse

    return np.array([rewards(X)[j] - rewards(np.delete(X, j, axis=0)).mean() for j in range(len(X))])
