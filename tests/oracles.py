"""Slow, obvious versions of what the library computes fast; every fast path is compared with one of these."""

import itertools
import math
from collections import Counter
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

# --------------------------------------------------------------------------------------------------------------------
# Rewards, one context at a time, in feature space (D dimensions), numpy float64.
# --------------------------------------------------------------------------------------------------------------------


def inverse_root(matrix: np.ndarray, rtol: float = 1e-10) -> np.ndarray:
    """(matrix^+)^{1/2} of a symmetric positive semi-definite matrix; rtol is relative to the largest eigenvalue."""
    values, vectors = np.linalg.eigh(matrix)
    kept = values > rtol * values.max()
    return (vectors[:, kept] / np.sqrt(values[kept])) @ vectors[:, kept].T


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / norms) if norms > 1e-12 else 0.0


def whitened_features(X: np.ndarray, y: np.ndarray, whitening: str) -> tuple[np.ndarray, np.ndarray]:
    """Rollouts X [n, D] and reference y [D] whitened: on the D features (paper), on the n samples (released)."""
    if whitening == "paper":  # eq 8-9
        root = inverse_root(X.T @ X / len(X))
        return X @ root, root @ y
    if whitening == "released":
        U, S, Vt = np.linalg.svd(X, full_matrices=False)
        kept = S / S.max() > 1e-5
        return U[:, kept] @ Vt[kept], y
    return X, y


