"""Energy-Based Fine-Tuning (EBFT, arXiv 2603.12248) of a language model in one file: the whole method, slow and plain.

Cross-entropy (CE) asks how likely the data's next token is. EBFT asks whether what the model *writes* looks like what
stands in the data. It draws N short rollouts after many prefixes of a document, embeds them and the document's own
continuation with a frozen copy phi of the pretrained model, and moves the rollouts' mean feature towards the data's:

    minimise  L_FM = E_c || E_{yhat ~ model(.|c)} phi(c : yhat)  -  E_{y ~ data(.|c)} phi(c : y) ||^2           (eq 1)

Only one continuation y of a context c is ever observed. With phi(c : y) in place of the inner mean of the data, L_FM
becomes L_CFM (eq 2), which is larger by a constant (the variance of the data) and has the same gradient. REINFORCE
follows that gradient: `rewards` gives each rollout a reward, `advantages` takes a baseline off, `ebft_loss` weighs
log-probabilities with the result and adds some CE. No reward model, no verifier, no labels: any text will do.

Read from the top down. A batch is a loop over documents, so no function below has a batch dimension; a KV cache,
padding, packing and a KL term are left out, for they change the cost or are off in the paper. Shape letters:

    P document tokens   K blocks   N rollouts of a block   G tokens of a rollout   D features   V vocabulary
    T = P + K * N * G packed tokens: the document, then all rollouts in the order (block, rollout, token)

Run it (two CPU cores, about a minute, nothing is downloaded):  python examples/ebft_in_one_file.py
"""

import copy
import dataclasses
import math
import pathlib
import sysconfig

import torch
import torch.nn.functional as F
from transformers import Qwen2Config, Qwen2ForCausalLM


@dataclasses.dataclass(frozen=True)
class Config:
    """The paper's settings, but for the last two, which suit the tiny model of `main` (paper: 1e-6 and 16)."""

    context_length: int = 8  # c: the shortest prefix of a block
    stride: int = 8  # s: distance of neighbouring blocks
    completion_length: int = 8  # G
    num_generations: int = 4  # N
    temperature: float = 0.6  # of the rollouts and of their log-probs; CE is at temperature 1
    feature_layers: tuple[float, ...] = (0.25, 0.5, 0.75)  # depths of the hidden states that make up phi
    whitening: str = "paper"  # or "none": then the policy gradient is exactly that of L_CFM
    alignment_coef: float = 1.0
    diversity_coef: float = 1.0  # alpha; below 1 seeks modes
    rl_coef: float = 1.0  # 0: plain CE training
    ce_coef: float = 0.03  # gamma
    learning_rate: float = 1e-4
    documents_per_step: int = 8


def block_anchors(P: int, c: int, s: int, G: int) -> torch.Tensor:
    """a_k = c + k s for k < K = floor((P - G - c) / s) + 1. Returns [K], empty where the document is too short.

    Block k sees the whole prefix document[: a_k]; what it is compared with is the reference document[a_k : a_k + G].
    """
    return torch.arange(c, max(c, P - G + 1), s)


def block_mask(P: int, anchors: torch.Tensor, n: int, G: int) -> torch.Tensor:
    """Who (row) may attend to whom (column), [T, T] bool: the document is causal, rollouts see prefix and themselves.

    This makes one forward pass over T tokens exactly equal to K * N causal passes over prefix + rollout.
    """
    rollout = torch.arange(len(anchors) * n).repeat_interleave(G)  # which rollout a generated token belongs to
    step = torch.arange(G).repeat(len(anchors) * n)  # and the place it has there
    mask = torch.zeros(P + len(rollout), P + len(rollout), dtype=torch.bool)
    mask[:P, :P] = torch.ones(P, P, dtype=torch.bool).tril()
    mask[P:, :P] = torch.arange(P) < anchors.repeat_interleave(n * G)[:, None]
    mask[P:, P:] = (rollout[:, None] == rollout) & (step[:, None] >= step)
    return mask


def block_positions(P: int, anchors: torch.Tensor, n: int, G: int) -> torch.Tensor:
    """Position ids [T]: 0 .. P-1 for the document, a_k + t for token t of a rollout of block k."""
    generated = anchors[:, None, None] + torch.arange(G).expand(len(anchors), n, G)
    return torch.cat([torch.arange(P), generated.flatten()])


