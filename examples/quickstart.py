"""EBFT of a pretrained model on your own file, in Python: `python examples/quickstart.py MODEL FILE`.

MODEL is a Hub name or a folder (Qwen/Qwen2.5-0.5B), FILE holds one document per line: {"text": ...},
{"prompt": ..., "completion": ...} or {"messages": [...]}. The trained model ends up in runs/quickstart.
"""

import sys

from ebft import EBFTConfig, EBFTTrainer
from ebft.data import load_documents

model, file = sys.argv[1:]
trainer = EBFTTrainer(
    model=model,
    args=EBFTConfig(output_dir="runs/quickstart", max_length=512, max_steps=100),
    train_dataset=load_documents(file),
)
trainer.train()
trainer.save_model()