def rewards(
    X: np.ndarray, y: np.ndarray, whitening: str = "none", alignment: str | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Alignment [n] and diversity [n] of one context, eq 6-7, factor 2 included."""
    n = len(X)
    X, y = whitened_features(X, y, whitening)
    use_cosine = whitening != "none" or alignment == "cosine"
    aligned = [2 * (cosine(x, y) if use_cosine else x @ y) for x in X]
    diverse = [2 / max(n - 1, 1) * sum(X[j] @ X[i] for i in range(n) if i != j) for j in range(n)]
    return np.array(aligned), np.array(diverse)


def leave_one_out_advantage(X: np.ndarray, y: np.ndarray, alignment_coef: float, diversity_coef: float) -> np.ndarray:
    """Advantage [n], eq 94 word for word: the rewards of the others computed again without sample j. Unwhitened."""
    aligned, diverse = rewards(X, y)
    advantages = []
    for j in range(len(X)):
        others_aligned, others_diverse = rewards(np.delete(X, j, axis=0), y)
        baseline = np.mean(alignment_coef * others_aligned - diversity_coef * others_diverse)
        advantages.append(alignment_coef * aligned[j] - diversity_coef * diverse[j] - baseline)
    return np.array(advantages)


def u_statistic(X: np.ndarray, y: np.ndarray) -> float:
    """Unbiased conditional feature-matching loss: the mean of (x_i - y) . (x_j - y) over ordered pairs i != j."""
    return float(np.mean([(a - y) @ (b - y) for a, b in itertools.permutations(X, 2)]))


# --------------------------------------------------------------------------------------------------------------------
# Kernels: two vectors (or two rows of token ids) at a time, in plain Python.
# --------------------------------------------------------------------------------------------------------------------


def kernel_value(x, y, name: str, bandwidths=(), frequencies=None, sizes=()) -> float:
    """k(x, y) of features x, y [D], or of token ids [G] for ngram; frequencies [D, M]."""
    x, y = (v.tolist() for v in (x, y))
    if name == "ngram":
        total = 0.0
        for m in sizes:
            counts = [Counter(tuple(v[i : i + m]) for i in range(len(v) - m + 1)) for v in (x, y)]
            windows = math.sqrt(max(1, len(x) - m + 1) * max(1, len(y) - m + 1))
            total += sum(counts[0][gram] * counts[1][gram] for gram in counts[0]) / windows
        return total / len(sizes)
    if name == "linear":
        return sum(a * b for a, b in zip(x, y, strict=True))
    difference = [a - b for a, b in zip(x, y, strict=True)]
    if name == "characteristic":
        angles = [sum(w * d for w, d in zip(ws, difference, strict=True)) for ws in zip(*frequencies, strict=True)]
        return sum(map(math.cos, angles)) / len(angles)
    distance = math.sqrt(sum(d * d for d in difference))
    if name == "energy":
        return -distance
    return sum(math.exp(-(distance**2) / (2 * s**2)) for s in bandwidths) / len(bandwidths)


def kernel_matrix(X, kernel: Callable) -> np.ndarray:
    """K between all of X, [n, n]."""
    return np.array([[kernel(a, b) for b in X] for a in X])


def kernel_rewards(X, y, kernel: Callable) -> tuple[np.ndarray, np.ndarray]:
    """Alignment [n] and diversity [n] of one context, factor 2 included."""
    n = len(X)
    aligned = [2 * kernel(x, y) for x in X]
    diverse = [2 / max(n - 1, 1) * sum(kernel(X[j], X[i]) for i in range(n) if i != j) for j in range(n)]
    return np.array(aligned), np.array(diverse)


def mmd_u_statistic(X, y, kernel: Callable) -> float:
    """Unbiased squared MMD to the point mass at y: mean over pairs of k(a, b) - k(a, y) - k(b, y) + k(y, y)."""
    pairs = itertools.permutations(X, 2)
    return float(np.mean([kernel(a, b) - kernel(a, y) - kernel(b, y) + kernel(y, y) for a, b in pairs]))


# --------------------------------------------------------------------------------------------------------------------
# Exact gradients: completions and groups enumerated.
# --------------------------------------------------------------------------------------------------------------------


def completions(vocab: int, length: int) -> Tensor:
    """Every completion, [vocab ** length, length]."""
    return torch.tensor(list(itertools.product(range(vocab), repeat=length)))


def groups(num_completions: int, n: int) -> Tensor:
    """Every ordered group of n completions, as indices [num_completions ** n, n]."""
    return torch.cartesian_prod(*[torch.arange(num_completions)] * n).reshape(-1, n)


def quadratic_loss(probs: Tensor, phi: Tensor, ref: Tensor, alignment_coef: float = 1.0, diversity_coef: float = 1.0):
    """diversity_coef ||E phi||^2 - 2 alignment_coef E phi . ref + |ref|^2, differentiable in probs [C].

    With both coefficients 1 that is the feature-matching loss ||E phi - ref||^2; phi [C, D], ref [D].
    """
    mean = probs @ phi
    return diversity_coef * mean @ mean - 2 * alignment_coef * mean @ ref + ref @ ref


def mmd_loss(probs: Tensor, K: Tensor, g: Tensor, q: Tensor, alignment_coef: float = 1.0, diversity_coef: float = 1.0):
    """As `quadratic_loss`, of kernel values: K [C, C] of the completions, g [C] with the reference, q of it alone."""
    return diversity_coef * probs @ K @ probs - 2 * alignment_coef * probs @ g + q


# --------------------------------------------------------------------------------------------------------------------
# Blocks: every position of a row asked whether a block starts there.
# --------------------------------------------------------------------------------------------------------------------


def anchors(doc_ids: Tensor, stride: int, context_length: int, completion_length: int, starts=None, ends=None):
    """`(anchor, first token of its document)` of every block of one row, doc_ids [P]."""
    P, found = len(doc_ids), []
    for a in range(P):
        same = [p for p in range(P) if doc_ids[p] == doc_ids[a] and doc_ids[a] >= 0]  # the tokens of a's document
        reference = range(a, a + completion_length)
        if not same or a - same[0] < context_length or reference[-1] not in same:
            continue
        if starts is None:
            first = same[0] + context_length
        else:
            first = max([p for p in same if starts[p] and p <= a], default=None)  # where a's completion starts
            if first is None or any(starts[p] for p in reference[1:]):
                continue
            if ends is not None and any(ends[p] for p in range(first, reference[-1])):
                continue
        if (a - first) % stride == 0:
            found.append((a, same[0]))
    return found


# --------------------------------------------------------------------------------------------------------------------
# Log-probs, attention and features: one anchor and one rollout at a time, no packing and no cache.
# --------------------------------------------------------------------------------------------------------------------


def blocks_of(layout, batch_size: int) -> list[tuple[int, int, int, int]]:
    """`(row, block, first token of its document, anchor)` of every valid block."""
    anchor, valid, start = layout.expand(batch_size)
    return [(b, k, int(start[b, k]), int(anchor[b, k])) for b, k in valid.nonzero().tolist()]


def block_logits(model, input_ids: Tensor, tokens: Tensor, layout) -> Tensor:
    """The logits [B, K, N, G, V] that predict each rollout's tokens, each from a causal run on prefix + block."""
    B, K, N, G = tokens.shape
    runs = {}
    for b, k, start, anchor in blocks_of(layout, B):
        for n in range(N):
            ids = torch.cat([input_ids[b, start:anchor], tokens[b, k, n]])[None]
            runs[b, k, n] = model(ids).logits[0, anchor - start - 1 : -1]
    nothing = next(iter(runs.values())) * 0
    every = [runs.get((b, k, n), nothing) for b in range(B) for k in range(K) for n in range(N)]
    return torch.stack(every).view(B, K, N, G, -1)


def block_log_probs(model, input_ids: Tensor, tokens: Tensor, layout, temperature: float = 1.0) -> Tensor:
    """[B, K, N, G]; zero where a block is not valid."""
    log_probs = (block_logits(model, input_ids, tokens, layout).double() / temperature).log_softmax(-1)
    return log_probs.gather(-1, tokens[..., None])[..., 0] * layout.expand(len(input_ids))[1][..., None, None]


def document_log_probs(model, input_ids: Tensor, doc_ids: Tensor) -> Tensor:
    """Each document as its own causal run: [B, P-1], zero across borders and at padding."""
    B, P = input_ids.shape
    out = [[torch.zeros((), dtype=torch.float64)] * (P - 1) for _ in range(B)]
    for b in range(B):
        for doc in [d for d in doc_ids[b].unique().tolist() if d >= 0]:
            where = (doc_ids[b] == doc).nonzero()[:, 0].tolist()
            log_probs = model(input_ids[b, where][None]).logits[0].double().log_softmax(-1)
            for i, p in enumerate(where[1:]):
                out[b][p - 1] = log_probs[i, input_ids[b, p]]
    return torch.stack([torch.stack(row) for row in out])


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling=None, softcap=None) -> Tensor:
    """Dense softmax attention: query [B, Q, T, d], key and value [B, H, T, d], mask [B, T, T]."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return scores.masked_fill(~mask[:, None], float("-inf")).softmax(-1) @ value


def token_features(model, indices: list[int], ids: Tensor, norm: str = "joint", reduction: str = "concat") -> Tensor:
    """Per-token features [T, D] of one causal run."""
    hidden = model.base_model(ids[None], output_hidden_states=True).hidden_states
    taps = [hidden[i][0].double() for i in indices]
    if norm == "per_layer":
        taps = [tap / tap.norm(dim=-1, keepdim=True) for tap in taps]
    features = torch.cat(taps, -1) if reduction == "concat" else torch.stack(taps).sum(0) / len(taps)
    return features / features.norm(dim=-1, keepdim=True) if norm == "joint" else features


def pool(features: Tensor, pooling: str) -> Tensor:
    """[G, D] -> [D], or as it is for per-token features."""
    return {
        "last_token": lambda f: f[-1],
        "mean_pooling": lambda f: f.mean(0),
        "concat": lambda f: f.flatten(),
        "token": lambda f: f,
    }[pooling](features)