def predictors(P: int, anchors: torch.Tensor, n: int, G: int) -> torch.Tensor:
    """Where in the packed sequence the logits of each generated token are, [K, N, G].

    The first token of a rollout is predicted by the last token of its prefix, document position a_k - 1, and every
    other one by its predecessor in the rollout. (Shifting the packed sequence by one would get the first one wrong.)
    """
    K = len(anchors)
    place = P + torch.arange(K * n * G).view(K, n, G)
    return torch.cat([(anchors - 1)[:, None, None].expand(K, n, 1), place[..., :-1]], dim=-1)


def packed_forward(model, document: torch.Tensor, tokens: torch.Tensor, anchors: torch.Tensor, **kwargs):
    """One forward pass over document [P] and rollouts [K, N, G]. The model needs attn_implementation="sdpa".

    ("eager" *adds* its mask to the scores: a boolean one would be silently wrong there.)
    """
    P, (_, n, G) = len(document), tokens.shape
    packed = torch.cat([document, tokens.flatten()])[None]
    mask, positions = block_mask(P, anchors, n, G)[None, None], block_positions(P, anchors, n, G)[None]
    return model(packed, attention_mask=mask, position_ids=positions, use_cache=False, **kwargs)


@torch.no_grad()
def sample(model, document: torch.Tensor, anchors: torch.Tensor, uniforms: torch.Tensor, temperature: float):
    """Draws yhat ~ p_theta(. | document[: a_k]) at `temperature`, all blocks and rollouts at once: tokens [K, N, G].

    `uniforms` [K, N, G] holds the noise: a token is the first one whose cumulative probability exceeds its uniform.
    Simple and slow: G full passes, without a KV cache. Tokens not yet drawn are 0; nobody who counts attends to them.
    """
    _, n, G = uniforms.shape
    tokens = torch.zeros(uniforms.shape, dtype=torch.long)
    where = predictors(len(document), anchors, n, G)
    for t in range(G):
        logits = packed_forward(model, document, tokens, anchors).logits[0, where[..., t]]  # [K, N, V]
        cumulative = (logits.double() / temperature).softmax(-1).cumsum(-1)
        drawn = (cumulative <= uniforms[..., t : t + 1]).sum(-1)
        tokens[..., t] = drawn.clamp(max=logits.shape[-1] - 1)  # all probabilities may add up to a little below 1
    return tokens


def log_probs(model, document: torch.Tensor, tokens: torch.Tensor, anchors: torch.Tensor, temperature: float):
    """Returns log p(document[i] | document[: i]), i >= 1, [P-1], and log p of each generated token, [K, N, G].

    Rollouts were drawn at `temperature`, so their log-probs are taken there; the document's are at temperature 1.
    """
    P, (_, n, G) = len(document), tokens.shape
    logits = packed_forward(model, document, tokens, anchors).logits[0]  # [T, V]
    of_document = logits[: P - 1].log_softmax(-1).gather(-1, document[1:, None])[..., 0]
    of_blocks = (logits[predictors(P, anchors, n, G)] / temperature).log_softmax(-1).gather(-1, tokens[..., None])
    return of_document, of_blocks[..., 0]


@torch.no_grad()
def features(model, document: torch.Tensor, tokens: torch.Tensor, anchors: torch.Tensor, layers=(0.25, 0.5, 0.75)):
    """phi: hidden states at three depths of a frozen model, concatenated, one L2 norm, at the last token of a block.

    Returns phi(c : yhat) of the rollouts, [K, N, D], and phi(c : y) of the references, [K, D]. A reference stands in
    the document and has its whole prefix in view there: the same pass reads it, at no extra cost.
    """
    P, (K, n, G) = len(document), tokens.shape
    hidden = packed_forward(model, document, tokens, anchors, output_hidden_states=True).hidden_states
    taps = [max(1, math.floor(depth * model.config.num_hidden_layers)) for depth in layers]  # hidden[0]: embeddings
    phi = F.normalize(torch.cat([hidden[tap][0] for tap in taps], dim=-1), dim=-1)  # [T, D]
    generated, reference = phi[P:].view(K, n, G, phi.shape[-1])[:, :, -1], phi[anchors + G - 1]
    # Equal rollouts must have bit-identical features, or whitening blows their rounding noise up into a direction of
    # its own: everyone takes the row of the first rollout with the same tokens.
    first = (tokens[:, :, None] == tokens[:, None]).all(-1).int().argmax(-1)  # [K, N]
    return generated.gather(1, first[..., None].expand_as(generated)), reference


