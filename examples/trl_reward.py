"""The feature-matching reward in TRL's own RLOOTrainer: `python examples/trl_reward.py MODEL FILE STEPS`.

MODEL is a Hub name or a folder (Qwen/Qwen2.5-0.5B), FILE holds one {"prompt": ..., "completion": ...} per line. The
trained model ends up in runs/trl_reward. For GRPOTrainer, its config and what the settings mean: docs/trl.md.
"""

import sys

import torch
from transformers import AutoTokenizer
from trl import RLOOConfig, RLOOTrainer

from ebft.data import load_documents
from ebft.integrations.trl import FeatureMatchingReward

model, file, steps = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(model)
args = RLOOConfig(
    output_dir="runs/trl_reward",
    use_cpu=not torch.cuda.is_available(),
    per_device_train_batch_size=16,  # completions, of 4 prompts
    num_generations=4,
    max_completion_length=32,
    temperature=0.6,
    beta=0.0,
    max_steps=int(steps),
    logging_steps=1,
)
trainer = RLOOTrainer(
    model=model,
    reward_funcs=FeatureMatchingReward(model, args, tokenizer),
    args=args,
    # TRL keeps a column named `completion` from reward functions.
    train_dataset=load_documents(file).rename_column("completion", "reference"),
    processing_class=tokenizer,
)
trainer.train()
trainer.save_model()
