"""A run whose last documents are long; as a script, one that runs out of memory over them."""

import resource
import sys
from pathlib import Path

import torch
from transformers import TrainerCallback

from training import documents, small_model, train

ROWS = documents([14, 19, 23, 17, 21, 15, 480, 450])
SETTINGS = dict(
    max_steps=4,
    save_strategy="steps",
    save_steps=2,
    per_device_train_batch_size=2,
    optim="adamw_torch",
    learning_rate=1e-3,
    max_length=480,
)
SPARE = 32 * 2**20  # bytes that are left for the last step


class Limit(TrainerCallback):
    """Before the last step: no more memory than there is now, but for a little."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == SETTINGS["max_steps"] - 1:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + SPARE
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def run(folder: Path, resume=None, callbacks=(), **settings):
    model = small_model(dtype=torch.float32, hidden_size=128, intermediate_size=2048, max_position_embeddings=512)
    return train(model, ROWS, folder, resume, settings=SETTINGS | settings, callbacks=list(callbacks))


if __name__ == "__main__":
    from ebft.cli import is_users_mistake

    try:
        run(Path(sys.argv[1]), callbacks=[Limit()])
    except ValueError as error:
        print(error)
        sys.exit(2 if is_users_mistake(error) else 1)