def gram(generated: torch.Tensor, reference: torch.Tensor):
    """phi_j . phi_j' [K, N, N], phi_j . phi_y [K, N] and phi_y . phi_y [K], in float64: rewards need nothing else."""
    x, y = generated.double(), reference.double()
    return x @ x.mT, (x @ y[..., None])[..., 0], (y * y).sum(-1)


def whiten(dots: torch.Tensor, cross: torch.Tensor):
    """phi~ = (Sigma^+)^(1/2) phi with Sigma = X^T X / N (eq 8-9): dots phi~_j . phi~_j' (eq 49), cos(phi~_j, phi~_y).

    X [N, D] are the rollouts' features. Nothing of size D x D is needed: with M = X X^T, g = X phi_y and the projector
    Q = M M^+ (Q_jj = 1 unless rollouts depend on each other linearly), the dots are N Q and the cosine is
    (M^+ g)_j / (sqrt(Q_jj) |M^+ g|). Distinct rollouts come out orthogonal: diversity then only punishes duplicates.
    """
    values, vectors = torch.linalg.eigh(dots)
    keep = values > 1e-10 * values[..., -1:]  # singular values of X above 1e-5 of the largest
    inverse = torch.where(keep, 1 / values, 0.0)
    solution = (vectors * inverse[..., None, :]) @ (vectors.mT @ cross[..., None])  # M^+ g
    projector = (vectors * keep[..., None, :]) @ vectors.mT
    norms = projector.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt() * solution.norm(dim=-2)
    return dots.shape[-1] * projector, solution[..., 0] / norms.clamp(min=1e-30)


def rewards(generated, reference, whitening="paper", alignment_coef=1.0, diversity_coef=1.0):
    """r_j = 2 phi_j . phi_y - 2/(N-1) sum_{j' != j} phi_j . phi_j' (eq 6-7): its two terms, weighted, each [K, N].

    Alignment draws a rollout to the reference, diversity (to be subtracted) pushes it away from the other rollouts.
    """
    dots, cross, _ = gram(generated, reference)
    if whitening == "paper":
        dots, cross = whiten(dots, cross)
    others = dots.sum(-1) - dots.diagonal(dim1=-2, dim2=-1)
    return alignment_coef * 2 * cross, diversity_coef * 2 / (dots.shape[-1] - 1) * others


def advantages(alignment: torch.Tensor, diversity: torch.Tensor) -> torch.Tensor:
    """r_j - b_j, [K, N]; b_j = mean over i != j of sample i's reward recomputed *without* sample j (App. E, eq 94).

    b_j does not depend on sample j, so the gradient stays unbiased. (The mean of the other rewards as they are would
    depend on it, through their diversity terms.) No division by a standard deviation.
    """
    n = alignment.shape[-1]
    baseline = (alignment.sum(-1, keepdim=True) - alignment) / (n - 1)
    if n > 2:  # of two rollouts, the one that remains has nobody to differ from
        baseline = baseline - (diversity.sum(-1, keepdim=True) - 2 * diversity) / (n - 2)
    return alignment - diversity - baseline


