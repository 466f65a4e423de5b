"""Folders as `ebft train` and `ebft compare` write them, made up: for the tests of the report, and to look at it.

PYTHONPATH=src python tests/report_folders.py FOLDER    # a comparison in FOLDER/comparison, a run in FOLDER/run
"""

import itertools
import json
import math
import random
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

METHODS = {"sft": "learning_rate=0.0001", "rlvr": "learning_rate=0.00001", "ebft": "learning_rate=0.0001"}
OTHER = "learning_rate=0.001"  # of ebft; not selected
SEEDS = (0, 1, 2)
STEPS = (10, 20, 30, 40)
LENGTHS = (1, 2, 4, 8, 16, 32, 64)
SOLVED = "problems/greedy/pass@1"
SAMPLED = "problems/sampled/pass@4"
TESTS = ("test", "out_of_distribution")
P_VALUE = 0.0142

HOSTILE = (
    "</script><script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 2'>",
    "\"quotes\" 'and' `ticks` & &amp; <!-- <script> -->",
    "bell\x07 escape\x1b[31m null\x00 return\r next\x85",
    "separators \u2028 and \u2029, turned \u202egnihtyna\u202c, joined \U0001f469\u200d\U0001f4bb",
    "x" * 5000,
)


def make_run(folder: Path, *, seed=0, steps=12, contexts=6, generations=4, length=8, texts=(), settings=None) -> Path:
    """A run that logged every step and saved the rollouts of every third."""
    noise = random.Random(seed)
    (folder / "rollouts").mkdir(parents=True)
    resolved = {"model_name_or_path": "some/model", "dataset_name": "some.jsonl", "output_dir": str(folder)}
    resolved |= {"max_steps": steps, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "seed": seed}
    resolved |= {"rl_coef": 1.0, "ce_coef": 0.03, "num_generations": generations} | (settings or {})
    (folder / "resolved_config.yaml").write_text(yaml.safe_dump(resolved, sort_keys=False))
    for step in range(1, steps + 1):
        _append(folder / "metrics.jsonl", {"step": step, **_metrics(step, noise)})
        _append(folder / "timing.jsonl", {"step": step, "step_time": 2.0 + seed, "tokens_per_second": 3000 + step})
        if step % 4 == 0:
            evaluated = {"eval_ce_loss/answer": 4 / step**0.1, "eval_feature_matching_loss": 0.9 - 0.01 * step}
            _append(folder / "metrics.jsonl", {"step": step, **evaluated})
        if step % 3 == 0 and contexts:
            rows = rollout_rows(step, noise, contexts, generations, length, texts)
            pq.write_table(pa.Table.from_pylist(rows), folder / "rollouts" / f"step_{step:06d}.parquet")
    _append(folder / "timing.jsonl", {"step": steps, "train_runtime": 30.0, "train_loss": 0.2})
    return folder


def _metrics(step: int, noise: random.Random) -> dict:
    names = ["rewards/alignment/mean", "rewards/diversity/mean", "reward_std", "entropy", "policy_loss"]
    names += ["rewards/alignment_unwhitened/mean", "rewards/diversity_unwhitened/mean"]
    out = {name: noise.gauss(1, 0.1) for name in names}
    shares = {"frac_reward_zero_std": 0.0, "completions/duplicate_rate": 0.01 * noise.random()}
    return out | shares | {"loss": 0.2, "ce_loss": 4.5 / step**0.1, "feature_matching_loss": 0.9 - 0.01 * step}