def feature_matching_loss(generated: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Unbiased estimate of L_CFM (eq 2), never whitened, [K]: pairs of *different* rollouts stand in for |mean|^2.

    (|mean of the N features - phi_y|^2 is larger by the rollouts' variance / N: it would favour less diverse models.)
    """
    dots, cross, square = gram(generated, reference)
    n = dots.shape[-1]
    pairs = dots.sum((-2, -1)) - dots.diagonal(dim1=-2, dim2=-1).sum(-1)
    return pairs / (n * (n - 1)) - 2 * cross.mean(-1) + square


def draw_uniforms(document: torch.Tensor, config: Config, generator: torch.Generator) -> torch.Tensor:
    """All the noise that one document's rollouts need: [K, N, G], K = 0 where nothing is to be sampled."""
    G = config.completion_length
    K = len(block_anchors(len(document), config.context_length, config.stride, G)) if config.rl_coef else 0
    return torch.rand(K, config.num_generations, G, generator=generator, dtype=torch.float64)


def ebft_loss(policy, feature_model, documents: list[torch.Tensor], uniforms: list[torch.Tensor], config: Config):
    """rl_coef * sum(-A log p) / (G N sum K) + ce_coef * CE over one step's documents (each [P]), and its metrics.

    Every token of a rollout gets the rollout's advantage A; both denominators are those of the whole step. On average
    the first term's gradient is that of L_CFM / G (whitening "none", weights 1). One update per batch of rollouts.
    """
    block_tokens = max(1, sum(noise.numel() for noise in uniforms))
    document_tokens = max(1, sum(len(document) - 1 for document in documents))
    c, s, G = config.context_length, config.stride, config.completion_length
    policy_loss, ce_loss, reward, fm_loss = torch.zeros(()), torch.zeros(()), [], []
    for document, noise in zip(documents, uniforms, strict=True):
        anchors = block_anchors(len(document), c, s, G)[: len(noise)]
        tokens, advantage = torch.zeros_like(noise).long(), torch.zeros(noise.shape[:2])
        if len(anchors) > 0:  # a document too short for a block still counts in CE
            tokens = sample(policy, document, anchors, noise, config.temperature)
            phi, phi_y = features(feature_model, document, tokens, anchors, config.feature_layers)
            terms = rewards(phi, phi_y, config.whitening, config.alignment_coef, config.diversity_coef)
            advantage = advantages(*terms)
            reward += (terms[0] - terms[1]).mean(-1).tolist()
            fm_loss += feature_matching_loss(phi, phi_y).tolist()
        of_document, of_blocks = log_probs(policy, document, tokens, anchors, config.temperature)
        policy_loss = policy_loss - (advantage[..., None] * of_blocks).sum() / block_tokens
        ce_loss = ce_loss - of_document.sum() / document_tokens
    means = {"ce": ce_loss.item(), "fm_loss": torch.tensor(fm_loss).mean(), "reward": torch.tensor(reward).mean()}
    return config.rl_coef * policy_loss + config.ce_coef * ce_loss, means


def train(policy, feature_model, documents, config: Config, steps: int, after_step=lambda step: None):
    """AdamW (.9, .95), no weight decay, constant rate after 3 % warm-up, gradient norm clipped at 1."""
    policy.eval()  # dropout would make the update's log-probs differ from those the rollouts were drawn with
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1.0, (i + 1) / math.ceil(0.03 * steps)))
    generator = torch.Generator().manual_seed(1)
    for step in range(1, steps + 1):
        chosen = torch.randperm(len(documents), generator=generator)[: config.documents_per_step]
        batch = [documents[i] for i in chosen.tolist()]
        noise = [draw_uniforms(document, config, generator) for document in batch]
        loss, _ = ebft_loss(policy, feature_model, batch, noise, config)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        after_step(step)


def read_documents(names: list[str], length: int) -> list[torch.Tensor]:
    """Python's own source code as bytes, 256 at the end of a file, cut into documents of `length` tokens."""
    folder = pathlib.Path(sysconfig.get_path("stdlib"))
    files = [torch.tensor([*(folder / name).read_bytes(), 256]) for name in names]
    return [document for file in files for document in file.split(length) if len(document) > 1]


def main(pretraining_steps: int = 250, steps: int = 20, report_every: int = 5):
    """Pretrains a tiny byte-level model with CE, freezes a copy as phi, goes on with EBFT, and prints what happens."""
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attn_implementation": "sdpa"}
    sizes = {"vocab_size": 257, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4}
    policy = Qwen2ForCausalLM(Qwen2Config(**sizes, **heads, tie_word_embeddings=True, initializer_range=0.1))
    names = ["argparse.py", "inspect.py", "typing.py", "subprocess.py", "tarfile.py", "threading.py"]
    print(f"Pretraining on Python's standard library: {pretraining_steps} steps of cross-entropy.", flush=True)
    only_ce = Config(rl_coef=0.0, ce_coef=1.0, learning_rate=3e-3, documents_per_step=4)
    train(policy, None, read_documents(names, 256), only_ce, pretraining_steps)
    feature_model = copy.deepcopy(policy).requires_grad_(False)

    config, generator = Config(), torch.Generator().manual_seed(2)
    held_out = read_documents(["shutil.py"], 128)[::40]
    noise = [draw_uniforms(document, config, generator) for document in held_out]  # the same in every row

    @torch.no_grad()
    def report(step: int):
        if step % report_every == 0:
            _, row = ebft_loss(policy, feature_model, held_out, noise, config)
            print(f"{step:>5} {row['ce']:>8.4f} {row['fm_loss']:>22.4f} {row['reward']:>8.4f}", flush=True)

    print("EBFT, measured on a held-out file. (A whitened reward is relative to its group: no measure of progress.)")
    print(f"{'step':>5} {'CE':>8} {'feature-matching loss':>22} {'reward':>8}")
    report(0)
    train(policy, feature_model, read_documents(names, 128), config, steps, report)


if __name__ == "__main__":
    main()