def rollout_rows(step, noise, contexts, generations, length, texts=()) -> list[dict]:
    """Rows as in `experience.rollout_rows`; `texts` take turns as contexts, references and completions."""
    words = [" the", " fox", " jumps", "\n    ", "return", " x", "(", ")", " lazy", "dog."]
    rows = []
    for context in range(contexts):
        line = texts[context % len(texts)] if texts else None
        written = line or "".join(noise.choices(words, k=40))
        for rollout in range(generations):
            tokens = noise.choices(words, k=length)
            if line is not None:
                tokens[0] = line
            log_probs = [-noise.expovariate(0.6) for _ in tokens]
            advantage = noise.gauss(0, 1)
            row = {"step": step, "document_id": context // 4, "block": 8 * (context % 4), "context": written}
            row |= {"reference": line or " over", "feature_matching_loss": 0.1 + noise.random(), "rollout": rollout}
            row |= {"completion": "".join(tokens), "token_ids": list(range(length)), "token_texts": tokens}
            row |= {"token_log_probs": log_probs, "log_prob": math.fsum(log_probs), "advantage": advantage}
            row |= {"alignment": noise.random(), "diversity": noise.random(), "reward": noise.random()}
            rows.append(row)
    return rows


def make_comparison(folder: Path) -> Path:
    """A comparison of three methods and the base model with three seeds; one cell has failed."""
    noise = random.Random(0)
    folder.mkdir(parents=True)
    (folder / "compare.yaml").write_text(yaml.safe_dump({"methods": list(METHODS), "seeds": list(SEEDS)}))
    rows = _rows("base", "", 0, noise, (0,), selected=True)
    for method, setting in [*METHODS.items(), ("ebft", OTHER)]:
        for seed in SEEDS:
            name = f"{method}-{setting.split('=')[1]}-{seed}"
            cell = {"method": method, "setting": setting, "seed": seed, "status": "done", "error": None}
            if setting == OTHER and seed == 2:
                cell |= {"status": "failed", "error": "loss=nan at step 7: lower learning_rate"}
            elif setting != OTHER or seed == 0:
                rows += _rows(method, setting, seed, noise, STEPS, selected=setting != OTHER)
            contexts = 6 if method == "ebft" else 0
            rate = {"learning_rate": float(setting.split("=")[1])}
            make_run(folder / "cells" / name, seed=seed, contexts=contexts, settings=rate)
            (folder / "cells" / name / "cell.json").write_text(json.dumps(cell))
    pq.write_table(pa.Table.from_pylist(rows), folder / "results.parquet")
    pq.write_table(pa.Table.from_pylist(_pairs(noise)), folder / "paired.parquet")
    return folder


def _pairs(noise) -> list[dict]:
    """Of each test split, what `ebft compare` says of two methods: of measures of a corpus as a whole, no p-value."""
    rows = []
    for split, (one, other) in itertools.product(TESTS, itertools.combinations(("base", *METHODS), 2)):
        for measure, length, p_value in (
            (SOLVED, None, P_VALUE),
            ("feature_matching_loss", 8, 1e-4),
            ("BLEU", None, None),
        ):
            mean = noise.gauss(0, 0.1)
            about = {"split": split, "model": f"{other} - {one}", "measure": measure, "length": length, "mean": mean}
            rows.append(about | {"low": mean - 0.1, "high": mean + 0.1, "units": len(SEEDS), "p_value": p_value})
    return rows


def _rows(method, setting, seed, noise, steps, selected) -> list[dict]:
    """Validation at every step, the tests at the last; better with training, EBFT's a little more."""
    gain = {"base": 0, "sft": 1.0, "rlvr": 0.8, "ebft": 1.3}[method]
    rows = []
    for step, split in [*((step, "validation") for step in steps), *((steps[-1], split) for split in TESTS)]:
        done = gain * (1 - math.exp(-step / 15))
        values = {("cross_entropy/answer", None): 4 - 0.4 * done, ("cross_entropy/all", None): 4.2 - 0.3 * done}
        values |= {(SOLVED, None): 0.3 + 0.1 * done, (SAMPLED, None): 0.5 + 0.1 * done}
        values |= {("feature_matching_loss", n): 0.6 + 0.04 * math.log2(n) - 0.05 * done for n in LENGTHS}
        place = {"split": split, "step": step, "documents": 8 * step, "train_seconds": 2.5 * step}
        part = steps.index(step) + (method != "base")
        about = {"method": method, "setting": setting, "seed": seed, "part": part, "selected": selected, "units": 88}
        for (measure, length), value in values.items():
            mean = value + noise.gauss(0, 0.01)
            ends = {"low": mean - 0.02, "high": mean + 0.02}
            rows.append({**about, **place, "measure": measure, "length": length, "mean": mean, **ends})
    return rows


def _append(path: Path, record: dict) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    make_comparison(Path(sys.argv[1]) / "comparison")
    make_run(Path(sys.argv[1]) / "run")
